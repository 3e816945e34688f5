"""
Embeddings of a dataset, mapped into memory. Parquet takes seconds to decode what a search reads in tenths of a second,
so each file's embeddings are also kept as they are, in a hidden folder of the dataset, once it was searched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch

from ..utils.files import prepare_folder
from ..utils.provenance import key_of
from ..vision.whole_file import whole_file
from .dataset import read_metadata

FOLDER, ENDING = ".search", ".float16"


@dataclass(frozen=True, eq=False)
class SearchIndex:
    """A dataset that can be searched. Rows are numbered through all files."""

    files: list[Path]  # the Parquet files with rows, in order of their names
    embeddings: list[torch.Tensor]  # float16 [rows, D] of each, mapped into memory
    metadata: dict  # of the first file: the checkpoint and the settings that all rows share

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
    metadata, dim = read_metadata(files[0]), pq.read_schema(files[0]).field("embedding").type.list_size
    folder = prepare_folder(dataset / FOLDER)
    copies = {file: folder / copy_name(file, metadata["weights"]) for file in files}
    for place, (file, copy) in enumerate(copies.items()):
        if not copy.exists():
            copy_embeddings(file, copy, metadata)
            if on_step is not None:
                on_step("reading the dataset", place + 1, len(files))
    for old in set(folder.glob(f"*{ENDING}")) - set(copies.values()):
        old.unlink(missing_ok=True)
    found = {file: map_rows(copy, dim) for file, copy in copies.items() if copy.stat().st_size}
    if not found:
        raise ValueError(f"{dataset} holds no frame; embed videos first, with `neuroflow embed`.")
    return SearchIndex(list(found), list(found.values()), metadata)


def map_rows(copy: Path, dim: int) -> torch.Tensor:
    """A copy that is not empty, float16 [rows, dim], mapped into memory. It holds no open file: there may be many."""
    numbers = copy.stat().st_size // torch.float16.itemsize
    return torch.from_file(str(copy), shared=False, size=numbers, dtype=torch.float16).view(-1, dim)


def copy_name(file: Path, weights: str) -> str:
    """The name of a file's copy, which changes with the file and with the checkpoint of the dataset."""
    state = file.stat()
    parts = {"name": file.name, "bytes": state.st_size, "modified": state.st_mtime_ns, "weights": weights}
    return key_of(**parts) + ENDING


def copy_embeddings(file: Path, copy: Path, metadata: dict):
    """Write the embeddings of a Parquet file, one after the other; ValueError if another checkpoint gave them."""
    own = read_metadata(file)
    if own["weights"] != metadata["weights"]:
        raise ValueError(
            f"{file.parent} holds embeddings of several checkpoints, {metadata['model']} and {own['model']} "
            f"({file.name}); they cannot be compared. Keep those of one in a folder."
        )
    with pq.ParquetFile(file) as parquet, whole_file(copy) as partial, partial.open("wb") as written:
        for batch in parquet.iter_batches(columns=["embedding"]):  # some thousand rows at a time
            written.write(batch.column(0).flatten().to_numpy(zero_copy_only=False).tobytes())
