"""
How late does a method notice an event? Frames until its best label is the new right one, compared with dense.

    torchrun --nproc_per_node 2 -m eval.vision.reaction         # everything; run again to continue
    python -m eval.vision.reaction --quick                      # 1,000 frames of each motion

Events are the frames of composed clips on which the right label changes: a thing comes, goes, is replaced, or another
thing covers most pixels. If no thing is seen, `nothing` is right. The labels are the clip's own things and `nothing`.
An event is counted if dense follows it in time and did not give the new label on the frame before. Events with another
event within LEAST_FRAMES before or after them are left out. A delay is measured on the 40 frames after the event, or
until the next event. If the method has not followed by then, the delay is *censored* and counts as that long; means
with censored delays are lower bounds. A method that gave the new label before the event, wrongly, has no delay, which
favours methods that hold old outputs.

Means are over events. Intervals are 95 %, from a bootstrap over clips with all their events. Methods are compared with
baselines at their own cost as in `accuracy.py`. Writes `eval/results/reaction.json`, shown in `docs/results/delay.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import typer
from torch.nn import functional

from eval.docs.labels import reaction_table
from eval.recordings import RecordSettings, Scene, chosen_changes
from eval.report import rounded
from eval.vision.evidence import (
    NOTHING,
    Evidence,
    best_baseline,
    command,
    families_of,
    mean_of_scenes,
    statistic_interval,
)
from neuroflow_hf.evaluation.settings import DENSE

LEAST_FRAMES = 10


@dataclass(frozen=True)
class Event:
    """A change of the right label."""

    frame: int  # the first frame on which `label` is right
    label: str  # the new label
    frames: int  # number of frames compared from there on; at most 1 + `after` of the settings


@dataclass(frozen=True)
class Delay:
    """What a method did after an event."""

    frames: int  # number of frames until its best label was the new one, or of all compared frames
    censored: bool  # whether its best label was not the new one on any of these
    already: bool  # whether it gave the new label on the frame before the event


def events_of(scene: Scene, settings: RecordSettings) -> list[Event]:
    """A scene's events without another event within LEAST_FRAMES before or after."""
    ends = [0, *scene.changes, scene.count]
    found = []
    for change in chosen_changes(scene, settings):
        place = ends.index(change, 1)
        before, after = change - ends[place - 1], ends[place + 1] - change
        if min(before, after) >= LEAST_FRAMES:
            found.append(Event(change, scene.labels[change] or NOTHING, min(after, settings.after + 1)))
    return found


def delay_after(event: Event, said: dict[int, str]) -> Delay:
    """A method's delay, from its best label by frame."""
    already = said[event.frame - 1] == event.label
    for passed in range(event.frames):
        if said[event.frame + passed] == event.label:
            return Delay(passed, False, already)
    return Delay(event.frames, True, already)


def best_labels(evidence: Evidence, name: str, scene: Scene) -> dict[int, str]:
    """A method's best label on each sampled frame of a scene, among the scene's own labels and `nothing`."""
    recording = evidence.recordings[name][scene.name]
    names = [*sorted(set(scene.labels) - {None}), NOTHING]
    texts = evidence.texts[[evidence.names.index(label) for label in names]]
    best = (functional.normalize(recording.embeddings, dim=-1) @ texts.T).argmax(-1)
    return {frame: names[place] for frame, place in zip(recording.frames.tolist(), best.tolist(), strict=True)}


def measure_delays(evidence: Evidence) -> tuple[dict[str, list[list[Delay]]], int]:
    """
    By method, the delays after the counted events, for each scene that has any; and the number of events left out
    because dense does not follow them or gave the new label before.
    """
    found: dict[str, list[list[Delay]]] = {name: [] for name in evidence.recordings}
    left_out = 0
    for scene in evidence.scenes:
        events, said = events_of(scene, evidence.settings), best_labels(evidence, DENSE.name, scene)
        of_dense = [delay_after(event, said) for event in events]
        counted = [event for event, own in zip(events, of_dense, strict=True) if not (own.censored or own.already)]
        left_out += len(events) - len(counted)
        for name in found if counted else ():
            said = best_labels(evidence, name, scene)
            found[name].append([delay_after(event, said) for event in counted])
    return found, left_out


def padded(rows: Sequence[Sequence[Delay]]) -> np.ndarray:
    """Frames of delays in rows of different lengths, as an array [S, E] padded with NaN."""
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = [delay.frames for delay in row]
    return table


def sooner(values: np.ndarray) -> np.ndarray:
    """The negative mean, so that larger is better."""
    return -mean_of_scenes(values)


def reaction_report(evidence: Evidence) -> dict:
    """All figures."""
    delays, left_out = measure_delays(evidence)
    of_dense = [delay.frames for row in delays[DENSE.name] for delay in row]
    own = {
        "events": len(of_dense),
        "scenes": len(delays[DENSE.name]),
        "left_out": left_out,
        "dense_delay": float(np.mean(of_dense)) if of_dense else None,
        "results": [],
    }
    # by method [S, E], frames beyond dense's delay, NaN where a scene has fewer events
    excesses = {name: padded(rows) - padded(delays[DENSE.name]) for name, rows in delays.items()}
    costs, families = evidence.costs(range(len(evidence.scenes))), families_of(evidence.specs)
    for spec in evidence.specs if of_dense else ():
        excess, found = excesses[spec.name], [delay for row in delays[spec.name] for delay in row]
        row = {
            "name": spec.name,
            "family": spec.family,
            "control": spec.control,
            "cost": costs[spec.name],
            "delay": mean_of_scenes(excess[None]).item(),
            "interval": statistic_interval(excess, mean_of_scenes),
            "censored": sum(delay.censored for delay in found),
        }
        if not spec.control and spec != DENSE:
            compared = best_baseline(spec.name, excesses, costs, families, sooner)
            row["best control"] = None if compared is None else in_frames(compared)
        own["results"].append(row)
    return rounded({**evidence.about, "least_frames": LEAST_FRAMES, "own": own})


def in_frames(compared: dict) -> dict:
    """A comparison of negative delays as delays: the difference is below zero if the method is sooner."""
    interval = compared["interval"]
    return {
        "family": compared["family"],
        "control": -compared["control"],
        "difference": -compared["difference"],
        "interval": None if interval is None else [-interval[1], -interval[0]],
    }


main = command(reaction_report, reaction_table, "reaction")

if __name__ == "__main__":
    typer.run(main)
