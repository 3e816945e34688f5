"""The texts, split once and kept in the cache folder: JSON lines for people, token numbers for the training."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from neuroflow_hf.utils.files import write_whole
from recipes.phi3_nano.sources import DOMAINS, HERE, Document, cache_folder, documents
from recipes.phi3_nano.split import split
from recipes.phi3_nano.tokenizer import train_tokenizer, wrapped

SPLITS = ("training", "held_out", "left_out")
TEXT_FILES = ("packages.csv", "sources.py", "structured.py", "split.py")
EVERY = 3  # the tokenizer is learned from every third text


@dataclass(frozen=True)
class Corpus:
    """
    What the model is trained on.

    Attributes:
        tokenizer: learned from the training texts.
        streams: for each domain, int16 [tokens], texts one after the other, each followed by the end-of-text token.
        folder: where it is kept.
    """

    tokenizer: PreTrainedTokenizerFast
    streams: dict[str, np.ndarray]
    folder: Path


def corpus_folder() -> Path:
    """The folder of these texts; another as soon as anything that they depend on changes."""
    digest = hashlib.blake2b(digest_size=4)
    for name in TEXT_FILES:
        digest.update((HERE / name).read_bytes())
    return cache_folder() / "phi3-nano" / f"texts-{digest.hexdigest()}"


def write_texts(folder: Path, console: Console) -> None:
    """Read all packages and write the texts of each of SPLITS, one JSON line each, whole or not at all."""
    console.print(f"Reading packages and splitting their texts, to keep in {folder}: some minutes")
    for name, found in zip(SPLITS, split(documents()), strict=True):
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(asdict(item)) + "\n" for item in found))


def read_texts(name: str, console: Console | None = None) -> Iterator[Document]:
    """The texts of one of SPLITS; the first time, all packages are read."""
    path = corpus_folder() / f"{name}.jsonl"
    if not (path.parent / "left_out.jsonl").is_file():
        write_texts(path.parent, console or Console(stderr=True))
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


def load_corpus(console: Console) -> Corpus:
    """The corpus, from the cache folder or made now."""
    folder = corpus_folder()
    key = hashlib.blake2b((HERE / "tokenizer.py").read_bytes(), digest_size=4).hexdigest()
    folder, texts = folder / f"tokens-{key}", folder
    if not (folder / "tokenizer.json").is_file():
        training = list(read_texts("training", console))
        console.print(f"Learning the tokenizer and encoding {len(training)} texts, to keep in {folder}")
        tokenizer = train_tokenizer(item.text for item in training[::EVERY])
        for domain in DOMAINS:
            write_whole(
                folder / f"{domain}.i16",
                encode([item.text for item in training if item.domain == domain], tokenizer).tobytes(),
            )
        write_whole(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str())
    tokenizer = wrapped(Tokenizer.from_file(str(folder / "tokenizer.json")))
    streams = {domain: np.memmap(folder / f"{domain}.i16", np.int16, mode="r") for domain in DOMAINS}
    return Corpus(tokenizer, streams, texts)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The token numbers of all texts, int16 [tokens], each text followed by the end-of-text token."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int16)
    parts = []
    for first in range(0, len(texts), 256):
        for row in tokenizer.backend_tokenizer.encode_batch_fast(texts[first : first + 256]):
            parts += [np.array(row.ids, dtype=np.int16), end]
    return np.concatenate(parts)
