"""The gate at work: from a frame's signal and a stream's references to the active set, and back to the references."""

import torch

from .neuroflow_active import ActiveSet
from .neuroflow_gating import (
    has_only_finite,
    highest,
    oldest,
    running_mean,
    spread_to_neighbours,
    surprise,
    without_global_motion,
)
from .neuroflow_stream import NeuroFlowStream


def choose_active(stream: NeuroFlowStream, signal: torch.Tensor) -> tuple[ActiveSet, torch.Tensor | None]:
    """
    The active set of a frame whose signal is [B, N, D], and the surprise float32 [B, N] that it was chosen by; `None`
    where the options do not look at the frame (`dense`, `hold` by the clock). Patches of a stream's first frame have
    no reference; their surprise is 1, the cosine to nothing being 0. Nothing is written.

    The order of the policies: surprise, global motion, dilation, threshold or budget (with the oldest patches taken
    first), the minimum, the keyframe rules (by the share of patches above the threshold before dilation).

    Raises:
        ValueError: if a stream's pixels are not finite.
    """
    gate = stream.gate
    keyframes = stream.due_keyframes()
    batch_size, num_patches, _ = signal.shape
    mask = torch.zeros(batch_size, num_patches, dtype=torch.bool, device=signal.device)
    changed = mask
    scores = None
    looked_at = signal

    if gate.needs_surprise:
        scores = surprise_of(stream, signal)
        if stream.memory:  # without references to compare with, the surprise would be finite for any signal
            looked_at = scores
        changed, mask = apply_policies(stream, scores)

    # the one time in a frame that the host waits for the device
    counts = torch.stack([changed.sum(-1), mask.sum(-1), has_only_finite(looked_at)]).tolist()
    for index, finite in enumerate(counts[2]):
        if not finite:
            raise ValueError(
                f"The frame of stream {index} (of {batch_size}) has NaN or infinite pixel values. Drop the frame or "
                "repair it; the streams are as they were before."
            )
    if gate.keyframe_fraction is not None:
        keyframes = [
            due or count > gate.keyframe_fraction * num_patches
            for due, count in zip(keyframes, counts[0], strict=True)
        ]
    if any(keyframes):
        mask[[index for index, is_keyframe in enumerate(keyframes) if is_keyframe]] = True
    active_counts = [
        num_patches if is_keyframe else count for is_keyframe, count in zip(keyframes, counts[1], strict=True)
    ]
    return ActiveSet(mask, active_counts, keyframes), scores


def surprise_of(stream: NeuroFlowStream, signal: torch.Tensor) -> torch.Tensor:
    """The largest surprise against the references that the stream keeps: [B, N, D] to float32 [B, N]."""
    if not stream.memory:
        return torch.ones(signal.shape[:2], device=signal.device)
    references = [stream.memory[name] for name in stream.gate.references]
    scores = torch.stack([surprise(signal, reference) for reference in references]).amax(dim=0)
    first_frames = [index for index, frame in enumerate(stream.frames) if frame == 0]
    if first_frames:  # what they hold is from before a reset
        unknown = torch.where(scores[first_frames].isfinite(), 1.0, torch.nan)
        scores[first_frames] = unknown
    return scores


def apply_policies(stream: NeuroFlowStream, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprise [B, N] to two masks [B, N]: the patches above the threshold, and those that the policies take."""
    gate, grid = stream.gate, stream.geometry.grid
    if gate.global_motion_norm:
        scores = without_global_motion(scores)
    changed = scores > gate.threshold
    if gate.mode == "hold":
        return changed, torch.zeros_like(changed)
    scores = spread_to_neighbours(scores, grid, gate.dilate)
    mask = scores > gate.threshold
    if gate.max_age is not None and "age" in stream.memory:
        refreshed = oldest(stream.memory["age"], gate.max_age)
        scores = scores.masked_fill(refreshed, torch.inf)
        mask = mask | refreshed
    if gate.token_budget is not None:
        mask = highest(scores, gate.token_budget)
    if gate.least_active:
        mask = mask | highest(scores, gate.least_active)
    return changed, mask


def update_references(stream: NeuroFlowStream, signal: torch.Tensor, active: ActiveSet):
    """Write a frame's signal [B, N, D] into the stream's references; a keyframe overwrites the running means."""
    gate, memory = stream.gate, stream.memory
    if not gate.needs_surprise:
        return
    if "last_update" in gate.references:
        active.remember(memory, "last_update", active.gather(signal))
    for name, rate in gate.mean_rates.items():
        if all(active.keyframes):
            memory[name] = signal.to(torch.float32, copy=True)
            continue
        mean = running_mean(memory[name], signal, rate)
        for index, is_keyframe in enumerate(active.keyframes):
            if is_keyframe:
                mean[index] = signal[index]
        memory[name] = mean
    if gate.max_age is not None:
        age = memory.get("age", torch.zeros(active.mask.shape, dtype=torch.int64, device=signal.device))
        memory["age"] = (age + 1).masked_fill(active.mask, 0)
