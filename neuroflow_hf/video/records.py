"""What a run records of each frame, and the figures, lines and captions made of it. Pure functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..vision.gate_config import NeuroFlowGateConfig


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """What the model gave for one frame; tensors are on the CPU."""

    index: int  # number in the file, from 0
    time: float  # seconds since the file's first frame
    active: int  # number of patches encoded
    patches: int  # number of all patches
    cost: float  # relative to dense
    milliseconds: float  # of the streamed forward
    embedding: Tensor  # float32 [D]
    dense_embedding: Tensor | None = None  # float32 [D], of a dense forward; None on frames that are not sampled
    dense_milliseconds: float | None = None  # of that forward
    # label_logits, dense_label_logits: float32 [L], of the labels for the two embeddings; None without labels
    label_logits: Tensor | None = None
    dense_label_logits: Tensor | None = None
    objects: list[dict] | None = None  # moving objects as in `object_line`; None if they were not looked for

    @property
    def keyframe(self) -> bool:
        """Whether all patches were encoded."""
        return self.active == self.patches

    @property
    def skip_rate(self) -> float:
        """Share of the patches that were not encoded."""
        return 1 - self.active / self.patches


# --- figures -------------------------------------------------------------------------------------------------------


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of vectors [..., D], computed in float64: [...]."""
    return functional.cosine_similarity(a.double(), b.double(), dim=-1)


def compare_with_dense(
    records: Sequence[FrameRecord], output: str = "embedding", similarity: Callable = cosines
) -> dict[str, list]:
    """
    Similarities to the dense output on the S sampled frames: S of the streamed output (`"streamed"`), and S of the
    first sample's dense output (`"first_frame"`). `output` names the field of the records that is compared.
    """
    sampled = [record for record in records if record.dense_embedding is not None]
    if not sampled:
        return {"streamed": [], "first_frame": []}
    streamed, dense = (torch.stack([getattr(record, kind + output) for record in sampled]) for kind in ("", "dense_"))
    found = {"streamed": similarity(streamed, dense), "first_frame": similarity(dense[:1], dense)}
    return {name: values.tolist() for name, values in found.items()}


def compare_held(
    records: Sequence[FrameRecord], cost: float, output: str = "embedding", similarity: Callable = cosines
) -> tuple[int, list] | None:
    """
    The baseline at no more than `cost`: dense on every Nth frame, held between. Returns N, and the similarities to
    dense on the *last* frame of each hold, which understates the baseline; None if the video is too short.
    """
    places = [place for place, record in enumerate(records) if record.dense_embedding is not None]
    if len(places) < 2:
        return None
    step = places[1] - places[0]
    samples = math.ceil(1 / (cost * step))  # from one dense frame to the next
    if samples >= len(places):
        return None
    dense = torch.stack([getattr(records[place], f"dense_{output}") for place in places])
    return samples * step, similarity(dense[:-samples], dense[samples:]).tolist()


def held_at_cost(records: Sequence[FrameRecord], cost: float) -> dict | None:
    """The baseline of `compare_held`: `every` (N), its `cost`, and the spread of its `cosine`."""
    held = compare_held(records, cost)
    return held and {"every": held[0], "cost": 1 / held[0], "cosine": spread(held[1])}


def mean_cost(records: Sequence[FrameRecord]) -> float:
    """Mean cost of a frame."""
    return float(np.mean([record.cost for record in records]))


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 5th and 95th percentile, minimum and maximum; None without values."""
    if not len(values):
        return None
    names, shares = ("median", "p5", "p95", "min", "max"), (50, 5, 95, 0, 100)
    return {"mean": float(np.mean(values)), **dict(zip(names, np.percentile(values, shares).tolist(), strict=True))}


def figures(records: Sequence[FrameRecord]) -> dict:
    """
    The figures of a run, keyframes included. Fidelity and median speed-up leave out the first sample, on which stream
    and baselines are dense.
    """
    sampled = [record for record in records if record.dense_embedding is not None]
    ratios = [record.dense_milliseconds / record.milliseconds for record in sampled[1:]]
    streamed = spread([record.milliseconds for record in records])
    dense = spread([record.dense_milliseconds for record in sampled])
    return {
        "frames": len(records),
        "keyframes": sum(record.keyframe for record in records),
        "skip_rate": spread([record.skip_rate for record in records]),
        "cost": spread([record.cost for record in records]),
        "milliseconds_per_frame": {"streamed": streamed, "dense": dense},
        # the median is of pairs of forwards of the same frame; the mean includes all keyframes
        "speed_up": {"median": float(np.median(ratios)), "mean": dense["mean"] / streamed["mean"]} if ratios else None,
        "sampled_frames": len(sampled),
        "compared_frames": len(sampled[1:]),
        "compared_keyframes": sum(record.keyframe for record in sampled[1:]),
        "cosine_to_dense": {name: spread(values[1:]) for name, values in compare_with_dense(records).items()},
        "held_at_cost": held_at_cost(records, mean_cost(records)),
    }


def object_figures(records: Sequence[FrameRecord]) -> dict:
    """Moving objects in `summary.json`: on how many frames there are any, and the spread of their number."""
    counts = [len(record.objects) for record in records]
    return {"frames": sum(count > 0 for count in counts), "per_frame": spread(counts)}


# --- lines, tensors and captions -----------------------------------------------------------------------------------


def frame_line(record: FrameRecord, first_dense: Tensor | None) -> dict:
    """
    A frame's line in `frames.jsonl`. Sampled frames also have the dense milliseconds, and the cosines to dense of the
    stream and of the first sample's dense embedding, float32 [D].
    """
    line = {
        "index": record.index,
        "time": round(record.time, 6),
        "active": record.active,
        "patches": record.patches,
        "skip_rate": round(record.skip_rate, 6),
        "cost": round(record.cost, 6),
        "milliseconds": round(record.milliseconds, 3),
        "keyframe": record.keyframe,
    }
    if record.objects is not None:
        line["objects"] = record.objects
    dense = record.dense_embedding
    if dense is not None:
        line["cosine_to_dense"] = round(cosines(record.embedding, dense).item(), 7)
        line["cosine_first_frame"] = round(cosines(first_dense, dense).item(), 7)
        line["dense_milliseconds"] = round(record.dense_milliseconds, 3)
    return line


def embedding_tensors(records: Sequence[FrameRecord]) -> dict[str, Tensor]:
    """
    `embeddings` float32 [T, D], `frame_index` int64 [T] and `time` float64 [T] in seconds; with S sampled frames,
    also `dense_embeddings` [S, D] and `dense_frame_index` [S]; with L labels, also `label_scores` float32 [T, L].
    """
    tensors = {
        "embeddings": torch.stack([record.embedding for record in records]),
        "frame_index": torch.tensor([record.index for record in records]),
        "time": torch.tensor([record.time for record in records], dtype=torch.float64),
    }
    sampled = [record for record in records if record.dense_embedding is not None]
    if sampled:
        tensors["dense_embeddings"] = torch.stack([record.dense_embedding for record in sampled])
        tensors["dense_frame_index"] = torch.tensor([record.index for record in sampled])
    if records[0].label_logits is not None:
        tensors["label_scores"] = torch.stack([record.label_logits for record in records]).sigmoid()
    return tensors


def caption(record: FrameRecord) -> str:
    """The text under a frame."""
    share = "all" if record.keyframe else f"{1 - record.skip_rate:.1%}"
    return f"time {record.time:.1f} s, encoded {share}, cost {record.cost:.2f}"


def gate_rule(gate: NeuroFlowGateConfig) -> str:
    """The token budget or threshold, the cost budget and the fidelity to keep, in words."""
    rules = [f"{gate.token_budget} patches" if gate.token_budget else f"threshold {gate.threshold:g}"]
    if gate.cost_budget is not None:
        rules.append(f"cost budget {gate.cost_budget:g}")
    if gate.min_fidelity is not None:
        rules.append(f"fidelity {gate.min_fidelity:g}")
    return ", ".join(rules)


def run_title(gate: NeuroFlowGateConfig, video: str, resolution: int) -> str:
    """The title of a run's pictures."""
    return f"{video} at {resolution} px, mode {gate.mode}, reference {gate.reference}, {gate_rule(gate)}"
