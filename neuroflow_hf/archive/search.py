"""
Search embedded videos: the similarity of every frame to a query, and the moments where it is highest. Pure functions.

    index = open_index("dataset")
    query = text_query(index.metadata, "a dog", source="path/to/siglip")
    for moment in search_index(index, query.embedding): ...

All rows are compared, so nothing is missed. A million rows of 384 numbers take some tenths of a second: an approximate
index would save less than loading the checkpoint takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from ..utils.files import significant
from .index import SearchIndex

BLOCK = 512  # rows that are compared at once: as float32, they fit into a processor's cache


@dataclass(frozen=True)
class Moment:
    """Frames of a video, one after the other, that fit a query."""

    video: int  # place of the video among all
    # first, last, best: rows of the video: the first frame, the last one, and the one with the highest score
    first: int
    last: int
    best: int
    score: float  # cosine of the best frame to the query


def similarities(parts: Sequence[Tensor], query: Tensor) -> Tensor:
    """
    The cosine of every row to a query, float32 [rows of all parts]; 0 for a row of zeros.

    Args:
        parts: embeddings [rows, D] of any float dtype, which may be mapped into memory.
        query: float32 [D].
    """
    query = functional.normalize(query.float(), dim=0)
    ones = torch.ones_like(query)
    scores = []
    for part in parts:
        for block in part.split(BLOCK):
            block = block.to(torch.float32, copy=True)
            dots = block @ query
            lengths = (block.square_() @ ones).sqrt()  # a matrix product is faster than a sum over rows
            scores.append(dots / lengths.clamp_min(1e-12))
    return torch.cat(scores)


def find_moments(
    scores: Tensor,
    lengths: Sequence[int],
    seconds_of: Callable[[int], Tensor],
    count: int = 10,
    gap: float = 2.0,
) -> list[Moment]:
    """
    The moments that fit best, best first; none whose best frame is below the median of all scores.

    A moment is found at the best frame that is in none yet. It reaches, in both directions, as far as scores stay
    above halfway between this frame's score and that median. Lower scores in between are bridged if they last less
    than `gap`, and two moments of a video are at least `gap` apart.

    Args:
        scores: float32 [rows of all videos], none of them NaN.
        lengths: the number of rows of each video.
        seconds_of: gives the times of a video's rows, float64 [rows], which never go back.
        count: return at most this many.
        gap: seconds.

    Raises:
        ValueError: for a `count` below 1 or a negative `gap`.
    """
    if count < 1:
        raise ValueError(f"`count` is {count}; expected a number of moments, at least 1.")
    if not gap >= 0:
        raise ValueError(f"`gap` is {gap}; expected a number of seconds, 0 or more.")
    ends = torch.tensor(lengths).cumsum(0)
    median, left = scores.median(), scores.clone()  # `left` is -inf where no moment may be
    moments: list[Moment] = []
    while len(moments) < count:
        peak = int(left.argmax())
        if left[peak] < median:
            break
        video = int(torch.searchsorted(ends, peak, right=True))
        begin, end = int(ends[video]) - lengths[video], int(ends[video])
        seconds, best = seconds_of(video), peak - begin
        first, last = extent(left[begin:end], seconds, best, float(scores[peak] + median) / 2, gap)
        moments.append(Moment(video, first, last, best, float(scores[peak])))
        near = (seconds > seconds[first] - gap) & (seconds < seconds[last] + gap)
        near[first : last + 1] = True  # also without a gap
        left[begin:end][near] = -torch.inf
    return moments


def extent(scores: Tensor, seconds: Tensor, best: int, level: float, gap: float) -> tuple[int, int]:
    """
    The first and the last row of the moment around the row `best`: rows with a score of `level` or more, where two
    belong together if they are neighbours or less than `gap` apart.
    """
    high = torch.nonzero(scores >= level).flatten()
    apart = (high.diff() > 1) & (seconds[high].diff() >= gap)
    run = functional.pad(apart.cumsum(0), (1, 0))  # which run each high row is in
    members = high[run == run[high == best]]
    return int(members[0]), int(members[-1])


def search_index(index: SearchIndex, query: Tensor, count: int = 10, gap: float = 2.0) -> list[dict]:
    """
    The moments of a dataset that fit a query best, best first.

    Args:
        index: of `open_index`.
        query: float32 [D], an embedding of the dataset's checkpoint.
        count, gap: as in `find_moments`; its errors are raised.

    Returns:
        For each moment: `video`; `start`, `end` and `best`, the times of its first, last and best frame in seconds;
        `frame`, the best frame's number in the file; `frames`, how many embedded frames it has; `score`, the cosine of
        the best frame.
    """

    @cache
    def rows(place: int) -> dict[str, list]:
        return pq.read_table(index.files[place], columns=["video", "frame", "seconds"]).to_pydict()

    def seconds_of(place: int) -> Tensor:
        return torch.tensor(rows(place)["seconds"], dtype=torch.float64)

    found = []
    scores = similarities(index.embeddings, query)
    for moment in find_moments(scores, index.lengths, seconds_of, count, gap):
        columns = rows(moment.video)
        found.append(
            {
                "video": columns["video"][moment.best],
                "start": round(columns["seconds"][moment.first], 6),
                "end": round(columns["seconds"][moment.last], 6),
                "best": round(columns["seconds"][moment.best], 6),
                "frame": columns["frame"][moment.best],
                "frames": moment.last - moment.first + 1,
                "score": significant(moment.score),
            }
        )
    return found
