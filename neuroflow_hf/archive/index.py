"""
Embeddings of a dataset, mapped into memory. Parquet takes seconds to decode what a search reads in tenths of a second,
so each file's embeddings are also kept as they are, in a hidden folder of the dataset, once it was searched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from ..utils.files import prepare_folder
from ..utils.provenance import key_of
from ..vision.whole_file import whole_file
from .dataset import read_metadata

FOLDER = ".search"


@dataclass(frozen=True, eq=False)
class SearchIndex:
    """
    A dataset that can be searched. Rows are numbered through all files.

    Args:
        files: the Parquet files with rows, in order of their names.
        embeddings: float16 [rows, D] of each, mapped into memory.
        metadata: of the first file: the checkpoint and the settings that all rows share.
    """

    files: list[Path]
    embeddings: list[torch.Tensor]
    metadata: dict

    @property
    def lengths(self) -> list[int]:
        """The number of rows in each file."""
        return [len(part) for part in self.embeddings]


def open_index(dataset: str | Path, on_step: Callable[[str, float, float], None] | None = None) -> SearchIndex:
    """
    Map a dataset's embeddings into memory. Those of files that are new or changed are copied out of Parquet first.

    Args:
        dataset: a folder that `embed_videos` wrote.
        on_step: called with what is done in words, the files that are done, and all files.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds no file.
        ValueError: if it holds no row, files of another origin, or embeddings of several checkpoints.
        OSError: if the copies cannot be written.
    """
    dataset = Path(dataset)
    files = sorted(dataset.glob("*.parquet"))
    if not files:
        what = "holds no .parquet file" if dataset.is_dir() else "is no folder"
        raise FileNotFoundError(f"{dataset} {what}; expected a dataset that `neuroflow embed` wrote.")
    metadata = read_metadata(files[0])
    folder = prepare_folder(dataset / FOLDER)
    copies = {file: folder / copy_name(file, metadata["weights"]) for file in files}
    for place, (file, copy) in enumerate(copies.items()):
        if not copy.exists():
            copy_embeddings(file, copy, metadata)
            if on_step is not None:
                on_step("reading the dataset", place + 1, len(files))
    for old in set(folder.glob("*.npy")) - set(copies.values()):
        old.unlink(missing_ok=True)
    # copy on write, for torch takes no memory that is read-only; nothing is written
    found = {file: torch.from_numpy(np.load(copy, mmap_mode="c")) for file, copy in copies.items()}
    found = {file: part for file, part in found.items() if len(part)}
    if not found:
        raise ValueError(f"{dataset} holds no frame; embed videos first, with `neuroflow embed`.")
    return SearchIndex(list(found), list(found.values()), metadata)


def copy_name(file: Path, weights: str) -> str:
    """The name of a file's copy, which changes with the file and with the checkpoint of the dataset."""
    state = file.stat()
    return f"{key_of(name=file.name, bytes=state.st_size, modified=state.st_mtime_ns, weights=weights)}.npy"


def copy_embeddings(file: Path, copy: Path, metadata: dict):
    """Write the embeddings of a Parquet file as float16 [rows, D]; ValueError if another checkpoint gave them."""
    own = read_metadata(file)
    if own["weights"] != metadata["weights"]:
        raise ValueError(
            f"{file.parent} holds embeddings of several checkpoints, {metadata['model']} and {own['model']} "
            f"({file.name}); they cannot be compared. Keep those of one in a folder."
        )
    with pq.ParquetFile(file) as parquet, whole_file(copy) as partial, partial.open("wb") as written:
        dim = parquet.schema_arrow.field("embedding").type.list_size
        header = {"descr": "<f2", "fortran_order": False, "shape": (parquet.metadata.num_rows, dim)}
        np.lib.format.write_array_header_1_0(written, header)
        for batch in parquet.iter_batches(columns=["embedding"]):  # some thousand rows at a time
            written.write(batch.column(0).flatten().to_numpy(zero_copy_only=False).tobytes())
