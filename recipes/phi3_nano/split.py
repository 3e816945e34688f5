"""Which texts are held out: whole files, none of which shares its text with the training."""

import hashlib
import re
from collections.abc import Iterable

from recipes.phi3_nano.sources import Document

HELD_OUT_SHARE = 0.05
SHINGLE = 12  # words and signs in a row that count as shared text
MOST_SHARED = {"code": 0.15, "structured": 0.5, "prose": 0.02}  # structured text repeats its frame by nature
PIECE = re.compile(r"\w+|[^\w\s]")


def shingles(text: str) -> frozenset[int]:
    """64-bit hashes of every SHINGLE pieces in a row, case and white space aside; of a shorter text, of all of it."""
    pieces = PIECE.findall(text.lower())
    windows = range(max(1, len(pieces) - SHINGLE + 1))
    return frozenset(digest(" ".join(pieces[first : first + SHINGLE])) for first in windows)


def digest(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shared_share(text: str, others: frozenset[int] | set[int]) -> float:
    """The share of a text's shingles that is among others."""
    own = shingles(text)
    return len(own & others) / len(own)


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """
    Training, held out, and left out.

    A twentieth of the files, by a hash of the source's name, are candidates for holding out. Exact copies (but for
    white space and case) are left out. A candidate that shares more than MOST_SHARED of its shingles with the training
    is left out altogether: neither trained on nor measured with.
    """
    training, candidates, left_out, seen = [], [], [], set()
    for document in documents:
        whole = digest(" ".join(PIECE.findall(document.text.lower())))
        if whole in seen:
            left_out.append(document)
            continue
        seen.add(whole)
        chosen = digest(document.source) / 2**64 < HELD_OUT_SHARE
        (candidates if chosen else training).append(document)
    known: set[int] = set()
    for document in training:
        known |= shingles(document.text)
    held_out = []
    for document in candidates:
        fits = shared_share(document.text, known) <= MOST_SHARED[document.domain]
        (held_out if fits else left_out).append(document)
    return training, held_out, left_out
