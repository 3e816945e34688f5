"""
Changes that spread (mode `propagate`).

New keys and values of a few patches change the attention output of every patch. It is kept up to date for all of them,
at the cost of the changed keys alone, and patches whose output moved too far join the active set, layer by layer.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .active_set import ActiveSet, recall
from .cost import attended as attended_cost
from .cost import attention as attention_cost
from .cost import mlp as mlp_cost
from .layer_step import LayerOutput, LayerStep, PatchMemory, widths

# What is kept of every patch beside keys and values. With those, 14 bytes a feature and layer in half precision, 24 in
# float32: 1.6 and 2.8 GB for a base model (12 layers of 768 features) at 1792 px (12,544 patches).
SPREADING_MEMORIES = {
    "input": PatchMemory(),  # the layer's input, as it was when the patch was last active in this layer
    "query": PatchMemory(),  # of that input
    "reference": PatchMemory(),  # the attention output that the patch's layer output was last computed with
    "output": PatchMemory(dtype=torch.float32),  # the attention output now; with the masses, `AttentionState`
    "log_mass": PatchMemory(per_head=True, dtype=torch.float32),
    "log_peak": PatchMemory(per_head=True, dtype=torch.float32),
}

# An update's rounding error is a share of the mass that a row had then; once the row has less than this share of its
# largest mass left, old errors weigh ten times as much, and it is computed anew. Errors then stay below 5e-4 of an
# output over thousands of updates, for rows of all kinds (tested); they grow more slowly than the
# number of updates, which `max_age` bounds, for an active patch's row is computed anew.
LEAST_MASS = 0.1

# How many scores (streams x heads x queries x keys) are in memory at once: on a CPU about as many as its cache holds
# (16 MiB), elsewhere enough to keep it busy (128 MiB).
SCORES_AT_ONCE = {"cpu": 2**22}
SCORES_AT_ONCE_ELSEWHERE = 2**25


class AttentionState(NamedTuple):
    """
    The attention outputs of S streams' N patches, and what is needed to change a few keys in them. A row's mass is its
    softmax's denominator, `sum_j exp(score_j)`.

    Args:
        output: float32 [S, N, D], normalised in each head, before the output projection.
        log_mass: float32 [S, N, H], the logarithm of the mass (the scores' log-sum-exp).
        log_peak: float32 [S, N, H], the largest `log_mass` since the row was last computed in full.
    """

    output: torch.Tensor
    log_mass: torch.Tensor
    log_peak: torch.Tensor


def attend_with_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention in float32 that also returns the mass: queries [S, Q, D] over keys and values [S, K, D].

    Returns:
        The output [S, Q, D] and `log_mass` [S, Q, H], float32, before the output projection. Some queries at a time,
        so that [H, Q, K] is never whole in memory.
    """
    with torch.autocast(query.device.type, enabled=False):  # in half precision, old terms would not cancel
        keys, values = heads(key, num_heads).transpose(-1, -2) * scale, heads(value, num_heads)
        outputs, log_masses = [], []
        for queries in heads(query, num_heads).split(queries_at_once(keys), dim=2):
            scores = queries @ keys
            log_unit = scores.detach().amax(-1, keepdim=True)
            weights = scores.sub_(log_unit).exp_()  # in place: writing the scores is most of the time
            mass = weights.sum(-1, keepdim=True)
            outputs.append(F.dropout(weights, dropout) @ values / mass)
            log_masses.append(log_unit + mass.log())
        return features(torch.cat(outputs, dim=2)), features(torch.cat(log_masses, dim=2))


def exchange_keys(
    state: AttentionState,
    query: torch.Tensor,
    old_key: torch.Tensor,
    old_value: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    num_heads: int,
    scale: float,
) -> AttentionState:
    """
    The attention state of queries [S, N, D] after C of each stream's keys and values, [S, C, D], were replaced: the
    old terms are taken out of the softmax's sums and the new ones put in, `O(N C D)` work.

    With the mass Z and the output o, `Z' = Z - sum exp(old) + sum exp(new)` and `Z' o' = Z o - sum exp(old) v_old +
    sum exp(new) v_new`, here in units of the larger of Z and the largest new term, so that nothing overflows. Exact up
    to rounding for rows that `is_worn_out` says nothing against; the others' values are finite and useless.
    """
    with torch.autocast(query.device.type, enabled=False):
        num_changed = old_key.shape[1]
        keys = heads(torch.cat([old_key, new_key], dim=1), num_heads).transpose(-1, -2) * scale
        values = heads(torch.cat([-old_value, new_value], dim=1), num_heads)
        at_once = queries_at_once(keys)
        parts = (heads(rows, num_heads).split(at_once, dim=2) for rows in (query, state.output, state.log_mass))
        outputs, log_masses = [], []
        for queries, output, log_mass in zip(*parts, strict=True):
            scores = queries @ keys
            log_unit = torch.maximum(log_mass, scores[..., num_changed:].detach().amax(-1, keepdim=True))
            weights = scores.sub_(log_unit).exp_()
            before = (log_mass - log_unit).exp()
            old, new = (terms.sum(-1, keepdim=True) for terms in weights.split(num_changed, dim=-1))
            # what is left of a row that lost nearly all is rounding error, maybe negative, and must not make a NaN
            mass = (before - old + new).clamp_min(LEAST_MASS / 100)
            outputs.append((before * output + weights @ values) / mass)
            log_masses.append(log_unit + mass.log())
        output, log_mass = (features(torch.cat(parts, dim=2)) for parts in (outputs, log_masses))
        return AttentionState(output, log_mass, torch.maximum(state.log_peak, log_mass))


def is_worn_out(state: AttentionState) -> torch.Tensor:
    """Bool [S, N]: the rows that, in some head, lost so much of their mass that they must be computed in full."""
    return (state.log_mass < state.log_peak + math.log(LEAST_MASS)).any(-1)


def has_moved(output: torch.Tensor, reference: torch.Tensor, tolerance: float) -> torch.Tensor:
    """
    Bool [S, N]: the rows of `output` [S, N, D] whose distance to `reference` is more than `tolerance` times the
    reference's norm; compared in the type of the reference, in which an output is used.
    """
    with torch.no_grad():
        change = output.to(reference.dtype).float() - reference.float()
        return change.norm(dim=-1) > tolerance * reference.float().norm(dim=-1)


def heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[S, N, H * X] to float32 [S, H, N, X]."""
    return rows.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)


def features(per_head: torch.Tensor) -> torch.Tensor:
    """[S, H, N, X] to [S, N, H * X]."""
    return per_head.transpose(1, 2).flatten(2)


def queries_at_once(keys: torch.Tensor) -> int:
    """How many queries' scores over keys [S, H, X, K] may be in memory together."""
    num_streams, num_heads, _, num_keys = keys.shape
    at_once = SCORES_AT_ONCE.get(keys.device.type, SCORES_AT_ONCE_ELSEWHERE)
    return max(16, at_once // (num_streams * num_heads * num_keys))  # fewer would be a loop over patches


def layer_that_spreads(layer: nn.Module, hidden: torch.Tensor, step: LayerStep) -> LayerOutput:
    """
    An encoder layer as in mode `context`, in which inactive patches whose attention output moved by more than the
    tolerance join the active set: rows [M, D] of the active set to rows [M', D] of the larger one. A patch that joins
    adds its attention output now to the input that it had when it was last active, and goes through the MLP.

    A stream with more than a third of its patches active is computed in full, for exchanging so many keys would be
    dearer; all its patches are active from here on, the others with the inputs that they had. Attention is computed
    here, not by the model's attention implementation, for the mass is needed. In training with attention dropout,
    what is stored carries the dropout of its frame.

    Waits for the device once, for the number of patches that join, and once more if rows had to be computed anew; not
    at all if every stream is computed in full. Keeps `key`, `value` and `SPREADING_MEMORIES`.
    """
    attention, memory = layer.self_attn, step.memory
    inputs = step.active.remember(memory, "input", hidden)
    active = in_full_above_a_third(step.active)
    normed = layer.layer_norm1(active.gather(inputs))
    query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    replaced = [] if active.everything else [active.gather(memory[name]) for name in ("key", "value")]
    queries, keys, values = (
        active.of_live(active.remember(memory, name, fresh))
        for name, fresh in (("query", query), ("key", key), ("value", value))
    )

    live = active.among_live  # from here to the next layer's active set, of streams with something active
    computed = attend_rows(attention, query, keys, values, live.counts)
    worn_out, joined = [0] * len(live.counts), [0] * len(live.counts)
    if live.everything:
        state = AttentionState(*(rows.view(*live.mask.shape, -1) for rows in computed))
    else:
        state = AttentionState(*(active.of_live(recall(memory, name)) for name in AttentionState._fields))
        state = exchange_rows(attention, state, queries, (*replaced, key, value), live.counts)
        state = with_rows(state, live, computed)
        reference = active.of_live(memory["reference"])
        tolerance = step.gate.tolerance_in(step.index, step.num_layers)
        inactive = ~live.mask.to(reference.device)
        lost = is_worn_out(state) & inactive
        moved = has_moved(state.output, reference, tolerance) & inactive
        worn_out, joined = torch.stack([lost.sum(-1), moved.sum(-1)]).tolist()
        if any(worn_out):
            rows = ActiveSet(lost, worn_out, live.keyframes)
            state = with_rows(state, rows, attend_rows(attention, rows.gather(queries), keys, values, worn_out))
            moved = has_moved(state.output, reference, tolerance) & inactive
            joined = moved.sum(-1).tolist()
    for name, fresh in zip(AttentionState._fields, state, strict=True):
        active.remember_streams(memory, name, fresh)

    spent = costs(layer, active, worn_out, joined)
    if any(joined):
        counts = list(active.counts)
        for stream, more in zip(active.live, joined, strict=True):
            counts[stream] += more
        active = active.joined_by(active.live, moved, counts)
    attended = active.among_live.gather(state.output).to(query.dtype)
    active.remember(memory, "reference", attended)
    hidden = active.gather(inputs) + attention.out_proj(attended)
    return LayerOutput(hidden + layer.mlp(layer.layer_norm2(hidden)), active, spent)


def in_full_above_a_third(active: ActiveSet) -> ActiveSet:
    """The active set, with all patches of every stream of which more than a third are active."""
    patches = active.num_patches
    full = [stream for stream, count in enumerate(active.counts) if patches < 3 * count < 3 * patches]
    if not full:
        return active
    counts = [patches if stream in full else count for stream, count in enumerate(active.counts)]
    return active.joined_by(full, True, counts)


def attend_rows(
    attention: nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, counts: list[int]
) -> AttentionState:
    """Every stream's queries, rows [M, D] by `counts`, over its keys and values [S, N, D]: rows of the state."""
    options = (attention.num_heads, attention.scale, attention.dropout if attention.training else 0.0)
    if len(set(counts)) == 1:
        query = query.view(len(counts), counts[0], -1)
        output, log_mass = (rows.flatten(0, 1) for rows in attend_with_mass(query, keys, values, *options))
    else:
        streams = zip(query.unsqueeze(0).split(counts, dim=1), keys.split(1), values.split(1), strict=True)
        parts = [attend_with_mass(*stream, *options) for stream in streams if stream[0].shape[1]]
        output, log_mass = (torch.cat(rows, dim=1).squeeze(0) for rows in zip(*parts, strict=True))
    return AttentionState(output, log_mass, log_mass)


def exchange_rows(
    attention: nn.Module,
    state: AttentionState,
    queries: torch.Tensor,
    changed: tuple[torch.Tensor, ...],
    counts: list[int],
) -> AttentionState:
    """
    `exchange_keys` for `changed`, the old keys and values and the new ones, rows [M, D] by `counts`. The state of
    streams with all N patches changed is left as it is.
    """
    options = (attention.num_heads, attention.scale)
    if len(set(counts)) == 1:
        return exchange_keys(state, queries, *(rows.view(len(counts), counts[0], -1) for rows in changed), *options)
    states = []
    for stream, rows in enumerate(zip(*(rows.unsqueeze(0).split(counts, dim=1) for rows in changed), strict=True)):
        part = AttentionState(*(tensor[stream : stream + 1] for tensor in state))
        if counts[stream] < queries.shape[1]:
            part = exchange_keys(part, queries[stream : stream + 1], *rows, *options)
        states.append(part)
    return AttentionState(*(torch.cat(parts) for parts in zip(*states, strict=True)))


def with_rows(state: AttentionState, patches: ActiveSet, rows: AttentionState) -> AttentionState:
    """The state [S, N, ...] with some patches' rows [M, ...] in it."""
    places = patches.rows.to(state.output.device)
    return AttentionState(
        *(
            tensor.flatten(0, 1).index_copy(0, places, fresh).view_as(tensor)
            for tensor, fresh in zip(state, rows, strict=True)
        )
    )


def costs(layer: nn.Module, active: ActiveSet, worn_out: list[int], joined: list[int]) -> list[int]:
    """
    Multiply-adds of `layer_that_spreads`, of each stream; `worn_out` rows and `joined` patches of the live ones.

    Of c active patches: their projections and attention; for all N queries the scores and weighted sums over c old
    keys and c new ones. With everything active, the dense layer.
    """
    patches, (dim, inner) = active.num_patches, widths(layer)
    spent = [0] * len(active.counts)
    for stream, rows, more in zip(active.live, worn_out, joined, strict=True):
        count = active.counts[stream]
        spent[stream] = attention_cost(count, patches, count, dim) + mlp_cost(count, dim, inner)
        if count < patches:
            spent[stream] += attended_cost(patches, 2 * count, dim) + attended_cost(rows, patches, dim)
            spent[stream] += more * dim * dim + mlp_cost(more, dim, inner)
    return spent
