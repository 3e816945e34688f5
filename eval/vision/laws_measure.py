"""
One composed clip, dense and through the published gate: what `published_laws.py` decides by. T frames, N patches.

The published method is mode `reconstruct` (dual memory) with a running mean of rate 0.01 as the gate's reference.
"""

import numpy as np
import torch
from torch import Tensor, nn

from eval.vision.composed_bench import Bench, Clip, Figures, dense_outputs, label_places
from eval.vision.composed_clips import LEAST_VISIBLE, Actor, ClipSpec, Truth, path_offset, view
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


# --- what is asked of a frame: pure functions ------------------------------------------------------------------------


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
