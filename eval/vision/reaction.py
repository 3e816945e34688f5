"""
How late does a method notice? Frames from an event until the best label is the new right one, beyond dense's delay.

    python -m eval.vision.reaction --quick                      # 1,000 frames of each motion
    torchrun --nproc_per_node 2 -m eval.vision.reaction         # everything; run again to continue

Events are the frames of composed clips on which another label becomes right: a thing comes, goes, is replaced, or
another one is seen best; where nothing is seen, `nothing` is right. An event is counted if dense follows it within its
frames, and did not say the new label on the frame before; events before which, or after which, another one follows
within LEAST_FRAMES are not. A delay ends with the frames that are looked at, 40 or those until the next event, and is
*censored* then: it counts as that long, so means are lower bounds where any is. A method that said the new label
before the event, wrongly, counts as without delay, which favours what is held. Labels compete twice: the clip's own
things and `nothing`, as who watches for something would name them, and all that the checkpoint knows.

Means are over events; intervals are 95 %, from drawing clips with all their events. Baselines at a method's own cost
as in `accuracy.py`. Writes `eval/results/reaction.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from rich.table import Table
from torch.nn import functional

from eval.recordings import RecordSettings, Scene, chosen_changes
from eval.report import RESULTS, wide_console, with_interval, write_json
from eval.vision.composed_bench import CHECKPOINT
from eval.vision.equal_cost import best_baseline, families_of, statistic_interval
from eval.vision.evidence import (
    NOTHING,
    Checkpoint,
    Clips,
    DenseEvery,
    Dtype,
    Evidence,
    FewSettings,
    Folder,
    Frames,
    Methods,
    Plan,
    Quick,
    gather_evidence,
    rounded,
)

LEAST_FRAMES = 10
CHOICES = {"own": "the clip's own labels", "all": "all labels"}


@dataclass(frozen=True)
class Event:
    """
    A change of the right label.

    Attributes:
        frame: the first on which `label` is right.
        label: the new one.
        frames: how many are looked at from there on; at most 1 + `after` of the settings.
    """

    frame: int
    label: str
    frames: int


@dataclass(frozen=True)
class Delay:
    """
    What a method did after an event.

    Attributes:
        frames: until its best label was the new one, or all that were looked at.
        censored: whether it was not within those.
        already: whether it said so on the frame before.
    """

    frames: int
    censored: bool
    already: bool


def events_of(scene: Scene, labels: Sequence[str | None], settings: RecordSettings) -> list[Event]:
    """A scene's events that have LEAST_FRAMES for themselves before and after."""
    ends = [0, *scene.changes, scene.count]
    found = []
    for change in chosen_changes(scene.changes, settings.most_changes):
        place = ends.index(change, 1)
        before, after = change - ends[place - 1], ends[place + 1] - change
        if min(before, after) >= LEAST_FRAMES:
            found.append(Event(change, labels[change] or NOTHING, min(after, settings.after + 1)))
    return found


def delay_after(event: Event, said: dict[int, str]) -> Delay:
    """A method's delay, from its best label by frame."""
    already = said[event.frame - 1] == event.label
    for passed in range(event.frames):
        if said[event.frame + passed] == event.label:
            return Delay(passed, False, already)
    return Delay(event.frames, True, already)


def best_labels(evidence: Evidence, name: str, batch: int, scene: Scene, choice: str) -> dict[int, str]:
    """A method's best label on each of a scene's sampled frames."""
    recording = evidence.recording(name, batch)
    frames, embeddings = recording.of(scene.name)
    names = evidence.names
    if choice == "own":
        names = [*sorted(set(recording.labels_of(scene.name)) - {None}), NOTHING]
    texts = evidence.texts[[evidence.names.index(label) for label in names]]
    best = (functional.normalize(embeddings, dim=-1) @ texts.T).argmax(-1)
    return {frame: names[place] for frame, place in zip(frames.tolist(), best.tolist(), strict=True)}


@dataclass(frozen=True, eq=False)
class Delays:
    """
    Delays of all methods after the events that count.

    Attributes:
        scenes: of each row, those with an event.
        excess: by method [S, E] frames beyond dense's delay, NaN where a scene has fewer events.
        found: by method, of all events in order.
        left_out: how many events dense does not follow, or says before.
    """

    scenes: list[tuple[int, Scene]]
    excess: dict[str, np.ndarray]
    found: dict[str, list[Delay]]
    left_out: int


def measure_delays(evidence: Evidence, settings: RecordSettings, choice: str) -> Delays:
    """The delays of all methods, with labels that compete by `choice`, a key of CHOICES."""
    dense = next(spec.name for spec in evidence.specs if spec.kind == "dense")
    names = [spec.name for spec in evidence.specs]
    scenes, left_out = [], 0
    rows: dict[str, list[list[float]]] = {name: [] for name in names}
    found: dict[str, list[Delay]] = {name: [] for name in names}
    for batch, scene in evidence.scenes:
        events = events_of(scene, evidence.recording(dense, batch).labels_of(scene.name), settings)
        if not events:
            continue
        of_dense = [delay_after(event, best_labels(evidence, dense, batch, scene, choice)) for event in events]
        counted = [place for place, delay in enumerate(of_dense) if not (delay.censored or delay.already)]
        left_out += len(events) - len(counted)
        if not counted:
            continue
        scenes.append((batch, scene))
        for name in names:
            said = best_labels(evidence, name, batch, scene, choice)
            delays = [delay_after(events[place], said) for place in counted]
            found[name] += delays
            rows[name].append(
                [delay.frames - of_dense[place].frames for delay, place in zip(delays, counted, strict=True)]
            )
    return Delays(scenes, {name: padded(some) for name, some in rows.items()}, found, left_out)


def padded(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of different lengths as [S, E], NaN after each row's end."""
    table = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def mean_of_events(values: np.ndarray) -> np.ndarray:
    """Mean over all events of [R, S, E]: [R]."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=(1, 2)) / (~np.isnan(values)).sum((1, 2))


def sooner(values: np.ndarray) -> np.ndarray:
    """`mean_of_events` with its sign turned, so that more is better."""
    return -mean_of_events(values)


def choice_report(evidence: Evidence, settings: RecordSettings, choice: str) -> dict:
    """All figures with labels that compete by `choice`."""
    delays = measure_delays(evidence, settings, choice)
    names = [spec.name for spec in evidence.specs]
    dense = next(spec.name for spec in evidence.specs if spec.kind == "dense")
    count = len(delays.found[dense])
    report = {
        "labels": CHOICES[choice],
        "events": count,
        "scenes": len(delays.scenes),
        "left_out": delays.left_out,
        "dense_delay": float(np.mean([delay.frames for delay in delays.found[dense]])) if count else None,
        "results": [],
    }
    if not count:
        return report
    costs = {name: evidence.cost(name, evidence.scenes) for name in names}
    families = families_of(evidence.specs)
    motions = list(dict.fromkeys(scene.group for _, scene in delays.scenes))
    for spec in evidence.specs:
        excess, found = delays.excess[spec.name], delays.found[spec.name]
        row = {
            "name": spec.name,
            "family": spec.family,
            "control": spec.control,
            "cost": costs[spec.name],
            "delay": float(mean_of_events(excess[None])[0]),
            "interval": statistic_interval(excess, mean_of_events),
            "p90": float(np.nanquantile(excess, 0.9)),
            "censored": sum(delay.censored for delay in found),
            "already": sum(delay.already for delay in found),
            "motions": {
                motion: float(mean_of_events(excess[[scene.group == motion for _, scene in delays.scenes]][None])[0])
                for motion in motions
            },
        }
        if not spec.control and spec.name != dense:
            compared = best_baseline(spec.name, delays.excess, costs, families, sooner)
            row["best control"] = None if compared is None else in_frames(compared)
        report["results"].append(row)
    return report


def in_frames(compared: dict) -> dict:
    """A comparison of what is better when larger, as delays again: below zero where the method is sooner."""
    interval = compared["interval"]
    return {
        "family": compared["family"],
        "control": -compared["control"],
        "difference": -compared["difference"],
        "interval": None if interval is None else [-interval[1], -interval[0]],
    }


def table_of(report: dict) -> Table:
    """One choice's figures."""
    dense = "-" if report["dense_delay"] is None else f"{report['dense_delay']:.1f}"
    title = (
        f"{report['labels']}: delay in frames beyond dense's ({dense}), {report['events']} events in "
        f"{report['scenes']} clips; {report['left_out']} that dense does not follow left out"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("method", "cost", "delay", "p90", "never", "already", "best baseline", "difference"):
        table.add_column(heading, justify="left" if heading in ("method", "best baseline") else "right")
    for row in report["results"]:
        compared = row.get("best control")
        table.add_row(
            ("baseline: " if row["control"] else "") + row["name"],
            f"{row['cost']:.3f}",
            with_interval(row["delay"], row["interval"]),
            f"{row['p90']:.1f}",
            str(row["censored"]),
            str(row["already"]),
            "" if compared is None else f"{compared['control']:.2f} {compared['family']}",
            "" if compared is None else with_interval(compared["difference"], compared["interval"]),
        )
    return table


def main(
    quick: Quick = False,
    few_settings: FewSettings = False,
    clips: Clips = 5,
    frames: Frames = None,
    dense_every: DenseEvery = 8,
    methods: Methods = None,
    checkpoint: Checkpoint = CHECKPOINT,
    dtype: Dtype = "bfloat16",
    folder: Folder = None,
    output: Path = RESULTS / "reaction.json",
):
    """Record what is missing, compare, and write the report."""
    plan = Plan(clips, frames, dense_every, quick, methods, few_settings)
    evidence, processes = gather_evidence(plan, checkpoint, dtype, folder)
    if not processes.is_main:
        return
    reports = {choice: choice_report(evidence, plan.settings, choice) for choice in CHOICES}
    write_json(output, rounded({**evidence.about, "least_frames": LEAST_FRAMES, **reports}))
    wide_console().print(*map(table_of, reports.values()))


if __name__ == "__main__":
    typer.run(main)
