"""
Which of the paper's observations hold for the embedded checkpoint, on composed clips?

    torchrun --nproc_per_node 2 -m eval.vision.published_laws
    python -m eval.vision.published_laws --clips 2 --frames 32
    python -m eval.vision.published_laws --quick

Six observations concern the published dual memory: mode `reconstruct` with a running mean of rate 0.01 as the gate's
reference. Accuracy hardly depends on the skip rate; accuracy is lost where things travel; the entropy of the pooling
head's attention grows with the loss; features of inactive patches are stable; the shift of active patches costs more
than the staleness of inactive ones; the running mean keeps ghosts of things that have left. A rule decides each one
from figures with 95 % intervals of a bootstrap over clips; a baseline is shown, too. If the interval does not decide,
the verdict is open. Writes `eval/results/published_laws.json`, shown in `docs/results/published.md`. T is the number
of frames, N of patches.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import typer
from torch import Tensor, nn

from eval.docs.labels import laws_table
from eval.report import finding
from eval.vision.clip_statistics import Estimate, correlation, difference, estimate, mean, share, shown
from eval.vision.composed_bench import Bench, Clip, Figures, Measured, command
from neuroflow_hf.evaluation.equal_cost import Mixture, shares_at
from neuroflow_hf.vision.patches import project_patches
from neuroflow_hf.vision.selection import surprise
from recipes.composed_clips import LEAST_VISIBLE, Actor, ClipSpec, Truth, path_offset, view

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
}
FAR = 16  # frames
SWAPS = ("active", "stored sparse", "stored dense", "all stored", "random as many as active")
TRAVELLING = ("crossing", "arc", "oscillating")
STAYING = ("still", "local")
PUBLISHED_SKIPS = (0.555, 0.663, 0.84)
LEVEL_TOP1, LEVEL_COSINE, LEVEL_STABILITY = 0.03, 0.01, 0.05
PUBLISHED_STABILITY = {"inactive": 0.83, "active": 0.41}
PUBLISHED_SHIFT = 0.73
FIRST = "control: first frame repeated"
DENSE_AT_ONCE = 8

# --- measuring a clip ------------------------------------------------------------------------------------------------


def measure_laws(bench: Bench, clip: Clip) -> Figures:
    """
    All figures of a clip from which laws are decided.

    Returns:
        `label` int [T], the index of the right label, -1 where nothing is seen; `gone` bool [T] and `travelled` [T]
        from the functions of these names. For each setting S, dense and FIRST: `S: skip`, `S: cost`, `S: cosine`,
        `S: place` (of the best label) and, except for FIRST, `S: entropy`, [T] each. For MEMORY also `swap: gain`
        [T, 5] from `swapped`. `stability` [2, 4] from the function of this name: between neighbouring frames, by the
        gate's own active patches, and over FAR frames, by what changed. `floor` [T]: cosine of two patches of one
        frame.
    """
    model, labels = bench.model, bench.labels
    head, frames = model.vision_model.head, clip.spec.frames
    outputs = [model.get_image_features(part) for part in clip.pixels.split(DENSE_AT_ONCE)]
    pooled = torch.cat([output.pooler_output for output in outputs]).float()
    patches = torch.cat([output.last_hidden_state for output in outputs]).float()
    places = labels.logits(pooled).argmax(-1).cpu().numpy()
    figures: Figures = {
        "label": np.array([-1 if one.label is None else bench.things.index(one.label) for one in clip.truths]),
        "gone": gone(clip.truths),
        "travelled": np.array([travelled(clip.spec, number) for number in range(frames)]),
        "dense: skip": np.zeros(frames),
        "dense: cost": np.ones(frames),
        "dense: cosine": np.ones(frames),
        "dense: place": places,
        "dense: entropy": torch.cat([head_entropy(head, part) for part in patches.split(16)]).cpu().numpy(),
        f"{FIRST}: skip": np.ones(frames),
        f"{FIRST}: cost": np.zeros(frames),
        f"{FIRST}: cosine": torch.cosine_similarity(pooled, pooled[:1], dim=-1).cpu().numpy(),
        f"{FIRST}: place": places[:1].repeat(frames),
    }
    for name, options in SETTINGS.items():
        rows, masks = measure_setting(bench, clip, options, pooled, patches, with_swaps=name == MEMORY)
        figures |= {part if part.startswith("swap") else f"{name}: {part}": value for part, value in rows.items()}
        if name == MEMORY:
            own = stability(patches[1:], patches[:-1], masks[1:])
    signals = torch.cat([project_patches(model.vision_model, part, as_product=True) for part in clip.pixels.split(8)])
    changed = surprise(signals[FAR:], signals[:-FAR]) > THRESHOLD
    figures["stability"] = np.stack([own, stability(patches[FAR:], patches[:-FAR], changed)])
    figures["floor"] = (
        torch.cosine_similarity(patches, patches.roll(patches.shape[1] // 2, 1), dim=-1).mean(-1).cpu().numpy()
    )
    return figures


def measure_setting(
    bench: Bench, clip: Clip, options: dict, pooled: Tensor, patches: Tensor, with_swaps: bool
) -> tuple[Figures, Tensor]:
    """
    Run a clip through one stream and compare it with dense, `pooled` [T, D] and `patches` [T, N, D].

    Returns:
        Figures of each frame, as in `measure_laws`, and the active masks bool [T, N].
    """
    model, labels = bench.model, bench.labels
    head, stream = model.vision_model.head, model.new_stream(**options)
    rows: dict[str, list] = {name: [] for name in ("skip", "cost", "cosine", "place", "entropy")}
    gains, masks = [], []
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
        masks.append(mask)
        if with_swaps:
            if number:
                encoded_alone |= mask
            generator = torch.Generator().manual_seed(number)
            gains.append(swapped(head, hidden[0], patches[number], mask, encoded_alone, generator))
    figures = {name: np.array(values) for name, values in rows.items()}
    if with_swaps:
        figures["swap: gain"] = np.array(gains)
    return figures, torch.stack(masks)


def head_entropy(head: nn.Module, hidden: Tensor) -> Tensor:
    """Entropy in nats of the pooling head's attention over patches [B, N, D], mean over attention heads: [B]."""
    probe = head.probe.expand(len(hidden), -1, -1)
    weights = head.attention(probe, hidden, hidden, need_weights=True, average_attn_weights=False)[1][:, :, 0]
    return torch.special.entr(weights.float()).sum(-1).mean(-1)


def swapped(
    head: nn.Module, hidden: Tensor, dense: Tensor, active: Tensor, encoded_alone: Tensor, generator: torch.Generator
) -> list[float]:
    """
    How much the pooled cosine to dense grows if one group of patches is replaced by the dense frame's, in the order of
    SWAPS; NaN for a group without patches. `hidden` and `dense`, [N, D], are what the head reads; `active` are the
    patches encoded on this frame without their surroundings, and `encoded_alone` those of this frame or an earlier one
    but the first, bool [N].
    """
    some = torch.zeros_like(active)
    some[torch.randperm(len(active), generator=generator)[: int(active.sum())]] = True
    groups = [active, encoded_alone & ~active, ~encoded_alone & ~active, ~active, some]
    variants = [torch.where(group.unsqueeze(1), dense, hidden) for group in groups]
    pooled = head(torch.stack([dense, hidden, *variants]))
    cosines = torch.cosine_similarity(pooled[1:], pooled[:1], dim=-1)
    gains = (cosines[1:] - cosines[0]).tolist()
    return [gain if group.any() else np.nan for gain, group in zip(gains, groups, strict=True)]


def stability(now: Tensor, before: Tensor, active: Tensor) -> np.ndarray:
    """
    Cosines of patches [T, N, D] at two times, separately for active patches, bool [T, N], and inactive ones.

    Returns:
        Sum and number of the cosines of inactive patches, then of active ones: [4].
    """
    cosines = torch.cosine_similarity(now, before, dim=-1)
    parts = [(cosines[mask].sum().item(), int(mask.sum())) for mask in (~active, active)]
    return np.array([*parts[0], *parts[1]], dtype=np.float64)


def gone(truths: tuple[Truth, ...]) -> np.ndarray:
    """The frames without a thing that was seen before, bool [T]."""
    visible = np.array([truth.visible for truth in truths])
    seen_before = np.maximum.accumulate(visible >= LEAST_VISIBLE, axis=0)
    return (seen_before & (visible == 0)).any(axis=1)


def travelled(spec: ClipSpec, number: int) -> float:
    """Mean distance of things from their positions on the first frame, relative to the side of the picture."""
    distances = [
        np.hypot(*np.subtract(centre(spec, actor, number), centre(spec, actor, 0))) / spec.side
        for actor in spec.actors
    ]
    return float(np.mean(distances))


def centre(spec: ClipSpec, actor: Actor, number: int) -> tuple[float, float]:
    """Row and column of a thing's centre in the picture; it may lie outside."""
    offsets, first, now = path_offset(actor, number), view(spec, 0), view(spec, number)
    row, column = (
        middle + reach * offset + start - at
        for middle, reach, offset, start, at in zip(actor.centre, actor.reach, offsets, first, now, strict=True)
    )
    return row, column


# --- figures of a clip, without the first frame, which is dense in every method --------------------------------------


def right(figures: Figures, setting: str) -> np.ndarray:
    """1 where the best label is right, else 0, on the frames on which a thing is seen."""
    label = figures["label"][1:]
    return (figures[f"{setting}: place"][1:] == label)[label >= 0].astype(float)


def loss(figures: Figures, setting: str) -> np.ndarray:
    """`1 - cos` to dense."""
    return 1 - figures[f"{setting}: cosine"][1:]


def gain(figures: Figures, name: str) -> np.ndarray:
    """Gains of one of SWAPS; 0 where the group has no patches."""
    return np.nan_to_num(figures["swap: gain"][1:, SWAPS.index(name)])


def entropy_change(figures: Figures, setting: str) -> np.ndarray:
    """The entropy of the head's attention less dense's on the same frame."""
    return (figures[f"{setting}: entropy"] - figures["dense: entropy"])[1:]


def each(measured: Measured, figure: Callable, name: str) -> list[np.ndarray]:
    """One of the figures above for every clip."""
    return [figure(figures, name) for _, figures in measured]


def over_clips(measured: Measured, name: str) -> float:
    """Mean of a figure such as `"context: cost"` over all clips and all frames but the first."""
    return float(np.concatenate([figures[name][1:] for _, figures in measured]).mean())


def stability_of(measured: Measured, row: int, kind: str) -> Estimate:
    """Mean cosine of `inactive` or `active` patches."""
    first = 0 if kind == "inactive" else 2
    rows = [tuple(figures["stability"][row, first : first + 2]) for _, figures in measured]
    return estimate([row for row in rows if row[1]], lambda total: total[:, 0] / total[:, 1])


def less(values: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The differences of each clip, frame by frame."""
    return [one - other for one, other in zip(values, others, strict=True)]


# --- laws ------------------------------------------------------------------------------------------------------------


def above(found: Estimate, level: float = 0.0) -> tuple[str, bool, bool]:
    """Rule and decision: whether the interval is above a level, and whether it is below."""
    rule = f"holds if the interval is above {level:g}, does not hold if it is below"
    return rule, found.known and found.low > level, found.known and found.high < level


def within(found: Estimate, middle: float, reach: float) -> tuple[str, bool, bool]:
    """Rule and decision: whether the interval lies within `middle` plus or minus `reach`, and whether outside."""
    low, high = middle - reach, middle + reach
    inside = found.known and low <= found.low and found.high <= high
    rule = f"holds if the interval lies within {reach:g} of {middle:g}, does not hold if outside"
    return rule, inside, found.known and (found.high < low or found.low > high)


def law(claim: str, decided: tuple[str, bool, bool], measured: str, baseline: str) -> dict:
    """A law with its rule and verdict, as of `above` or `within`, and the baseline's figure."""
    rule, holds, fails = decided
    return {**finding(claim, rule, measured, holds, fails), "control": baseline}


def findings(measured: Measured) -> list[dict]:
    """The findings on all laws for which these clips have data."""
    laws = (
        saturation, displacement, entropy_follows_loss, inactive_patches_are_stable, shift_costs_more, ghosts_cost,
    )  # fmt: skip
    return [found for each in laws for found in each(measured)]


def saturation(measured: Measured) -> list[dict]:
    """Whether accuracy and fidelity hardly depend on how much is skipped; unknown if two settings skip as much."""
    skips = {f"ema {threshold:g}": over_clips(measured, f"ema {threshold:g}: skip") for threshold in THRESHOLDS}
    least, most = (
        min(skips, key=lambda setting: abs(skips[setting] - published))
        for published in (PUBLISHED_SKIPS[0], PUBLISHED_SKIPS[-1])
    )
    top1, fidelity = (
        mean(less(each(measured, figure, most), each(measured, figure, least))) for figure in (right, loss)
    )
    first = mean(less(each(measured, right, FIRST), each(measured, right, most)))
    where = f"({least}: {skips[least]:.1%} skipped, {most}: {skips[most]:.1%})"
    baseline = f"first frame repeated, 100% skipped: {shown(first, '{:+.2f}', 100)} points to {most}"
    decided = [within(found, 0, level) for found, level in ((top1, LEVEL_TOP1), (fidelity, LEVEL_COSINE))]
    if least == most:
        decided = [(rule, False, False) for rule, *_ in decided]
    top1_claim = "accuracy hardly depends on the skip rate (69.6 / 70.45 / 71.55% at 55.5 / 66.3 / 84.0% skip)"
    points = f"{shown(top1, '{:+.2f}', 100)} points of top-1 {where}"
    return [
        law(top1_claim, decided[0], points, baseline),
        law("fidelity hardly depends on the skip rate", decided[1], f"{shown(fidelity, '{:+.4f}')} {where}", baseline),
    ]


def displacement(measured: Measured) -> list[dict]:
    """Whether the published method loses most on clips in which things travel."""
    travelling = [one for one in measured if one[0] in TRAVELLING]
    staying = [one for one in measured if one[0] in STAYING]
    if not travelling or not staying:
        return []
    distances = [figures["travelled"][1:] for _, figures in (*travelling, *staying)]

    def points_lost(some: Measured, setting: str) -> list[np.ndarray]:
        return less(each(some, right, "dense"), each(some, right, setting))

    points, points_first = (
        difference(points_lost(travelling, setting), points_lost(staying, setting)) for setting in (MEMORY, FIRST)
    )
    error, error_first = (
        difference(each(travelling, loss, setting), each(staying, loss, setting)) for setting in (MEMORY, FIRST)
    )
    rank, rank_first = (
        correlation(distances, each((*travelling, *staying), loss, setting)) for setting in (MEMORY, FIRST)
    )
    groups, first = f"({', '.join(TRAVELLING)} to {', '.join(STAYING)})", "first frame repeated:"
    return [
        law(
            "accuracy is lost where things travel across the frame (published: 29 to 43 points)",
            above(points),
            f"{shown(points, '{:+.1f}', 100)} points more lost {groups}",
            f"{first} {shown(points_first, '{:+.1f}', 100)} points",
        ),
        law(
            "fidelity is lost where things travel across the frame",
            above(error),
            f"{shown(error, '{:+.4f}')} of `1 - cos` {groups}",
            f"{first} {shown(error_first, '{:+.4f}')}",
        ),
        law(
            "the further a thing is from where it was, the more is lost",
            above(rank),
            f"rank correlation of distance and `1 - cos` {shown(rank, '{:+.2f}')}",
            f"{first} {shown(rank_first, '{:+.2f}')}",
        ),
    ]


def entropy_follows_loss(measured: Measured) -> list[dict]:
    """Whether the entropy of the pooling head's attention follows the loss."""
    found = []
    for setting in (MEMORY, "eliminate"):
        changes, losses = each(measured, entropy_change, setting), each(measured, loss, setting)
        along = correlation([np.abs(change) for change in changes], losses)
        of_share = correlation([1 - figures[f"{setting}: skip"][1:] for _, figures in measured], losses)
        found.append(
            law(
                f"the more the pooling head's entropy differs from dense's, the more is lost ({setting})",
                above(along),
                f"{shown(along, '{:+.2f}')}; entropy {shown(mean(changes), '{:+.3f}')} nats to dense's",
                f"correlation of loss with the share of active patches: {shown(of_share, '{:+.2f}')}",
            )
        )
    return found


def inactive_patches_are_stable(measured: Measured) -> list[dict]:
    """Whether the last layer's features are stable where the gate sees no change."""
    rows = [tuple(one["stability"][0]) for _, one in measured if one["stability"][0][1] and one["stability"][0][3]]
    apart = estimate(rows, lambda total: total[:, 0] / total[:, 1] - total[:, 2] / total[:, 3])
    far, floor = stability_of(measured, 1, "inactive"), mean([one["floor"] for _, one in measured])
    baseline = (
        f"inactive over {FAR} frames: {shown(far, '{:.3f}')}; "
        f"another patch of the same frame: {shown(floor, '{:.3f}')}"
    )
    claim = "the last layer changes less in inactive patches than in active ones"
    found = [law(claim, above(apart), shown(apart, "{:+.3f}"), baseline)]
    for kind, published in PUBLISHED_STABILITY.items():
        value, claim = stability_of(measured, 0, kind), f"{kind} patches' cosine between frames is {published}"
        found.append(law(claim, within(value, published, LEVEL_STABILITY), shown(value, "{:.3f}"), baseline))
    return found


def shift_costs_more(measured: Measured) -> list[dict]:
    """Whether encoding active patches alone costs more fidelity than keeping stale inactive patches."""
    of_active, of_echo, of_stale, of_stored, random = (each(measured, gain, name) for name in SWAPS)
    both = share(of_active, of_stored)
    with_echo = share([a + b for a, b in zip(of_active, of_echo, strict=True)], of_stale)
    said = (
        f"{shown(both, '{:.0%}')} of the gain by swapping either for dense's; with what was encoded so on earlier "
        f"frames {shown(with_echo, '{:.0%}')}"
    )
    baseline = f"gain by active patches {shown(mean(of_active))}, by as many random ones {shown(mean(random))}"
    claim = "the shift of active patches"
    return [
        law(f"{claim} costs more than the staleness of inactive ones", above(both, 0.5), said, baseline),
        law(f"{claim} is {PUBLISHED_SHIFT:.0%} of the gap", within(both, PUBLISHED_SHIFT, 0.1), said, baseline),
    ]


def ghosts_cost(measured: Measured) -> list[dict]:
    """Whether the running mean keeps ghosts that the reference `last_update` does not keep, at the same cost."""
    left = [one for one in measured if one[1]["gone"][1:].any()]
    if not left:
        return []
    mixture, costs = equal_cost(left)

    def agree(figures: Figures, setting: str) -> np.ndarray:
        return (figures[f"{setting}: place"] == figures["dense: place"])[1:].astype(float)

    def cosine(figures: Figures, setting: str) -> np.ndarray:
        return 1 - loss(figures, setting)

    def gained(figure: Callable, is_gone: bool) -> Estimate:
        values = []
        for _, one in left:
            more = mixture.mean(lambda setting, one=one: figure(one, setting)) - figure(one, MEMORY)
            values.append(more[one["gone"][1:] == is_gone])
        return mean(values)

    frames = sum(int(one["gone"][1:].sum()) for _, one in left)
    mixed = " and ".join(setting for _, setting in mixture.parts)
    where = f"({len(left)} clips, {frames} frames; {mixed} at cost {costs[1]:.3f}, {MEMORY} at {costs[0]:.3f})"
    found = []
    for name, figure, form, scale, unit, points in (
        ("fidelity", cosine, "{:+.4f}", 1, "of cosine", ""),
        ("labels", agree, "{:+.1f}", 100, "points of agreement with dense", " points"),
    ):
        more, baseline = gained(figure, True), shown(gained(figure, False), form, scale)
        found.append(
            law(
                f"a running mean keeps ghosts of what has left: {name}",
                above(more),
                f"{shown(more, form, scale)} {unit} {where}",
                f"on the other frames of these clips: {baseline}{points}",
            )
        )
    return found


def equal_cost(measured: Measured) -> tuple[Mixture, tuple[float, float]]:
    """
    The mixture of `last_update` settings that costs as much as MEMORY, and both costs. If all settings cost less, it
    is the most expensive setting; if all cost more, the cheapest.
    """
    target = over_clips(measured, f"{MEMORY}: cost")
    settings = [f"last_update {level:g}" for level in LAST_UPDATE_THRESHOLDS]
    costs = [over_clips(measured, f"{setting}: cost") for setting in settings]
    shares = shares_at(costs, target)
    mixture = Mixture("last_update", [(share, settings[place]) for share, place in shares])
    return mixture, (target, sum(share * costs[place] for share, place in shares))


def laws_report(bench: Bench, measured: Measured) -> dict:
    """All figures and verdicts."""
    return {
        "labels": len(bench.things),
        "options": SETTINGS,
        "published_method": MEMORY,
        "findings": findings(measured),
    }


main = command(measure_laws, laws_report, laws_table, name="published_laws", default_clips=4, quick_frames=24)

if __name__ == "__main__":
    typer.run(main)
