"""The gate: compare a frame's signal with a stream's references, choose the active set, update the references."""

from dataclasses import replace

import torch

from .active_set import ActiveSet
from .controller import HOLD, KEYFRAME, SPARSE, Changes, Pace, allowance_of, choose
from .gate_config import NeuroFlowGateConfig
from .selection import (
    ROUNDING,
    has_only_finite,
    highest,
    oldest,
    refreshed_per_frame,
    running_mean,
    spread_to_neighbours,
    surprise,
    without_global_motion,
)
from .stream import NeuroFlowStream
from .stream_state import AGE, LAST_UPDATE, POOLED_CHANGE


def choose_active(
    stream: NeuroFlowStream, signal: torch.Tensor, grid: tuple[int, int], looking: float
) -> tuple[ActiveSet, torch.Tensor | None, list[Pace]]:
    """
    The active set of a frame whose signal is [B, N, D]; the surprise, float32 [B, N], `None` if the options do not
    need it; and each stream's pace after the frame. Patches of a stream's first frame have no reference; their
    surprise is 1. `looking` is what a frame costs on which nothing is active. Nothing is written.

    `apply_policies` chooses patches. Then, for each stream, the first of these that applies decides:

    1. a keyframe by number: everything is active;
    2. a keyframe by what the frame shows (`asks_for_keyframe`), unless the stream is in debt: everything is;
    3. nearly all patches are active (`full_above`): the frame becomes a keyframe;
    4. with a `cost_budget` or a `min_fidelity`, the controller may hold the frame, or make it a keyframe.

    Raises:
        ValueError: if a stream's pixels are not finite.
    """
    gate = stream.gate
    batch_size, num_patches, _ = signal.shape
    nothing = torch.zeros(batch_size, num_patches, dtype=torch.bool, device=signal.device)
    if gate.needs_surprise:
        scores = surprise_of(stream, signal)
        # on the first frame, the surprise is 1 for any signal
        looked_at = scores if stream.memory else signal
        mean_scores = scores.mean(-1)
        changed, mask = apply_policies(stream, scores, grid)
    else:
        scores, looked_at, mean_scores, changed, mask = None, signal, nothing.sum(-1), nothing, nothing.clone()

    numbers = [has_only_finite(looked_at), mean_scores, changed.sum(-1), mask.sum(-1), (changed & mask).sum(-1)]
    if gate.is_paced and scores is not None:
        numbers += [(scores * mask).mean(-1), stream.memory.get(POOLED_CHANGE, torch.zeros_like(mean_scores))]
    count = fixed_count(gate, num_patches)
    per_stream: list[list[float]]
    if torch.compiler.is_compiling() and count is not None:
        # a compiled graph cannot read numbers from the device, so it cannot name the stream
        torch._assert_async(numbers[0].all(), "The frame of a stream has NaN or infinite pixel values.")
        per_stream = [[True, 0, 0, count, 0]] * batch_size
    else:  # the one time in a frame that the host waits for the device
        per_stream = torch.stack([number.double() for number in numbers], dim=-1).tolist()
        require_finite([finite for finite, *_ in per_stream])

    keyframes, counts, changed_counts, paces = stream.due_keyframes(), [], [], []
    for index, (_, mean_score, num_changed, num_active, num_both, *for_pace) in enumerate(per_stream):
        credit, pace, allowance = stream.credit[index], stream.pace[index], 1.0
        if num_active > gate.full_above * num_patches:
            num_active = num_patches
        active_surprise, pooled_change = for_pace or (0.0, 0.0)
        changes = Changes(num_active / num_patches, mean_score, active_surprise)
        if gate.min_fidelity is not None:
            pace = replace(pace, error=pace.error.learned(pooled_change))
        if gate.cost_budget is not None:
            allowance = allowance_of(gate.cost_budget - looking, credit, gate.cost_reserve)
        if keyframes[index] or (
            gate.budget.allows_encoding(credit) and asks_for_keyframe(gate, mean_score, num_changed / num_patches)
        ):
            action = KEYFRAME
        elif gate.is_paced:
            action = choose(
                pace, changes, allowance, credit, gate.cost_reserve, gate.keyframe_interval, gate.min_fidelity
            )
        else:
            action = KEYFRAME if num_active == num_patches and gate.full_above < 1 else SPARSE
        keyframes[index] = action == KEYFRAME
        if action != SPARSE:
            num_active = num_patches if action == KEYFRAME else 0
            num_both = num_changed if action == KEYFRAME else 0
        counts.append(int(num_active))
        changed_counts.append((int(num_changed), int(num_both)))
        # without the controller nothing is counted: numbers that differ on every frame would compile a graph anew
        if gate.is_paced:
            first = stream.frames[index] == 0
            pace = Pace() if first else pace.after(action if num_active else HOLD, changes, allowance)
        paces.append(pace)
    for value, count in ((True, num_patches), (False, 0)):
        streams = [index for index in range(batch_size) if counts[index] == count]
        if streams:
            mask[streams] = value
    return ActiveSet(mask, counts, keyframes, changed, changed_counts), scores, paces


def fixed_count(gate: NeuroFlowGateConfig, num_patches: int) -> int | None:
    """How many patches are active on a frame that is no keyframe by number, if that does not depend on the frame."""
    if gate.everything_active:
        return num_patches
    if not gate.needs_surprise:
        return 0
    if gate.token_budget is None or gate.has_keyframe_trigger or gate.cost_budget is not None:
        return None
    return min(num_patches, max(gate.token_budget, gate.least_active))


def require_finite(finite_streams: list[float]) -> None:
    """Raise a ValueError that names the first stream whose frame is not finite."""
    for index, finite in enumerate(finite_streams):
        if not finite:
            raise ValueError(
                f"The frame of stream {index} (of {len(finite_streams)}) has NaN or infinite pixel values. Drop the "
                "frame or repair it; the streams are as they were before."
            )


def asks_for_keyframe(gate: NeuroFlowGateConfig, mean_surprise: float, changed_fraction: float) -> bool:
    """Whether what a frame shows makes it a keyframe."""
    by_fraction = gate.keyframe_fraction is not None and changed_fraction > gate.keyframe_fraction
    return by_fraction or (gate.keyframe_surprise is not None and mean_surprise > gate.keyframe_surprise)


def surprise_of(stream: NeuroFlowStream, signal: torch.Tensor) -> torch.Tensor:
    """The largest surprise against any of the stream's references: [B, N, D] to float32 [B, N]."""
    if not stream.memory:
        return torch.ones(signal.shape[:2], device=signal.device)
    references = [stream.memory[name] for name in stream.gate.references]
    scores = torch.stack([surprise(signal, reference) for reference in references]).amax(dim=0)
    first_frames = [index for index, frame in enumerate(stream.frames) if frame == 0]
    if first_frames:  # the references are from before a reset
        unknown = torch.where(scores[first_frames].isfinite(), 1.0, torch.nan)
        scores[first_frames] = unknown
    return scores


def apply_policies(
    stream: NeuroFlowStream, scores: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprise [B, N] to two masks [B, N]: the patches above the threshold, and those that the options choose."""
    gate = stream.gate
    if gate.global_motion_norm:
        scores = without_global_motion(scores)
    changed = scores > gate.threshold
    if gate.mode == "hold":
        return changed, torch.zeros_like(changed)
    scores = spread_to_neighbours(scores, grid, gate.dilate)
    mask = scores > gate.threshold
    if AGE in stream.memory:
        refreshed = refreshed_in_turn(gate, grid, stream.memory[AGE], mask)
        scores = scores.masked_fill(refreshed, torch.inf)
        mask = mask | refreshed
    ranked = scores.masked_fill(scores.abs() < ROUNDING, 0)
    if gate.token_budget is not None:
        mask = highest(ranked, gate.token_budget)
    if gate.least_active:
        mask = mask | highest(ranked, gate.least_active)
    return changed, mask


def refreshed_in_turn(
    gate: NeuroFlowGateConfig, grid: tuple[int, int], age: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mask of the patches that `max_age` and `sentinels` add to the mask of changed ones, by their ages [B, N]."""
    refreshed, num_patches = torch.zeros_like(mask), age.shape[-1]
    if gate.max_age is not None:
        refreshed = oldest(age, grid, refreshed_per_frame(num_patches, gate.max_age))
    if gate.sentinel_share:
        sentinels = mask.sum(-1).clamp(max=gate.most_sentinels(num_patches))
        refreshed = refreshed | oldest(age, grid, sentinels, among=~(mask | refreshed))
    return refreshed


def update_references(stream: NeuroFlowStream, signal: torch.Tensor, active: ActiveSet) -> None:
    """Write a frame's signal [B, N, D] into the stream's references; a keyframe restarts the running means."""
    gate, memory = stream.gate, stream.memory
    if not gate.needs_surprise:
        return
    if LAST_UPDATE in gate.references:
        active.remember(memory, LAST_UPDATE, active.gather(signal))
    for name, rate in gate.mean_rates.items():
        if all(active.keyframes):
            memory[name] = signal.to(torch.float32, copy=True)
            continue
        mean = running_mean(memory[name], signal, rate)
        for index, is_keyframe in enumerate(active.keyframes):
            if is_keyframe:
                mean[index] = signal[index]
        memory[name] = mean
    if gate.keeps_age:
        age = memory.get(AGE, torch.zeros(active.mask.shape, dtype=torch.int64, device=signal.device))
        memory[AGE] = (age + 1).masked_fill(active.mask, 0)
