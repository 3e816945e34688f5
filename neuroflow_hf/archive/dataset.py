"""
The dataset: a folder with one Parquet file a video and one row a frame. A file exists once its video is finished.

    pyarrow.parquet.read_table("dataset").column_names
    # video, frame, seconds, embedding, cost, keyframe; with labels also label, confidence
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..utils.provenance import dtype_name, fingerprint, key_of
from ..video.labels import Labels
from ..video.preprocess import Preprocessor
from ..vision.gate_config import NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError('Parquet datasets need the extra `archive`: pip install "neuroflow-hf[archive]".') from error

KEY = b"neuroflow"  # of the settings in a file's metadata
SEGMENT_ROWS = 256  # of a segment, at least: a keyframe more in so many rows costs 0.3% of dense


# --- settings ------------------------------------------------------------------------------------------------------


def dataset_settings(
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    gate: NeuroFlowGateConfig,
    every: float | None,
    labels: Labels | None,
) -> dict:
    """Everything that rows depend on: a dataset holds rows of the same settings only."""
    settings = {
        "weights": fingerprint(model),
        "dtype": dtype_name(model.dtype),
        "preprocessing": asdict(preprocess),
        "gate": gate.to_dict(),
        "every": every,
        "segment_rows": SEGMENT_ROWS,
        "labels": None if labels is None else {"names": labels.names, "template": labels.template},
    }
    return json.loads(json.dumps(settings))  # as they are read back: lists for tuples


def video_state(video: Path) -> dict:
    """What tells that a video changed since it was embedded."""
    state = video.stat()
    return {"path": str(video), "bytes": state.st_size, "modified": state.st_mtime_ns}


def read_metadata(file: Path) -> dict:
    """All settings in a dataset's file; ValueError if there are none."""
    try:
        return json.loads(pq.read_metadata(file).metadata[KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a file of `neuroflow embed`; expected a folder of such files.") from error


def finished_videos(dataset: Path, settings: dict) -> set[Path]:
    """The videos that a dataset holds, as they are now; ValueError if it has other settings, or files of others."""
    finished = set()
    for file in sorted(dataset.glob("*.parquet")):
        metadata = read_metadata(file)
        differing = [name for name, value in settings.items() if metadata.get(name) != value]
        if differing:
            raise ValueError(
                f"{dataset} holds embeddings of other settings ({', '.join(differing)}). Name another folder, or give "
                "the options of the first run."
            )
        video = Path(metadata["video"]["path"])
        if video.exists() and video_state(video) == metadata["video"]:
            finished.add(video)
    return finished


# --- rows ----------------------------------------------------------------------------------------------------------


def file_of(dataset: Path, video: Path) -> Path:
    """The file of a video, an absolute path: videos of the same name in different folders have different files."""
    return dataset / f"{video.stem[:40]}-{key_of(video=str(video))}.parquet"


def frame_schema(dim: int, labelled: bool, metadata: dict) -> pa.Schema:
    """The columns of a file whose embeddings have `dim` numbers."""
    fields = [
        ("video", pa.string()),
        ("frame", pa.int64()),
        ("seconds", pa.float64()),
        ("embedding", pa.list_(pa.float16(), dim)),
        ("cost", pa.float32()),
        ("keyframe", pa.bool_()),
    ]
    if labelled:
        fields += [("label", pa.string()), ("confidence", pa.float32())]
    return pa.schema(fields, metadata={KEY: json.dumps(metadata)})


def frame_table(rows: list[dict], video: Path, labels: Labels | None, schema: pa.Schema) -> pa.Table:
    """
    A table of rows, each with `frame`, `seconds`, `embedding` (float32 [D]), `cost` and `keyframe`; ValueError for an
    embedding that half precision cannot hold.
    """
    embeddings = torch.stack([row["embedding"] for row in rows])
    half = embeddings.half()
    if not half.isfinite().all():
        raise ValueError(
            f"An embedding of {video} has a number that half precision cannot hold; expected finite ones below 65504. "
            "Choose --dtype float32, or another checkpoint."
        )
    columns = {name: [row[name] for row in rows] for name in ("frame", "seconds", "cost", "keyframe")}
    columns["video"] = [str(video)] * len(rows)
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(half.flatten().numpy()), half.shape[1])
    if labels is not None:
        logits, places = labels.logits(embeddings).max(dim=-1)
        columns["label"] = [labels.names[place] for place in places.tolist()]
        columns["confidence"] = logits.sigmoid().numpy()
    return pa.table(columns, schema=schema)


def open_writer(file: Path, dim: int, labelled: bool, metadata: dict) -> pq.ParquetWriter:
    """A writer of tables of `frame_table`, whose embeddings have `dim` numbers."""
    schema = frame_schema(dim, labelled, metadata)
    # numbers that hardly repeat: a dictionary and compression would save a twentieth, and triple the time to read
    compressed = dict.fromkeys(schema.names, "snappy") | {"embedding.list.element": "none"}
    repeating = [name for name in schema.names if name != "embedding"]
    return pq.ParquetWriter(file, schema, use_dictionary=repeating, compression=compressed)
