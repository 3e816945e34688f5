"""
Run a video through a streamed model, compare with dense on sampled frames, and write the results to a folder.

    reader = VideoReader("street.mp4")
    model, preprocess = load_model("path/to/siglip")
    summary = run_video(reader, model, preprocess, "out", {"threshold": 0.01})
    summary["cost"]["mean"], summary["cosine_to_dense"]["streamed"]["p5"]
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from ..utils.files import staging_folder
from ..utils.jobs import stop_on_interrupt, timed
from ..utils.plots import save_plot
from ..utils.provenance import dtype_name, fingerprint
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from ..vision.stream import NeuroFlowStream
from .labels import Labels
from .objects import find_objects, object_line, require_objects_found
from .overlay import (
    LEGEND,
    OBJECTS_LEGEND,
    OverlayWriter,
    contact_sheet,
    marked_picture,
    outline_objects,
    overlay_frame,
)
from .plots import plot_run
from .prefetch import prefetch
from .preprocess import Preprocessor
from .reader import Frame, VideoError, VideoReader
from .records import (
    MOST_CHARACTERS,
    FrameRecord,
    agreement,
    caption_lines,
    cosines,
    embedding_tensors,
    figures,
    frame_line,
    gate_rule,
    label_line,
    label_words,
    spread,
    timeline,
)

# the summary is moved last: where it exists, the other files are of the same run
RUN_FILES = ("frames.jsonl", "embeddings.safetensors", "overlay.mp4", "contact_sheet.png", "plot.png", "summary.json")
DENSE_SAMPLES = 25
SHEET_CELLS = 8


def encode_video(
    reader: VideoReader,
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    stream: NeuroFlowStream,
    dense_every: int,
    labels: Labels | None,
    objects: bool,
) -> Iterator[tuple[Frame, np.ndarray, FrameRecord]]:
    """
    Encode a video with a stream of the model, and every `dense_every`-th frame (0: none) also densely. A thread
    decodes and preprocesses ahead, but waits while a forward is timed. Other arguments are as in `run_video`. Yields
    frames with their active masks, bool [grid_h, grid_w], and records.
    """
    covered, turn = covered_share(model, preprocess), threading.Lock()

    def forward(pixel_values, **kwargs):
        return model(pixel_values=pixel_values, interpolate_pos_encoding=True, **kwargs)

    def prepared():
        frames = iter(reader)
        while True:
            with turn:
                frame = next(frames, None)
                if frame is None:
                    return
                item = frame, preprocess(frame.image, model.dtype, model.device)
            yield item

    with contextlib.closing(prefetch(prepared())) as items:
        for place, (frame, pixel_values) in enumerate(items):
            with turn, torch.inference_mode():
                if place == 0:
                    forward(pixel_values)  # warm up: kernels are chosen and memory is allocated
                output, milliseconds = timed(lambda x=pixel_values: forward(x, stream=stream), model.device)
                dense, dense_milliseconds = None, None
                if dense_every and place % dense_every == 0:
                    dense, dense_milliseconds = timed(lambda x=pixel_values: forward(x), model.device)
            mask = output.active_mask[0].cpu().numpy()
            embedding = output.pooler_output[0].float().cpu()
            dense_embedding = None if dense is None else dense.pooler_output[0].float().cpu()
            moving = find_objects(model, output, stream.gate, labels)[0] if objects else None
            record = FrameRecord(
                index=frame.index,
                time=frame.time,
                active=int(mask.sum()),
                patches=mask.size,
                cost=output.cost[0].item(),
                milliseconds=milliseconds,
                embedding=embedding,
                dense_embedding=dense_embedding,
                dense_milliseconds=dense_milliseconds,
                label_logits=None if labels is None else labels.logits(embedding),
                dense_label_logits=None if labels is None or dense is None else labels.logits(dense_embedding),
                objects=moving and [object_line(item, *frame.image.shape[:2], covered) for item in moving],
            )
            yield frame, mask, record


def covered_share(model: NeuroFlowSiglipVisionModel, preprocess: Preprocessor) -> float:
    """The share of each side of a frame that its patches cover."""
    patch_size = model.config.patch_size
    return preprocess.patches_per_side(patch_size) * patch_size / preprocess.resolution


def sampling_step(expected_frames: int, keyframe_interval: int | None) -> int:
    """The interval of dense samples, for about 25 in a video."""
    # no factor in common with the keyframe interval: keyframes would be sampled more often than they occur
    step = max(1, round(expected_frames / DENSE_SAMPLES))
    while keyframe_interval and math.gcd(step, keyframe_interval) > 1:
        step += 1
    return step


def settings(reader: VideoReader, model: NeuroFlowSiglipVisionModel, preprocess: Preprocessor) -> dict:
    """The video, the model and the machine, as in `summary.json`."""
    side = preprocess.patches_per_side(model.config.patch_size)
    return {
        "video": {
            "name": reader.path.name,
            "width": reader.width,
            "height": reader.height,
            "frames_per_second": reader.fps,
            "stride": reader.stride,
            "failed_frames": reader.failed_frames,
        },
        "weights": fingerprint(model),
        "resolution": preprocess.resolution,
        "grid": [side, side],
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("neuroflow-hf", "torch", "transformers")},
    }


class RunPictures:
    """Draws the overlay video, with a writer, and the contact sheet, which shows some of each `every`-th frame."""

    def __init__(self, writer: OverlayWriter | None, names: Sequence[str], covered: float, every: int):
        self.writer, self.names, self.covered, self.every = writer, names, covered, every
        self.drawn = 0
        self.cells: list[tuple[np.ndarray, list[str]]] = []  # pictures and captions for the contact sheet

    def add(self, image: np.ndarray, mask: np.ndarray, record: FrameRecord):
        """Draw a frame."""
        lines = caption_lines(record, self.names)
        on_sheet, self.drawn = self.drawn % self.every == 0, self.drawn + 1
        if not on_sheet and self.writer is None:
            return
        picture = marked_picture(image, mask, self.covered)
        if record.objects:
            objects = [(line["box"], label_words(line, MOST_CHARACTERS // 2)) for line in record.objects]
            picture = outline_objects(picture, objects, picture.shape[1] / image.shape[1])
        if on_sheet:
            dense = record.dense_embedding
            compared = "" if dense is None else f", cosine {cosines(record.embedding, dense).item():.4f}"
            self.cells.append((picture, [lines[0] + compared, *lines[1:]]))
        if self.writer is not None:
            self.writer.write(overlay_frame(picture, lines), record.time)

    def sheet(self, title: str, legend: str) -> np.ndarray:
        """The contact sheet, uint8 RGB [H, W, 3], of at most SHEET_CELLS frames, evenly spaced."""
        places = np.linspace(0, len(self.cells) - 1, min(SHEET_CELLS, len(self.cells))).round().astype(int)
        return contact_sheet([self.cells[place] for place in places], title, legend)


def run_video(
    reader: VideoReader,
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    out: str | Path,
    gate_options: dict | None = None,
    *,
    dense_every: int | None = None,
    overlay: bool = True,
    labels: Labels | None = None,
    objects: bool = False,
    model_name: str = "",
    command: str = "",
    on_frame: Callable[[FrameRecord], None] = lambda _: None,
) -> dict:
    """
    Stream a video through a model, and write the results to a folder.

    Writes `frames.jsonl`, `embeddings.safetensors`, `contact_sheet.png`, `plot.png`, `summary.json` and, with
    `overlay`, `overlay.mp4`. Files of an earlier run are replaced at the end. After Ctrl-C, or if the video is
    damaged, the results of the frames before are written.

    Args:
        reader: the video.
        model, preprocess: from `load_model`.
        out: folder to write to; made if missing.
        gate_options: options of [`NeuroFlowGateConfig`] that override the model's.
        dense_every: compare with dense on every Nth frame; 0: never; default: for about 25 samples.
        overlay: also write a video that marks encoded patches.
        labels: zero-shot labels to compare the frames with, from `load_model_with_labels`.
        objects: also find moving objects, with labels if there are any, and draw and store their boxes.
        model_name, command: for the summary.
        on_frame: called with each frame's record.

    Returns:
        The contents of `summary.json`. Its `status` is `"complete"`, `"interrupted"` (Ctrl-C) or `"damaged"`, and its
        `message` says where and why the run stopped.

    ValueError for an option or a resolution out of range, pixels that are not finite, and `objects` with a gate that
    does not compare frames; VideoError if the first frame cannot be read; NotADirectoryError or OSError if `out` is a
    file or cannot be written to.
    """
    started = time.perf_counter()
    if dense_every is not None and dense_every < 0:
        raise ValueError(f"`dense_every` is {dense_every}; expected a number of frames, or 0 for no comparison.")
    covered = covered_share(model, preprocess)
    stream = model.new_stream(**(gate_options or {}))
    if objects:
        require_objects_found(stream.gate, labelled=labels is not None)
    if dense_every is None:
        dense_every = sampling_step(reader.expected_frames, stream.gate.keyframe_interval)

    records: list[FrameRecord] = []
    status, message = "complete", ""
    with staging_folder(out, RUN_FILES) as folder:
        writer = OverlayWriter(folder / "overlay.mp4") if overlay else None
        names = () if labels is None else labels.names
        interval = max(1, dense_every)  # sheets show frames that were compared with dense
        sheet_every = interval * max(1, reader.expected_frames // (interval * SHEET_CELLS))
        pictures = RunPictures(writer, names, covered, sheet_every)
        frames = encode_video(reader, model, preprocess, stream, dense_every, labels, objects)
        try:
            finished = contextlib.nullcontext() if writer is None else contextlib.closing(writer)
            with stop_on_interrupt() as stop, finished, contextlib.closing(frames):
                for frame, mask, record in frames:
                    records.append(record)
                    pictures.add(frame.image, mask, record)
                    on_frame(record)
                    if stop.is_set():
                        status = "interrupted"
                        message = f"stopped by Ctrl-C after frame {record.index} ({record.time:.2f} s)"
                        break
        except VideoError as error:
            if not records:
                raise
            status, message = "damaged", str(error)

        gate = f"mode {stream.gate.mode}, reference {stream.gate.reference}, {gate_rule(stream.gate)}"
        title = f"{reader.path.name} at {preprocess.resolution} px, {gate}"
        lines = [frame_line(record, records[0].dense_embedding) for record in records]
        if labels is not None:
            lines = [line | label_line(record, names) for line, record in zip(lines, records, strict=True)]
        (folder / "frames.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        measured = figures(records)
        save_plot(plot_run(records, title, names, measured["held_at_cost"]), folder / "plot.png")
        sheet = pictures.sheet(title, OBJECTS_LEGEND if objects else LEGEND)
        Image.fromarray(sheet).save(folder / "contact_sheet.png")
        summary = {
            "status": status,
            "message": message,
            "command": command,
            "model": model_name or model.config.name_or_path,
            "dense_every": dense_every,
            "gate": stream.gate.to_dict(),
            **settings(reader, model, preprocess),
            **measured,
            "stream_bytes": stream.nbytes,
        }
        if labels is not None:
            summary["labels"] = {
                "names": list(names),
                "template": labels.template,
                "agreement": agreement(records, measured["cost"]["mean"]),
                "timeline": timeline(records, names),
            }
        if objects:
            counts = [len(record.objects) for record in records]
            summary["objects"] = {"frames": sum(count > 0 for count in counts), "per_frame": spread(counts)}
        # `save_file` would write a file that only its owner can read
        (folder / "embeddings.safetensors").write_bytes(save(embedding_tensors(records)))
        summary["files"] = [name for name in RUN_FILES if (folder / name).exists() or name == "summary.json"]
        # includes everything but loading the model
        summary["wall_clock_seconds"] = round(time.perf_counter() - started, 3)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
