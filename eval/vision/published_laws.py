"""
Which of the paper's observations hold on the embedded checkpoint, on composed clips of which everything is known.

    python -m eval.vision.published_laws --quick
    python -m eval.vision.published_laws
    torchrun --nproc_per_node 2 -m eval.vision.published_laws    # over two processes

Six observations about the published dual memory, mode `reconstruct` with a running mean of rate 0.01 as the gate's
reference: accuracy hardly depends on the skip rate; it is lost where things travel; the pooling head's entropy tells
of the loss; inactive patches' features are stable; shifted active patches cost more than stale inactive ones; the
running mean keeps ghosts. A rule decides each, from figures with 95 % intervals of a bootstrap over clips, beside a
baseline. It holds or does not hold only if an interval says so. Results that were measured before are reused. Writes
`eval/results/published_laws.json` and `docs/laws.png`. T frames, N patches.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from eval.language.findings import finding
from eval.report import RESULTS, tidy, wide_console, write_figure, write_whole
from eval.vision.clip_statistics import Estimate, correlation, difference, estimate, mean, rounded, share, shown
from eval.vision.composed_bench import (
    CHECKPOINT,
    Bench,
    Clip,
    Figures,
    Measured,
    dense_outputs,
    label_places,
    measure_suite,
)
from eval.vision.composed_clips import LEAST_VISIBLE, Actor, ClipSpec, Truth, path_offset, view
from neuroflow_hf.evaluation.equal_cost import shares_at
from neuroflow_hf.utils.files import report_text
from neuroflow_hf.vision.patches import project_patches
from neuroflow_hf.vision.selection import surprise

EMA = {"mode": "reconstruct", "reference": "ema", "ema_rate": 0.01}
LAST_UPDATE = {"mode": "reconstruct", "reference": "last_update"}
THRESHOLDS = (0.0003, 0.003, 0.01, 0.1, 0.4)
LAST_UPDATE_THRESHOLDS = (0.0, 0.0003, 0.01, 0.1)
THRESHOLD = 0.01
MEMORY = f"ema {THRESHOLD:g}"
SETTINGS = {
    **{f"ema {threshold:g}": {**EMA, "threshold": threshold} for threshold in THRESHOLDS},
    **{f"last_update {level:g}": {**LAST_UPDATE, "threshold": level} for level in LAST_UPDATE_THRESHOLDS},
    "eliminate": {**EMA, "mode": "eliminate", "threshold": THRESHOLD},
    "context": {**EMA, "mode": "context", "threshold": THRESHOLD},
}
DISTANCES = (1, 2, 4, 8, 16)
GROUPS = ("active", "stored sparse", "stored dense")
SWAPS = (*GROUPS, "all stored", "random as many as active")


TRAVELLING = ("crossing", "arc", "oscillating")
STAYING = ("still", "local")
PUBLISHED_SKIPS = (0.555, 0.663, 0.84)
PUBLISHED_TOP1 = (0.6960, 0.7045, 0.7155)
LEVEL_TOP1, LEVEL_COSINE, LEVEL_STABILITY = 0.03, 0.01, 0.05
PUBLISHED_STABILITY = {"inactive": 0.83, "active": 0.41}
PUBLISHED_SHIFT = 0.73
FIRST_REPEATED = "control: first frame repeated"  # a key of the stored report
COLOURS = {"holds": "green", "does not hold": "red"}

# --- measuring a clip ------------------------------------------------------------------------------------------------


def measure_laws(bench: Bench, clip: Clip) -> Figures:
    """
    All of a clip that a law is decided by.

    Returns:
        `label` int [T], `gone` bool [T], `travelled` [T], as of the functions of these names; `dense pooled` [T, D],
        `dense place` int [T], `dense entropy` [T]; of each setting S `S: skip`, `S: cost`, `S: cosine`, `S: place`,
        `S: entropy` and `S: tokens` [T] (the patches that the head sees); of MEMORY also `swap: gain` [T, 5] and
        `swap: shift` [T, 3], as of `swapped`; `stability` [1 + distances, 4], as of `stability_by_distance`, the first
        row with the gate's own active set between neighbouring frames; `floor` [T], cosine of two patches of a frame.
    """
    model, labels = bench.model, bench.labels
    head = model.vision_model.head
    pooled, patches = dense_outputs(model, clip.pixels)
    figures: Figures = {
        "label": label_places(clip, bench.things),
        "gone": gone(clip.truths),
        "travelled": np.array([travelled(clip.spec, number) for number in range(clip.spec.frames)]),
        "dense pooled": pooled.cpu().numpy(),
        "dense place": labels.logits(pooled).argmax(-1).cpu().numpy(),
        "dense entropy": torch.cat([head_entropy(head, part) for part in patches.split(16)]).cpu().numpy(),
    }
    for name, options in SETTINGS.items():
        rows, masks = measure_setting(bench, clip, options, pooled, patches, with_swaps=name == MEMORY)
        figures |= {part if part.startswith("swap") else f"{name}: {part}": value for part, value in rows.items()}
        if name == MEMORY:
            own = stability(patches[1:], patches[:-1], masks[1:])
    signals = torch.cat([project_patches(model.vision_model, part, as_product=True) for part in clip.pixels.split(8)])
    figures["stability"] = np.stack([own, *stability_by_distance(patches, signals)])
    figures["floor"] = (
        torch.cosine_similarity(patches, patches.roll(patches.shape[1] // 2, 1), dim=-1).mean(-1).cpu().numpy()
    )
    return figures


def measure_setting(
    bench: Bench, clip: Clip, options: dict, pooled: Tensor, patches: Tensor, with_swaps: bool
) -> tuple[Figures, Tensor]:
    """
    A clip through one stream, beside the dense `pooled` [T, D] and `patches` [T, N, D].

    Returns:
        Figures of each frame, as in `measure_laws`; and the active masks bool [T, N].
    """
    model, labels = bench.model, bench.labels
    head, stream = model.vision_model.head, model.new_stream(**options)
    rows: dict[str, list] = {name: [] for name in ("skip", "cost", "cosine", "place", "entropy", "tokens")}
    gains, shifts, masks = [], [], []
    encoded_alone = torch.zeros(patches.shape[1], dtype=torch.bool, device=patches.device)
    for number, frame in enumerate(clip.pixels.split(1)):
        output = model.get_image_features(frame, stream=stream)
        hidden = output.last_hidden_state
        mask = output.active_mask[0].flatten()
        rows["skip"].append(output.skip_rate.item())
        rows["cost"].append(output.cost.item())
        rows["cosine"].append(torch.cosine_similarity(output.pooler_output[0], pooled[number], dim=-1).item())
        rows["place"].append(labels.logits(output.pooler_output[0]).argmax().item())
        rows["entropy"].append(head_entropy(head, hidden).item() if hidden.shape[1] else np.nan)
        rows["tokens"].append(hidden.shape[1])
        masks.append(mask)
        if with_swaps:
            if number:
                encoded_alone |= mask
            generator = torch.Generator().manual_seed(number)
            gain, shift = swapped(head, hidden[0], patches[number], mask, encoded_alone, generator)
            gains.append(gain)
            shifts.append(shift)
    figures = {name: np.array(values) for name, values in rows.items()}
    if with_swaps:
        figures |= {"swap: gain": np.array(gains), "swap: shift": np.array(shifts)}
    return figures, torch.stack(masks)


def head_entropy(head: nn.Module, hidden: Tensor) -> Tensor:
    """Entropy in nats of the pooling head's attention over the patches [B, N, D], mean over heads: [B]."""
    probe = head.probe.expand(len(hidden), -1, -1)
    weights = head.attention(probe, hidden, hidden, need_weights=True, average_attn_weights=False)[1][:, :, 0]
    return torch.special.entr(weights.float()).sum(-1).mean(-1)


def swapped(
    head: nn.Module, hidden: Tensor, dense: Tensor, active: Tensor, encoded_alone: Tensor, generator: torch.Generator
) -> tuple[list[float], list[float]]:
    """
    By how much the pooled cosine to dense grows if one group of patches is replaced by dense's, and how far each
    group's patches are from dense's.

    Args:
        hidden, dense: [N, D], what the head sees, and the dense frame's.
        active: bool [N], encoded on this frame, without their surroundings.
        encoded_alone: bool [N], encoded since the first frame, on this one or an earlier one.
        generator: of the random patches.

    Returns:
        Gains of SWAPS, and mean `1 - cos` of GROUPS; NaN for a group without patches.
    """
    some = torch.zeros_like(active)
    some[torch.randperm(len(active), generator=generator)[: int(active.sum())]] = True
    groups = [active, encoded_alone & ~active, ~encoded_alone & ~active, ~active, some]
    variants = [torch.where(group.unsqueeze(1), dense, hidden) for group in groups]
    pooled = head(torch.stack([dense, hidden, *variants]))
    cosines = torch.cosine_similarity(pooled[1:], pooled[:1], dim=-1)
    present = [bool(group.any()) for group in groups]
    gains = [
        gain if there else np.nan for gain, there in zip((cosines[1:] - cosines[0]).tolist(), present, strict=True)
    ]
    distances = 1 - torch.cosine_similarity(hidden, dense, dim=-1)
    shifts = [
        distances[group].mean().item() if there else np.nan
        for group, there in zip(groups[: len(GROUPS)], present, strict=False)
    ]
    return gains, shifts


def stability(now: Tensor, before: Tensor, active: Tensor) -> np.ndarray:
    """
    Cosines of patches [T, N, D] at two times, apart for active ones bool [T, N] and the others.

    Returns:
        Sum and number of the inactive, sum and number of the active: [4].
    """
    cosines = torch.cosine_similarity(now, before, dim=-1)
    parts = [(cosines[mask].sum().item(), int(mask.sum())) for mask in (~active, active)]
    return np.array([*parts[0], *parts[1]], dtype=np.float64)


def stability_by_distance(patches: Tensor, signals: Tensor) -> list[np.ndarray]:
    """`stability` of features [T, N, D] for each of DISTANCES; active is whose signal [T, N, F] changed meanwhile."""
    rows = []
    for distance in DISTANCES:
        if distance >= len(patches):
            rows.append(np.zeros(4))
            continue
        changed = surprise(signals[distance:], signals[:-distance]) > THRESHOLD
        rows.append(stability(patches[distance:], patches[:-distance], changed))
    return rows


def gone(truths: tuple[Truth, ...]) -> np.ndarray:
    """On which frames a thing is nowhere in the picture that was seen in it before, bool [T]."""
    visible = np.array([truth.visible for truth in truths])
    seen_before = np.maximum.accumulate(visible >= LEAST_VISIBLE, axis=0)
    return (seen_before & (visible == 0)).any(axis=1)


def travelled(spec: ClipSpec, number: int) -> float:
    """How far things are from where they were on the first frame, mean over things, in shares of the picture."""
    distances = [
        np.hypot(*np.subtract(centre(spec, actor, number), centre(spec, actor, 0))) / spec.side
        for actor in spec.actors
    ]
    return float(np.mean(distances))


def centre(spec: ClipSpec, actor: Actor, number: int) -> tuple[float, float]:
    """Row and column of a thing's middle in the picture, also outside of it."""
    offsets, first, now = path_offset(actor, number), view(spec, 0), view(spec, number)
    row, column = (
        middle + reach * offset + start - at
        for middle, reach, offset, start, at in zip(actor.centre, actor.reach, offsets, first, now, strict=True)
    )
    return row, column


# --- figures of a clip, after the first frame, which is dense in every method ----------------------------------------


def right(figures: Figures, setting: str) -> np.ndarray:
    """Whether the best label is the right one, on the frames on which something is seen; `setting` may be dense."""
    place = figures["dense place" if setting == "dense" else f"{setting}: place"]
    return is_right(figures, place[1:])


def right_of_first(figures: Figures) -> np.ndarray:
    """As `right`, for the first frame's dense label repeated."""
    return is_right(figures, figures["dense place"][0])


def is_right(figures: Figures, places: np.ndarray) -> np.ndarray:
    """Whether labels are the right ones, on the frames that have one."""
    label = figures["label"][1:]
    return (places == label)[label >= 0].astype(float)


def loss(figures: Figures, setting: str) -> np.ndarray:
    """`1 - cos` to dense."""
    return 1 - figures[f"{setting}: cosine"][1:]


def loss_of_first(figures: Figures) -> np.ndarray:
    """As `loss`, for the first frame's dense embedding repeated."""
    return 1 - cosine_rows(figures["dense pooled"], figures["dense pooled"][:1])[1:]


def loss_held(figures: Figures, cost: float) -> np.ndarray:
    """As `loss`, for dense every k frames, held between, at this cost: a mixture of the two nearest k."""
    every = range(1000, 0, -1)
    shares = shares_at([1 / k for k in every], cost)
    return sum(share * loss_every(figures, every[place]) for share, place in shares if share)


def loss_every(figures: Figures, every: int) -> np.ndarray:
    """As `loss`, for dense every so many frames, held between; mean over phases."""
    pooled = figures["dense pooled"]
    index = np.arange(len(pooled))
    keyframes = (index - np.arange(every)[:, None]) % every == 0
    held = np.maximum.accumulate(np.where(keyframes, index, 0), axis=1)
    return np.mean([1 - cosine_rows(pooled, pooled[run]) for run in held], axis=0)[1:]


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of rows [T, D], or of one row with all: [T]."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def gain(figures: Figures, name: str) -> np.ndarray:
    """Gains of one of SWAPS; 0 where the group has no patches."""
    return np.nan_to_num(figures["swap: gain"][1:, SWAPS.index(name)])


def entropy_change(figures: Figures, setting: str) -> np.ndarray:
    """The head's entropy less dense's on the same frame."""
    return (figures[f"{setting}: entropy"] - figures["dense entropy"])[1:]


def over_clips(measured: Measured, name: str) -> float:
    """Mean of one figure over all frames of all clips but the first ones, such as `"context: cost"`."""
    return float(np.concatenate([figures[name][1:] for _, figures in measured]).mean())


# --- tables ----------------------------------------------------------------------------------------------------------


def settings_table(measured: Measured) -> dict[str, dict]:
    """Each setting over all clips, beside dense and the first frame repeated."""
    every = [figures for _, figures in measured]
    table = {
        "dense": {"skip": 0.0, "cost": 1.0, "top1": rounded(mean([right(one, "dense") for one in every]))},
        FIRST_REPEATED: {
            "skip": 1.0,
            "cost": 0.0,
            "loss": rounded(mean([loss_of_first(one) for one in every])),
            "top1": rounded(mean([right_of_first(one) for one in every])),
        },
    }
    for setting in SETTINGS:
        cost = over_clips(measured, f"{setting}: cost")
        table[setting] = {
            "skip": over_clips(measured, f"{setting}: skip"),
            "cost": cost,
            "loss": rounded(mean([loss(one, setting) for one in every])),
            "loss of dense held at that cost": rounded(mean([loss_held(one, cost) for one in every])),
            "top1": rounded(mean([right(one, setting) for one in every])),
            "top1 less dense's": rounded(mean([right(one, setting) - right(one, "dense") for one in every])),
            "entropy less dense's": rounded(mean([entropy_change(one, setting) for one in every])),
        }
    return table


def motions_table(measured: Measured) -> dict[str, dict]:
    """The published method by motion, beside the first frame repeated."""
    table = {}
    for motion in dict.fromkeys(name.motion for name, _ in measured):
        some = [(name, figures) for name, figures in measured if name.motion == motion]
        every = [figures for _, figures in some]
        table[motion] = {
            "clips": len(every),
            "travelled": over_clips(some, "travelled"),
            "skip": over_clips(some, f"{MEMORY}: skip"),
            "loss": rounded(mean([loss(one, MEMORY) for one in every])),
            "loss of first frame repeated": rounded(mean([loss_of_first(one) for one in every])),
            "top1, dense": rounded(mean([right(one, "dense") for one in every])),
            "top1": rounded(mean([right(one, MEMORY) for one in every])),
            "entropy less dense's": rounded(mean([entropy_change(one, MEMORY) for one in every])),
        }
    return table


def stability_table(measured: Measured) -> dict[str, dict]:
    """Cosines of the last layer's features between frames, by what says a patch is active and by distance."""
    rows = ["gate, 1", *(f"change, {distance}" for distance in DISTANCES)]
    table: dict[str, dict] = {
        row: {kind: rounded(stability_of(measured, place, kind)) for kind in PUBLISHED_STABILITY}
        for place, row in enumerate(rows)
    }
    table["control: another patch of the same frame"] = {"all": rounded(mean([one["floor"] for _, one in measured]))}
    return table


def stability_of(measured: Measured, row: int, kind: str) -> Estimate:
    """Mean cosine of `inactive` or `active` patches."""
    first = 0 if kind == "inactive" else 2
    rows = [tuple(figures["stability"][row, first : first + 2]) for _, figures in measured]
    return estimate([row for row in rows if row[1]], lambda total: total[:, 0] / total[:, 1])


def swaps_table(measured: Measured) -> dict[str, dict]:
    """By how much the pooled cosine grows with one group of patches dense, and how far these are from dense's."""
    every = [figures for _, figures in measured]
    table = {name: {"gain": rounded(mean([gain(one, name) for one in every]))} for name in SWAPS}
    for place, name in enumerate(GROUPS):
        table[name]["patches' 1 - cos"] = rounded(mean([one["swap: shift"][1:, place] for one in every]))
    context = [loss(one, MEMORY) - loss(one, "context") for one in every]
    table["everything"] = {"gain": rounded(mean([loss(one, MEMORY) for one in every]))}
    table["control: active patches encoded in context"] = {"gain": rounded(mean(context))}
    return table


# --- laws ------------------------------------------------------------------------------------------------------------


def clear_of(found: Estimate, level: float = 0.0) -> tuple[bool, bool]:
    """Whether the interval lies above a level, and whether below."""
    return found.known and found.low > level, found.known and found.high < level


def within(found: Estimate, middle: float, reach: float) -> tuple[bool, bool]:
    """Whether the interval lies within a reach of a value, and whether beside that on one side."""
    low, high = middle - reach, middle + reach
    inside = found.known and low <= found.low and found.high <= high
    return inside, found.known and (found.high < low or found.low > high)


def law(claim: str, rule: str, measured: str, decided: tuple[bool, bool], baseline: str) -> dict:
    """A law with its verdict and what the baseline gives; `decided` is whether it holds, and whether it fails."""
    return {**finding(claim, rule, measured, *decided), "control": baseline}


def findings(measured: Measured) -> list[dict]:
    """All laws that these clips can speak of."""
    laws = (
        saturation, displacement, entropy_follows_loss, inactive_patches_are_stable, shift_costs_more, ghosts_cost,
    )  # fmt: skip
    return [found for each in laws for found in each(measured)]


def saturation(measured: Measured) -> list[dict]:
    """Whether accuracy and fidelity hardly depend on how much is skipped."""
    every = [figures for _, figures in measured]
    skips = {f"ema {threshold:g}": over_clips(measured, f"ema {threshold:g}: skip") for threshold in THRESHOLDS}
    least, most = (
        min(skips, key=lambda setting: abs(skips[setting] - published))
        for published in (PUBLISHED_SKIPS[0], PUBLISHED_SKIPS[-1])
    )
    apart = "cannot be told of one setting"
    top1 = mean([right(one, most) - right(one, least) for one in every])
    fidelity = mean([loss(one, most) - loss(one, least) for one in every])
    first = mean([right_of_first(one) - right(one, most) for one in every])
    where = f"{least}: {skips[least]:.1%} skipped, {most}: {skips[most]:.1%}"
    baseline = f"first frame repeated, 100% skipped: {shown(first, '{:+.2f}', 100)} points to {most}"
    return [
        law(
            "accuracy hardly depends on the skip rate (69.6 / 70.45 / 71.55% at 55.5 / 66.3 / 84.0% skip)",
            f"holds if the interval of the difference lies within {LEVEL_TOP1:.0%}, not if beside it; {apart}",
            f"{shown(top1, '{:+.2f}', 100)} points of top-1 ({where})",
            (False, False) if least == most else within(top1, 0, LEVEL_TOP1),
            baseline,
        ),
        law(
            "fidelity hardly depends on the skip rate",
            f"holds if the interval of the difference of `1 - cos` lies within {LEVEL_COSINE}, not if beside; {apart}",
            f"{shown(fidelity, '{:+.4f}')} ({where})",
            (False, False) if least == most else within(fidelity, 0, LEVEL_COSINE),
            baseline,
        ),
    ]


def displacement(measured: Measured) -> list[dict]:
    """Whether the published method loses most where things travel."""
    travelling = [figures for name, figures in measured if name.motion in TRAVELLING]
    staying = [figures for name, figures in measured if name.motion in STAYING]
    if not travelling or not staying:
        return []
    moved = [figures for name, figures in measured if name.motion in (*TRAVELLING, *STAYING)]

    def apart(of) -> Estimate:
        return difference([*map(of, travelling)], [*map(of, staying)])

    def along(of) -> Estimate:
        return correlation([one["travelled"][1:] for one in moved], [of(one) for one in moved])

    def loss_of_memory(figures):
        return loss(figures, MEMORY)

    points = apart(lambda one: right(one, "dense") - right(one, MEMORY))
    points_first = apart(lambda one: right(one, "dense") - right_of_first(one))
    error, error_first = apart(loss_of_memory), apart(loss_of_first)
    rank, rank_first = along(loss_of_memory), along(loss_of_first)
    groups = f"{', '.join(TRAVELLING)} to {', '.join(STAYING)}"
    rule = "holds if the interval is above 0, does not hold if it is below"
    return [
        law(
            "accuracy is lost where things travel across the frame (published: 29 to 43 points)",
            rule,
            f"{shown(points, '{:+.1f}', 100)} points more lost ({groups})",
            clear_of(points),
            f"first frame repeated: {shown(points_first, '{:+.1f}', 100)} points",
        ),
        law(
            "fidelity is lost where things travel across the frame",
            rule,
            f"{shown(error, '{:+.4f}')} of `1 - cos` ({groups})",
            clear_of(error),
            f"first frame repeated: {shown(error_first, '{:+.4f}')}",
        ),
        law(
            "the further a thing is from where it was, the more is lost",
            rule,
            f"rank correlation of distance and `1 - cos` {shown(rank, '{:+.2f}')}",
            clear_of(rank),
            f"first frame repeated: {shown(rank_first, '{:+.2f}')}",
        ),
    ]


def entropy_follows_loss(measured: Measured) -> list[dict]:
    """Whether the pooling head's attention tells of what is lost."""
    every, found = [figures for _, figures in measured], []
    for setting in (MEMORY, "eliminate"):
        changes, losses = [entropy_change(one, setting) for one in every], [loss(one, setting) for one in every]
        along = correlation([np.abs(change) for change in changes], losses)
        of_share = correlation([1 - one[f"{setting}: skip"][1:] for one in every], losses)
        found.append(
            law(
                f"the more the pooling head's entropy differs from dense's, the more is lost ({setting})",
                "holds if the interval of the rank correlation over frames is above 0, does not hold if below",
                f"{shown(along, '{:+.2f}')}; entropy {shown(mean(changes), '{:+.3f}')} nats to dense's",
                clear_of(along),
                f"correlation of loss with the share of active patches: {shown(of_share, '{:+.2f}')}",
            )
        )
    return found


def inactive_patches_are_stable(measured: Measured) -> list[dict]:
    """Whether the last layer's features stay where the gate sees no change."""
    floor = mean([one["floor"] for _, one in measured])
    rows = [tuple(one["stability"][0]) for _, one in measured if one["stability"][0][1] and one["stability"][0][3]]
    apart = estimate(rows, lambda total: total[:, 0] / total[:, 1] - total[:, 2] / total[:, 3])
    far = stability_of(measured, len(DISTANCES), "inactive")
    baseline = (
        f"inactive over {DISTANCES[-1]} frames: {shown(far, '{:.3f}')}; "
        f"another patch of the same frame: {shown(floor, '{:.3f}')}"
    )
    found = [
        law(
            "the last layer changes less in inactive patches than in active ones",
            "holds if the interval of the difference of cosines between neighbouring frames is above 0",
            shown(apart, "{:+.3f}"),
            clear_of(apart),
            baseline,
        )
    ]
    for kind, published in PUBLISHED_STABILITY.items():
        value = stability_of(measured, 0, kind)
        found.append(
            law(
                f"{kind} patches' cosine between frames is {published}",
                f"holds if the interval lies within {LEVEL_STABILITY} of it, does not hold if beside that",
                shown(value, "{:.3f}"),
                within(value, published, LEVEL_STABILITY),
                baseline,
            )
        )
    return found


def shift_costs_more(measured: Measured) -> list[dict]:
    """Whether encoding active patches without their surroundings costs more than that inactive ones are stale."""
    every = [figures for _, figures in measured]
    of_active, of_stored = ([gain(one, name) for one in every] for name in ("active", "all stored"))
    both = share(of_active, of_stored)
    alone = [gain(one, "active") + gain(one, "stored sparse") for one in every]
    with_echo = share(alone, [gain(one, "stored dense") for one in every])
    random = mean([gain(one, "random as many as active") for one in every])
    said = (
        f"{shown(both, '{:.0%}')} of the gain by swapping either for dense's; with what was encoded so on earlier "
        f"frames {shown(with_echo, '{:.0%}')}"
    )
    baseline = f"gain by active patches {shown(mean(of_active))}, by as many random ones {shown(random)}"
    return [
        law(
            "the shift of active patches costs more than the staleness of inactive ones",
            "holds if the interval of the shift's share is above one half, does not hold if below",
            said,
            clear_of(both, 0.5),
            baseline,
        ),
        law(
            f"the shift of active patches is {PUBLISHED_SHIFT:.0%} of the gap",
            "holds if the interval of its share lies within 10 points of that, does not hold if beside them",
            said,
            within(both, PUBLISHED_SHIFT, 0.1),
            baseline,
        ),
    ]


def ghosts_cost(measured: Measured) -> list[dict]:
    """Whether the running mean leaves ghosts that a reference without a past would not, at the same cost."""
    left = [(name, figures) for name, figures in measured if figures["gone"][1:].any()]
    if not left:
        return []
    mixed, weights, costs = equal_cost(left)
    every = [figures for _, figures in left]

    def agree(figures, setting):
        return (figures[f"{setting}: place"] == figures["dense place"])[1:].astype(float)

    def cosine(figures, setting):
        return figures[f"{setting}: cosine"][1:]

    def gained(part, is_gone: bool) -> Estimate:
        values = []
        for one in every:
            mixture = sum(weight * part(one, setting) for setting, weight in zip(mixed, weights, strict=True))
            values.append((mixture - part(one, MEMORY))[one["gone"][1:] == is_gone])
        return mean(values)

    where = (
        f"{len(left)} clips, {sum(int(one['gone'][1:].sum()) for one in every)} frames; {' and '.join(mixed)} at cost "
        f"{costs[1]:.3f}, {MEMORY} at {costs[0]:.3f}"
    )
    rule = "holds if the interval of what `last_update` gains is above 0, does not hold if it is below"
    fidelity, labels = gained(cosine, True), gained(agree, True)
    return [
        law(
            "a running mean keeps ghosts of what has left: fidelity",
            rule,
            f"{shown(fidelity, '{:+.4f}')} of cosine ({where})",
            clear_of(fidelity),
            f"on the other frames of these clips: {shown(gained(cosine, False), '{:+.4f}')}",
        ),
        law(
            "a running mean keeps ghosts of what has left: labels",
            rule,
            f"{shown(labels, '{:+.1f}', 100)} points of agreement with dense ({where})",
            clear_of(labels),
            f"on the other frames of these clips: {shown(gained(agree, False), '{:+.1f}', 100)} points",
        ),
    ]


def equal_cost(measured: Measured) -> tuple[list[str], list[float], tuple[float, float]]:
    """
    The `last_update` settings whose mixture costs what MEMORY costs: their names, weights, and both costs. If all cost
    less, the dearest; if all cost more, the cheapest.
    """
    target = over_clips(measured, f"{MEMORY}: cost")
    settings = [f"last_update {level:g}" for level in LAST_UPDATE_THRESHOLDS]
    costs = [over_clips(measured, f"{setting}: cost") for setting in settings]
    shares, places = zip(*shares_at(costs, target), strict=True)
    reached = target if len(places) == 2 else costs[places[0]]
    return [settings[place] for place in places], list(shares), (target, reached)


# --- showing ---------------------------------------------------------------------------------------------------------


def plot_laws(report: dict, measured: Measured) -> Figure:
    """Top-1 over skip rate, loss by motion, stability by distance, what each group of patches costs."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    settings = report["settings"]
    names = [f"ema {threshold:g}" for threshold in THRESHOLDS]
    skips = [settings[name]["skip"] for name in names]
    draw_estimates(top_left, skips, [settings[name]["top1"] for name in names], "#d97706", "dual memory, running mean")
    top_left.plot(PUBLISHED_SKIPS, PUBLISHED_TOP1, "o--", color="#9ca3af", label="published (UCF-101)")
    for name, colour in (("dense", "#111827"), (FIRST_REPEATED, "#2563eb")):
        top_left.axhline(
            settings[name]["top1"]["value"], color=colour, linewidth=1, label=name.replace("control", "baseline")
        )
    top_left.set_title("Zero-shot top-1 by skip rate", loc="left", fontsize=11)
    top_left.set_xlabel("share of patches skipped")
    top_left.legend(frameon=False, fontsize=9)

    motions = sorted(report["motions"], key=lambda motion: report["motions"][motion]["loss"]["value"])
    for offset, part, colour in ((0.15, loss, "#d97706"), (-0.15, None, "#2563eb")):
        for place, motion in enumerate(motions):
            clips = [figures for name, figures in measured if name.motion == motion]
            values = [(loss(one, MEMORY) if part is not None else loss_of_first(one)).mean() for one in clips]
            top_right.plot(values, [place + offset] * len(values), "o", color=colour, markersize=4, alpha=0.7)
    top_right.set_yticks(range(len(motions)), motions, fontsize=9)
    top_right.set_title("1 - cosine to dense by motion (blue: first frame repeated)", loc="left", fontsize=11)
    top_right.set_xscale("symlog", linthresh=1e-3)

    stable = report["stability"]
    rows = [f"change, {distance}" for distance in DISTANCES]
    for kind, colour in (("inactive", "#0d9488"), ("active", "#dc2626")):
        pairs = [(d, stable[row][kind]) for d, row in zip(DISTANCES, rows, strict=True) if stable[row][kind]["clips"]]
        draw_estimates(bottom_left, [d for d, _ in pairs], [found for _, found in pairs], colour, kind)
    floor = stable["control: another patch of the same frame"]["all"]["value"]
    bottom_left.axhline(floor, color="#9ca3af", linewidth=1, label="another patch of the same frame")
    bottom_left.set_xscale("log", base=2)
    bottom_left.set_xlabel("distance in frames")
    bottom_left.set_title("Last layer: a patch's cosine between two frames", loc="left", fontsize=11)
    bottom_left.legend(frameon=False, fontsize=9)

    swaps = {name: row["gain"] for name, row in report["swaps"].items()}
    for place, found in enumerate(swaps.values()):
        bottom_right.plot(found["interval"] or [found["value"]] * 2, [place] * 2, color="#7c3aed", linewidth=2)
        bottom_right.plot(found["value"], place, "o", color="#7c3aed")
    bottom_right.set_yticks(range(len(swaps)), list(swaps), fontsize=9)
    bottom_right.set_title("Gain in cosine with these patches dense", loc="left", fontsize=11)
    for panel in (top_left, top_right, bottom_left, bottom_right):
        tidy(panel)
    return figure


def draw_estimates(panel, places: list[float], found: list[dict], colour: str, label: str):
    """Values with their intervals, joined by a line."""
    panel.plot(places, [one["value"] for one in found], "o-", color=colour, label=label)
    for place, one in zip(places, found, strict=True):
        if one["interval"]:
            panel.plot([place, place], one["interval"], color=colour, linewidth=1)


def findings_table(found: list[dict]) -> Table:
    """The laws with what was measured, the baseline and the verdict."""
    table = Table("observation", "measured", "baseline", "verdict", title_justify="left", show_lines=True)
    for one in found:
        table.add_row(one["claim"], one["measured"], one["control"], one["verdict"], style=COLOURS.get(one["verdict"]))
    return table


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = CHECKPOINT,
    quick: Annotated[bool, typer.Option(help="Use one clip of 24 frames of each motion.")] = False,
    clips: Annotated[int, typer.Option(help="Clips of each motion.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Frames of each clip.", min=16)] = 48,
    seed: Annotated[int, typer.Option(help="Random seed of the clips.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Ignore stored measurements.")] = False,
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "published_laws.json",
    plot: Annotated[Path, typer.Option(help="Write this picture.")] = RESULTS.parents[1] / "docs" / "laws.png",
):
    """Measure what is missing, decide, and write the report and the picture."""
    if quick:
        clips, frames = 1, 24
    found = measure_suite(checkpoint, clips, frames, seed, measure_laws, {"settings": SETTINGS}, fresh)
    if found is None:
        return
    bench, measured, about = found
    report = {
        **about,
        "labels": len(bench.things),
        "options": SETTINGS,
        "published_method": MEMORY,
        "settings": settings_table(measured),
        "motions": motions_table(measured),
        "stability": stability_table(measured),
        "swaps": swaps_table(measured),
        "frames_after_something_left": int(sum(one["gone"][1:].sum() for _, one in measured)),
        "findings": findings(measured),
    }
    write_whole(output, report_text(report))
    write_figure(plot, plot_laws(report, measured), dpi=110)
    wide_console().print(findings_table(report["findings"]))


if __name__ == "__main__":
    typer.run(main)
