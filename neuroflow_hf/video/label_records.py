"""Labels of a run: per frame, over time, and compared with dense and the baselines. Pure functions."""

from collections.abc import Sequence
from itertools import groupby

import torch

from .labels import Labels
from .records import FrameRecord, held_pairs, mean_cost

MOST_CHARACTERS = 60  # of a label in pictures


def timeline(records: Sequence[FrameRecord], names: Sequence[str]) -> list[dict]:
    """
    The best label over time: a stretch for each run of consecutive frames with the same label, without smoothing.

    Returns:
        For each stretch: `start`, the time of its first frame in seconds; `end`, the time of the next stretch's first
        frame, or of the last frame; `frames`, their number; `label`; `confidence` and `share`, the means of the
        label's score and share.
    """
    stretches = []
    for place, group in groupby(records, key=top_label):
        group = list(group)
        logits = torch.stack([record.label_logits for record in group])
        if stretches:
            stretches[-1]["end"] = round(group[0].time, 6)
        stretches.append(
            {
                "start": round(group[0].time, 6),
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
    How often the best label is dense's, on the sampled frames after the first (`compared_frames`): the label of the
    streamed embedding (`streamed`), of the first sample's dense embedding (`first_frame`), of the last sample's
    (`held`), and of the baseline of at most `cost` (`held_at_cost`, see [`records.held_at_cost`]).
    """
    sampled = [record for record in records if record.dense_label_logits is not None]
    dense = [int(record.dense_label_logits.argmax()) for record in sampled]
    streamed = [top_label(record) for record in sampled]
    found = {
        "compared_frames": max(0, len(sampled) - 1),
        "streamed": count_same(streamed[1:], dense[1:]),
        "first_frame": count_same(dense[:1] * len(dense[1:]), dense[1:]),
        "held": count_same(dense[:-1], dense[1:]),
        "held_at_cost": None,
    }
    held = held_pairs(records, cost)
    if held is not None:
        every, pairs = held
        old, new = ([int(record.dense_label_logits.argmax()) for record in side] for side in zip(*pairs, strict=True))
        found["held_at_cost"] = {
            "every": every,
            "cost": 1 / every,
            "compared_frames": len(pairs),
            "agreed": count_same(old, new),
        }
    return found


def label_figures(records: Sequence[FrameRecord], labels: Labels) -> dict:
    """Labels in `summary.json`: `names`, `template`, `agreement` with dense, and the `timeline`."""
    return {
        "names": list(labels.names),
        "template": labels.template,
        "agreement": agreement(records, mean_cost(records)),
        "timeline": timeline(records, labels.names),
    }


def label_line(record: FrameRecord, names: Sequence[str]) -> dict:
    """Labels in a frame's line of `frames.jsonl`: the best one, its confidence and share, and all scores."""
    place = top_label(record)
    scores = [significant(score) for score in record.label_logits.sigmoid().tolist()]
    line = {
        "label": names[place],
        "confidence": scores[place],
        "share": significant(record.label_logits.softmax(dim=-1)[place].item()),
        "label_scores": dict(zip(names, scores, strict=True)),
    }
    if record.dense_label_logits is not None:
        line["dense_label"] = names[int(record.dense_label_logits.argmax())]
    return line


def label_caption(record: FrameRecord, names: Sequence[str]) -> list[tuple[str, str]]:
    """The caption's row for the best label, as (label, value)."""
    place = top_label(record)
    confidence = percent(record.label_logits[place].sigmoid().item())
    return [("LABEL, CONFIDENCE", f"{shortened(names[place], MOST_CHARACTERS)}   {confidence}")]


def object_caption(line: dict) -> str:
    """The text at a moving object's box: its label and confidence; empty without labels."""
    if "label" not in line:
        return ""
    return f"{shortened(line['label'], MOST_CHARACTERS // 2)} {percent(line['confidence'])}"


def top_label(record: FrameRecord) -> int:
    """The number of the best label; by logits, because two scores can both round to 1."""
    return int(record.label_logits.argmax())


def count_same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The number of places in which two sequences agree."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True))


def percent(value: float) -> str:
    """A share as a percentage, with enough digits for small ones: SigLIP's probabilities are often small."""
    if value < 0.0001:
        return "<0.01%"
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def shortened(text: str, most: int) -> str:
    """`text`, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def significant(value: float) -> float:
    """A number rounded to 6 significant digits."""
    return float(f"{value:.6g}")
