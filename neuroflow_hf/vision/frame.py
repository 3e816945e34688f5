"""One frame of B streams through the vision tower: gate, encoder, head, references."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .active_set import ActiveSet
from .budget import with_affordable_budget
from .cost import encoder as encoder_cost
from .cost import gate as gate_cost
from .cost import patch_projection as projection_cost
from .extrapolate import build_corrections, weights_cost
from .gate import choose_active, update_references
from .gate_config import NeuroFlowGateConfig
from .modes import MODES, LayerStep, ModeSpec
from .patches import embed_tokens, project_patches
from .pooling import Pooling
from .sparse_adapter import NO_ADAPTER, SparseAdapter
from .stream import NeuroFlowStream
from .stream_state import OUTPUT, POOLED, POOLED_CHANGE, StreamGeometry, hidden_state_name
from .summary import SUMMARY_OUTPUT, SummaryGrid, remember_summary
from .tower import VisionTower


@dataclass
class NeuroFlowVisionOutput(BaseModelOutputWithPooling):
    """
    Output of the vision tower for one frame of B streams.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, D)`):
            All tokens as the stock model returns them, each as it was last encoded: N patches, in some towers after a
            CLS token and registers. In mode `eliminate` the active ones only, `(B, A, D)`, padded with zeros to the
            largest count; `token_mask` says which are real.
        pooler_output (`torch.FloatTensor` of shape `(B, D)`): the embedding. None if the model has no pooling head.
        hidden_states (`tuple`, *optional*):
            The hidden states that were asked for, `(B, T, D)` each, at their places among L + 1, None at the others:
            all tokens, each as it was last encoded.
        active_mask (`torch.BoolTensor` of shape `(B, grid_h, grid_w)`):
            The patches that were encoded on this frame.
        surprise (`torch.FloatTensor` of shape `(B, grid_h, grid_w)`, *optional*):
            `1 - cos(signal, reference)`, float32; 1 on a stream's first frame. None if it was not computed (mode
            `dense`, and `hold` without `keyframe_fraction`, `keyframe_surprise` and `min_fidelity`).
        skip_rate (`torch.FloatTensor` of shape `(B,)`): `1 - |active| / N`, at layer 0.
        cost (`torch.FloatTensor` of shape `(B,)`):
            Multiply-adds spent on this frame, gate and head included, over those of a dense frame.
        token_mask (`torch.BoolTensor` of shape `(B, A)`, *optional*): in mode `eliminate`, see above.
    """

    active_mask: torch.Tensor | None = None
    surprise: torch.Tensor | None = None
    skip_rate: torch.Tensor | None = None
    cost: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None


def encode_frame(
    model: VisionTower,
    pixel_values: torch.Tensor,
    stream: NeuroFlowStream,
    interpolate: bool,
    hidden_states: tuple[int, ...] = (),
) -> NeuroFlowVisionOutput:
    """
    Advance `stream` by one frame of each of its B cameras.

    All checks come before the first write to the stream, so a refused frame changes nothing.

    Args:
        model: the vision model. Its modules are called, so adapters and hooks work; see `shortcuts.py` for exceptions.
        pixel_values: [B, C, H, W], normalised, floating point.
        interpolate: whether other resolutions than the checkpoint's are allowed.
        hidden_states: which to return, as of `requested_hidden_states`. The first frame decides which are kept.
    """
    if not hasattr(stream, "begin_frame"):  # code loaded from the Hub has a stream class of its own
        raise TypeError(f"`stream` is a {type(stream).__name__}; expected what `model.new_stream()` returns.")
    geometry = geometry_of(model, pixel_values, interpolate)
    summary = summary_grid(model, stream.gate, geometry)
    adapter = getattr(model, "sparse_adapter", None)
    if adapter is not None:
        adapter.check(stream.gate)
    mode, exact = MODES[stream.gate.mode], stream.gate.mode == "dense"  # which is the stock model bit for bit
    pooling = model.pooling(exact)
    if pooling is None and stream.gate.min_fidelity is not None:
        raise ValueError("Gate option `min_fidelity` is of the pooled output, and this model has no pooling head.")
    with stream.unchanged_by_errors():
        stream.begin_frame(geometry, hidden_states)
        looking = frame_cost(model, stream.gate, mode, geometry, 0, 0, projected=True, pooling=pooling)
        stream.gate = with_affordable_budget(stream.gate, looking)
        projected = stream.gate.needs_surprise or any(stream.due_keyframes())
        if projected:
            patches = project_patches(model, pixel_values, as_product=not exact)
            signal = patches.detach()
            if stream.gate.signal == "token":
                signal = signal + model.patch_positions(patches, pixel_values, interpolate).detach()
            chosen, surprise, paces = choose_active(stream, signal, geometry.grid, looking)
        else:
            chosen, surprise, paces = nothing_active(geometry), None, stream.pace

    stream.frame_in_progress = True
    fresh: dict[str, torch.Tensor] = {}
    spent = [0] * geometry.batch_size
    active = chosen.with_prefix(model.num_prefix_tokens)
    if active.live:
        hidden = embed_tokens(model, patches, pixel_values, interpolate, chosen, mode.encodes_all_patches)
        fresh, spent = encode(model, hidden, active, stream, mode, summary, adapter)
    kept = remember_outputs(stream, mode, fresh, active)
    if mode.pools_all_patches:
        tokens, token_mask = kept[OUTPUT], None
    else:
        tokens, token_mask = pad_streams(fresh.get(OUTPUT), active, geometry)
    pooled = pool(pooling, stream, tokens, token_mask, active, summary)
    if projected:
        update_references(stream, signal, chosen)
    costs = [
        frame_cost(model, stream.gate, mode, geometry, count, layers, projected, pooling)
        for count, layers in zip(active.counts, spent, strict=True)
    ]
    stream.credit = [
        stream.gate.budget.credit_after(credit, frame, cost)
        for credit, frame, cost in zip(stream.credit, stream.frames, costs, strict=True)
    ]
    stream.frames, stream.pace = [frame + 1 for frame in stream.frames], paces
    stream.frame_in_progress = False

    counts = torch.tensor(chosen.counts, dtype=torch.float32)
    places = range(geometry.num_layers + 1)
    layers = [kept[hidden_state_name(place)].clone() if place in hidden_states else None for place in places]
    return NeuroFlowVisionOutput(
        # copies, since the next frame writes into the memories behind them
        last_hidden_state=tokens.clone() if token_mask is None else tokens,  # type: ignore[arg-type]
        pooler_output=None if pooled is None else pooled.clone(),  # type: ignore[arg-type]
        hidden_states=tuple(layers) if hidden_states else None,  # type: ignore[arg-type]
        active_mask=chosen.mask.unflatten(-1, geometry.grid),
        surprise=None if surprise is None else surprise.unflatten(-1, geometry.grid),
        skip_rate=(1 - counts / geometry.num_patches).to(geometry.device, non_blocking=True),
        cost=torch.tensor(costs, dtype=torch.float32).to(geometry.device, non_blocking=True),
        token_mask=token_mask,
    )


def nothing_active(geometry: StreamGeometry) -> ActiveSet:
    """The active set of a frame whose surprise is not computed."""
    mask = torch.zeros(geometry.batch_size, geometry.num_patches, dtype=torch.bool, device=geometry.device)
    streams = range(geometry.batch_size)
    return ActiveSet(mask, [0 for _ in streams], [False for _ in streams], mask, [(0, 0) for _ in streams])


def geometry_of(model: VisionTower, pixel_values: torch.Tensor, interpolate: bool) -> StreamGeometry:
    """
    Batch size, patch grid, type and device of a frame.

    Raises:
        ValueError: if the pixel values have a wrong number of dimensions or channels, are not floating point, or
            their resolution needs `interpolate_pos_encoding=True`; if the streams are to have different adapters.
    """
    config = model.config
    # the towers take square images of square patches; transformers' annotations allow more
    patch_size, image_size = cast(int, config.patch_size), cast(int, config.image_size)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (streams, {config.num_channels}, height, "
            "width). One frame of one stream is a batch of 1: `pixel_values.unsqueeze(0)`."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}; expected floating point, normalised by the image processor."
        )
    height, width = pixel_values.shape[2:]
    grid = (height // patch_size, width // patch_size)
    if 0 in grid:
        raise ValueError(f"A frame of {height}x{width} pixels holds no {patch_size}-pixel patch.")
    native = image_size // patch_size
    if not interpolate and grid != (native, native):
        raise ValueError(
            f"A frame of {height}x{width} pixels has {grid[0]}x{grid[1]} patches, the checkpoint has positions for "
            f"{native}x{native} ({image_size} pixels). Pass `interpolate_pos_encoding=True` or resize."
        )
    if len(pixel_values) > 1:
        refuse_adapters_by_stream(model)
    device_type = pixel_values.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return StreamGeometry(
        batch_size=len(pixel_values),
        grid=grid,
        hidden_size=config.hidden_size,
        num_layers=len(model.encoder_layers()),
        num_heads=config.num_attention_heads,
        dtype=torch.get_autocast_dtype(device_type) if autocast else model.patch_projection().weight.dtype,
        device=pixel_values.device,
        num_prefix_tokens=model.num_prefix_tokens,
    )


def summary_grid(model: VisionTower, gate: NeuroFlowGateConfig, geometry: StreamGeometry) -> SummaryGrid | None:
    """
    The cells of the summary tokens; None without any.

    Raises:
        ValueError: if a cell would have no patch, or the attention cannot add to scores.
    """
    if not gate.summary_tokens:
        return None
    summary = SummaryGrid(geometry.grid, gate.summary_tokens, geometry.dtype, geometry.device)
    attention = model.config._attn_implementation
    if summary.side > min(geometry.grid):
        raise ValueError(
            f"Gate option `summary_tokens` {gate.summary_tokens} needs {summary.side}x{summary.side} patches or more, "
            f"and a frame has {geometry.grid[0]}x{geometry.grid[1]}; choose at most {min(geometry.grid) ** 2}."
        )
    if attention not in ("eager", "sdpa"):
        raise ValueError(
            f"Gate option `summary_tokens` adds to attention scores, which `{attention}` cannot; call "
            '`model.set_attn_implementation("sdpa")`.'
        )
    return summary


def refuse_adapters_by_stream(model: VisionTower) -> None:
    """
    Raise a ValueError if each stream of a batch is to have an adapter of its own (PEFT's `adapter_names`). Active
    patches of all streams pass through the layers as rows of one matrix, in which adapters cannot be told apart.
    """
    for module in model.modules():
        if any("adapter_names" in getattr(hook, "keywords", {}) for hook in module._forward_pre_hooks.values()):
            # PEFT leaves its hooks behind when a forward raises, and later calls would fail, too
            for layer in model.modules():
                for key, hook in list(layer._forward_pre_hooks.items()):
                    if "adapter_names" in getattr(hook, "keywords", {}):
                        del layer._forward_pre_hooks[key]
                        layer._forward_pre_hooks_with_kwargs.pop(key, None)
            raise ValueError(
                "`adapter_names` is not supported with a stream. Give each adapter a stream of its own: call "
                "`model.set_adapter(name)` before the frames of that stream."
            )


def encode(
    model: VisionTower,
    hidden: torch.Tensor,
    active: ActiveSet,
    stream: NeuroFlowStream,
    mode: ModeSpec,
    summary: SummaryGrid | None,
    adapter: SparseAdapter | None,
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """
    Pass `hidden` through all encoder layers and the final layer norm: the outputs by the names of their memories, and
    the multiply-adds that each stream took.
    """
    spent, dim = [0] * len(active.counts), model.config.hidden_size
    names = {index: hidden_state_name(index) for index in stream.hidden_states}
    fresh = {names[0]: hidden} if 0 in names else {}
    corrections = []
    if mode.corrects_stale and not all(active.keyframes):
        corrections = build_corrections(stream.memory[OUTPUT], active)
    layers = model.encoder_layers()
    adapters = [NO_ADAPTER] * len(layers) if adapter is None else adapter.of_layers(active)
    for number, (layer, changes) in enumerate(zip(layers, adapters, strict=True)):
        # A checkpointed layer would run again in the backward pass, with memories of a later frame. In evaluation no
        # layer is checkpointed, and the flags stay as they are: threads may share the model.
        checkpointed = layer.training and layer.gradient_checkpointing
        try:
            if checkpointed:
                layer.gradient_checkpointing = False
            step = LayerStep(mode, number, active, stream.memory, corrections, summary, changes)
            hidden = layer(hidden, None, step=step)
        finally:
            if checkpointed:
                layer.gradient_checkpointing = True
        spent = [before + added for before, added in zip(spent, step.multiply_adds, strict=True)]
        if number + 1 in names:
            fresh[names[number + 1]] = hidden
    fresh[OUTPUT] = model.final_norm(hidden)
    if summary is not None and not mode.pools_all_patches:
        remember_summary(stream.memory, SUMMARY_OUTPUT, fresh[OUTPUT], active, summary)
    for correction in corrections:
        spent[correction.stream] += weights_cost(correction, dim)
        for name, rows in fresh.items():
            correction.apply(stream.memory, name, rows)
            spent[correction.stream] += correction.multiply_adds(dim)
    return fresh, spent


def remember_outputs(
    stream: NeuroFlowStream, mode: ModeSpec, fresh: dict[str, torch.Tensor], active: ActiveSet
) -> dict[str, torch.Tensor]:
    """
    Store the encoder's outputs, by the names of their memories, and return all of these, [B, T, D] each. `fresh` is
    empty if nothing was active; in mode `eliminate`, outputs are not stored.
    """
    memory = stream.memory
    if not mode.pools_all_patches:
        return {}
    if mode.encodes_all_patches:
        kept = {name: active.remember_streams(memory, name, output) for name, output in fresh.items()}
    else:
        kept = {name: active.remember(memory, name, blend(stream, name, rows, active)) for name, rows in fresh.items()}
    return kept or memory


def blend(stream: NeuroFlowStream, name: str, fresh: torch.Tensor, active: ActiveSet) -> torch.Tensor:
    """`(1 - b) C + b z` for rows [M, D], with b the `memory_blend`; rows of keyframes are returned as they are."""
    share = stream.gate.memory_blend
    if share == 1 or all(active.keyframes):
        return fresh
    blended = torch.lerp(active.gather(stream.memory[name]), fresh, share)
    if not any(active.keyframes):
        return blended
    plain = torch.tensor(active.keyframes).repeat_interleave(torch.tensor(active.counts)).to(fresh.device)
    return torch.where(plain.unsqueeze(1), fresh, blended)


def pad_streams(
    rows: torch.Tensor | None, active: ActiveSet, geometry: StreamGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, D] as [B, A, D], zeros after a stream's last active token, and the mask of real tokens [B, A]."""
    counts, most = active.counts, max(active.counts)
    token_mask = torch.arange(most).unsqueeze(0) < torch.tensor(counts).unsqueeze(1)
    token_mask = token_mask.to(geometry.device, non_blocking=True)
    if rows is None:
        rows = torch.zeros(0, geometry.hidden_size, dtype=geometry.dtype, device=geometry.device)
    if min(counts) == most:
        return rows.view(len(counts), most, geometry.hidden_size), token_mask
    return nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True), token_mask


def pool(
    pooling: Pooling | None,
    stream: NeuroFlowStream,
    tokens: torch.Tensor,
    token_mask: torch.Tensor | None,
    active: ActiveSet,
    summary: SummaryGrid | None,
) -> torch.Tensor | None:
    """The embeddings [B, D]: pooled for streams with an active patch, the stored ones for the others."""
    if pooling is None:
        return None

    def head(batch: torch.Tensor, streams: list[int]) -> torch.Tensor:
        if summary is not None and token_mask is not None and batch.shape[1] < active.num_tokens:
            return pooling.pool_with_summary(batch, stream.memory[SUMMARY_OUTPUT][streams], summary)
        return pooling.pool(batch)

    if not active.live:
        return stream.memory[POOLED]
    if token_mask is None or len(set(active.counts)) == 1:
        fresh = head(active.of_live(tokens), active.live)
    else:
        fresh = torch.cat([head(tokens[index : index + 1, : active.counts[index]], [index]) for index in active.live])
    if stream.gate.min_fidelity is not None:
        before = stream.memory[POOLED][active.live] if POOLED in stream.memory else fresh
        wide = torch.promote_types(fresh.dtype, torch.float32)
        change = 1 - nn.functional.cosine_similarity(fresh.to(wide), before.to(wide), dim=-1)
        active.remember_streams(stream.memory, POOLED_CHANGE, change)
    return active.remember_streams(stream.memory, POOLED, fresh)


def frame_cost(
    model: VisionTower,
    gate: NeuroFlowGateConfig,
    mode: ModeSpec,
    geometry: StreamGeometry,
    active: int,
    layers: int,
    projected: bool,
    pooling: Pooling | None,
) -> float:
    """
    Multiply-adds of one stream's frame over those of a dense frame: with `active` active tokens, and `layers`
    multiply-adds in the encoder's layers.
    """
    patches, tokens, dim = geometry.num_patches, geometry.num_tokens, geometry.hidden_size
    projection = projection_cost(patches, dim, model.config.num_channels * cast(int, model.config.patch_size) ** 2)
    inner = model.encoder_layers()[0].parts().inner
    dense = projection + encoder_cost(tokens, geometry.num_layers, dim, inner)
    if pooling is not None:
        dense += pooling.dense_cost(tokens)

    spent = projection if projected else 0
    if gate.needs_surprise:
        spent += gate_cost(patches, dim, len(gate.references))
    if active:
        spent += layers
        if pooling is not None:
            with_summary = gate.summary_tokens > 0 and not mode.pools_all_patches and active < tokens
            pooled = tokens if mode.pools_all_patches else active + with_summary * gate.summary_tokens
            spent += pooling.cost(pooled, with_summary)
    return spent / dense
