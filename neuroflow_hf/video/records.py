"""What a run records of each frame, and the figures, labels, lines and captions made of it. Pure functions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..utils.files import significant
from ..vision.gate_config import NeuroFlowGateConfig

MOST_CHARACTERS = 60  # of a label in pictures


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


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of vectors [..., D], computed in float64: [...]."""
    return functional.cosine_similarity(a.double(), b.double(), dim=-1)


def sampled_records(records: Sequence[FrameRecord]) -> list[FrameRecord]:
    """The records of the frames that were also encoded densely."""
    return [record for record in records if record.dense_embedding is not None]


def compare_with_dense(
    records: Sequence[FrameRecord], output: str = "embedding", similarity: Callable = cosines
) -> dict[str, list]:
    """
    Similarities to the dense output on the S sampled frames: S of the streamed output (`"streamed"`), and S of the
    first sample's dense output (`"first_frame"`). `output` names the field of the records that is compared.
    """
    sampled = sampled_records(records)
    if not sampled:
        return {"streamed": [], "first_frame": []}
    streamed, dense = (torch.stack([getattr(record, kind + output) for record in sampled]) for kind in ("", "dense_"))
    return {"streamed": similarity(streamed, dense).tolist(), "first_frame": similarity(dense[:1], dense).tolist()}


def compare_held(
    records: Sequence[FrameRecord], cost: float, output: str = "embedding", similarity: Callable = cosines
) -> tuple[dict, list] | None:
    """
    The baseline at no more than `cost`: dense on every Nth frame, held between. Returns N (`every`), its `cost`, and
    the similarities to dense on the *last* frame of each hold, which understates it. None if the video is too short.
    """
    sampled = sampled_records(records)
    if len(sampled) < 2:
        return None
    step = records.index(sampled[1]) - records.index(sampled[0])
    samples = math.ceil(1 / (cost * step))  # from one dense frame to the next
    if samples >= len(sampled):
        return None
    dense = torch.stack([getattr(record, f"dense_{output}") for record in sampled])
    how = {"every": samples * step, "cost": 1 / (samples * step)}
    return how, similarity(dense[:-samples], dense[samples:]).tolist()


def held_at_cost(records: Sequence[FrameRecord], cost: float) -> dict | None:
    """The baseline of `compare_held`: `every` (N), its `cost`, and the spread of its `cosine`."""
    held = compare_held(records, cost)
    return held and {**held[0], "cosine": spread(held[1])}


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
    sampled, cost = sampled_records(records), spread([record.cost for record in records])
    ratios = [record.dense_milliseconds / record.milliseconds for record in sampled[1:]]
    streamed = spread([record.milliseconds for record in records])
    dense = spread([record.dense_milliseconds for record in sampled])
    return {
        "frames": len(records),
        "keyframes": sum(record.keyframe for record in records),
        "skip_rate": spread([record.skip_rate for record in records]),
        "cost": cost,
        "milliseconds_per_frame": {"streamed": streamed, "dense": dense},
        # the median is of pairs of forwards of the same frame; the mean includes all keyframes
        "speed_up": {"median": float(np.median(ratios)), "mean": dense["mean"] / streamed["mean"]} if ratios else None,
        "sampled_frames": len(sampled),
        "compared_frames": len(sampled[1:]),
        "compared_keyframes": sum(record.keyframe for record in sampled[1:]),
        "cosine_to_dense": {name: spread(values[1:]) for name, values in compare_with_dense(records).items()},
        "held_at_cost": held_at_cost(records, cost["mean"]),
    }


def timeline(records: Sequence[FrameRecord], names: Sequence[str]) -> list[dict]:
    """
    The best label over time, without smoothing. Consecutive frames with the same label are one stretch: `start` is the
    time of its first frame in seconds, `end` that of the next stretch's first frame, or of the video's last; `frames`
    is their number; `confidence` and `share` are the means of the label's score and share.
    """
    stretches = []
    # by logits, because two scores can both round to 1
    for place, group in groupby(records, key=lambda record: int(record.label_logits.argmax())):
        group = list(group)
        logits, start = torch.stack([record.label_logits for record in group]), round(group[0].time, 6)
        if stretches:
            stretches[-1]["end"] = start
        stretches.append(
            {
                "start": start,
                "end": round(group[-1].time, 6),
                "frames": len(group),
                "label": names[place],
                "confidence": significant(logits.sigmoid()[:, place].mean().item()),
                "share": significant(logits.softmax(dim=-1)[:, place].mean().item()),
            }
        )
    return stretches


def agreement(records: Sequence[FrameRecord], cost: float) -> dict:
    """
    The number of sampled frames after the first (`compared_frames`) on which the best label is dense's: of the
    streamed embedding (`streamed`), of the first sample's dense embedding (`first_frame`), and of the baseline at no
    more than `cost` (`held_at_cost`, see `compare_held`).
    """
    how = {"output": "label_logits", "similarity": lambda a, b: a.argmax(-1) == b.argmax(-1)}
    compared = {name: values[1:] for name, values in compare_with_dense(records, **how).items()}
    held = compare_held(records, cost, **how)
    return {
        "compared_frames": len(compared["streamed"]),
        **{name: sum(values) for name, values in compared.items()},
        "held_at_cost": held and {**held[0], "compared_frames": len(held[1]), "agreed": sum(held[1])},
    }


def best_label(names: Sequence[str], logits: Tensor) -> dict:
    """The best label by its logits, float32 [L], with its confidence and share."""
    place = int(logits.argmax())
    found = {"confidence": logits.sigmoid()[place], "share": logits.softmax(dim=-1)[place]}
    return {"label": names[place], **{name: significant(value.item()) for name, value in found.items()}}


def label_line(record: FrameRecord, names: Sequence[str]) -> dict:
    """Labels in a frame's line of `frames.jsonl`: the best one with its confidence and share, and all scores."""
    scores = [significant(score) for score in record.label_logits.sigmoid().tolist()]
    line = {**best_label(names, record.label_logits), "label_scores": dict(zip(names, scores, strict=True))}
    if record.dense_label_logits is not None:
        line["dense_label"] = names[int(record.dense_label_logits.argmax())]
    return line


def label_words(line: dict, most: int = MOST_CHARACTERS) -> str:
    """The label of a `label_line` or an `object_line`, cut to so many characters, and its confidence; "" without."""
    if "label" not in line:
        return ""
    return f"{shortened(line['label'], most)} {percent(line['confidence'])}"


def percent(value: float) -> str:
    """A share as a percentage, with enough digits for the small probabilities that SigLIP often gives."""
    if value < 0.0001:
        return "<0.01%"
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def shortened(text: str, most: int) -> str:
    """A text cut to `most` characters."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


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
    sampled = sampled_records(records)
    if sampled:
        tensors["dense_embeddings"] = torch.stack([record.dense_embedding for record in sampled])
        tensors["dense_frame_index"] = torch.tensor([record.index for record in sampled])
    if records[0].label_logits is not None:
        tensors["label_scores"] = torch.stack([record.label_logits for record in records]).sigmoid()
    return tensors


def caption_lines(record: FrameRecord, names: Sequence[str]) -> list[str]:
    """The lines of text under a frame: figures and, with names of labels, the best label."""
    share = "all" if record.keyframe else f"{1 - record.skip_rate:.1%}"
    lines = [f"time {record.time:.1f} s, encoded {share}, cost {record.cost:.2f}"]
    return [*lines, f"label {label_words(best_label(names, record.label_logits))}"] if names else lines


def gate_rule(gate: NeuroFlowGateConfig) -> str:
    """The token budget or threshold, the cost budget and the fidelity to keep, in words."""
    rules = [f"{gate.token_budget} patches" if gate.token_budget else f"threshold {gate.threshold:g}"]
    if gate.cost_budget is not None:
        rules.append(f"cost budget {gate.cost_budget:g}")
    if gate.min_fidelity is not None:
        rules.append(f"fidelity {gate.min_fidelity:g}")
    return ", ".join(rules)
