"""Labels of a run: by frame, over time, and compared with dense and baselines. Pure functions."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..utils.files import significant
from .labels import Labels
from .records import FrameRecord, compare_held, compare_with_dense, mean_cost

MOST_CHARACTERS = 60  # of a label in pictures


def timeline(records: Sequence[FrameRecord], names: Sequence[str]) -> list[dict]:
    """
    The best label over time, without smoothing. Consecutive frames with the same label are one stretch: `start` is the
    time of its first frame in seconds, `end` that of the next stretch's first frame, or of the video's last; `frames`
    is their number; `confidence` and `share` are the means of the label's score and share.
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
    The number of sampled frames after the first (`compared_frames`) on which the best label is dense's: of the
    streamed embedding (`streamed`), of the first sample's dense embedding (`first_frame`), and of the baseline at no
    more than `cost` (`held_at_cost`, see `compare_held`).
    """
    how = {"output": "label_logits", "similarity": same_label}
    compared = {name: values[1:] for name, values in compare_with_dense(records, **how).items()}
    found: dict = {"compared_frames": len(compared["streamed"]), **{name: sum(compared[name]) for name in compared}}
    held = compare_held(records, cost, **how)
    found["held_at_cost"] = held and {
        "every": held[0],
        "cost": 1 / held[0],
        "compared_frames": len(held[1]),
        "agreed": sum(held[1]),
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


def label_caption(record: FrameRecord, names: Sequence[str]) -> str:
    """The best label and its confidence, as a line of a caption."""
    place = top_label(record)
    return f"label {shortened(names[place], MOST_CHARACTERS)} {percent(record.label_logits[place].sigmoid().item())}"


def object_caption(line: dict) -> str:
    """The text at an object's box, from its `object_line`: label and confidence; empty without labels."""
    if "label" not in line:
        return ""
    return f"{shortened(line['label'], MOST_CHARACTERS // 2)} {percent(line['confidence'])}"


def top_label(record: FrameRecord) -> int:
    """The index of the best label, by logits, because two scores can both round to 1."""
    return int(record.label_logits.argmax())


def same_label(a: Tensor, b: Tensor) -> Tensor:
    """Whether the best labels of logits [..., L] are the same: bool [...]."""
    return a.argmax(-1) == b.argmax(-1)


def percent(value: float) -> str:
    """A share as a percentage, with enough digits for the small probabilities that SigLIP often gives."""
    if value < 0.0001:
        return "<0.01%"
    return f"{value:.1%}" if value >= 0.01 else f"{value:.2%}"


def shortened(text: str, most: int) -> str:
    """A text cut to `most` characters."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."
