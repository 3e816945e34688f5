"""
What differs from one vision tower to another. The engine asks these questions of a model and of its encoder layers,
and each `modeling_neuroflow_*` file answers them with its own modules. N patches, R prefix tokens before them (a CLS
token, registers), T = R + N tokens in all, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

if TYPE_CHECKING:  # which import this module
    from .modes import LayerStep
    from .pooling import Pooling


def unscaled(features: Tensor) -> Tensor:
    """The features as they are, for towers without a scale at the end of a residual branch."""
    return features


@dataclass(eq=False, slots=True)
class LayerParts:
    """
    An encoder layer's parts under one name in all towers. A layer computes

        hidden = hidden + scale1(output(softmax(query key^T * scaling) value))   of norm1(hidden)
        hidden = hidden + scale2(mlp(norm2(hidden)))

    Args:
        attention: the whole attention, [B, T, D] to a tuple of [B, T, D] and weights. `query`, `key`, `value` and
            `output` are its projections.
        eager: the tower's own function for the attention implementation `"eager"`.
        dropout: of attention weights, in training.
        dim, inner: D and the width inside the MLP; from the configuration, since adapters may have replaced the
            modules. An MLP of three products counts as one of two that is half as wide again.
    """

    norm1: nn.LayerNorm
    attention: Any
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    eager: Callable
    num_heads: int
    scaling: float
    dropout: float
    dim: int
    inner: int
    scale1: Callable[[Tensor], Tensor] = unscaled
    scale2: Callable[[Tensor], Tensor] = unscaled


class TowerLayer(GradientCheckpointingLayer):
    """
    An encoder layer that takes a `step`; with one, it runs the layer function of the stream's mode. To be named before
    the stock layer among the bases. `parts` has the names that most towers of transformers use.
    """

    eager: Callable

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        step: "LayerStep | None" = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """`hidden_states` [B, T, D] without a step; with one, what the mode passes through its layers."""
        if step is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]  # the stock layer's
        return step.mode.layer(self.parts(), hidden_states, step)

    def parts(self: Any) -> LayerParts:
        """The layer's parts."""
        attention = self.self_attn
        return LayerParts(
            norm1=self.layer_norm1,
            attention=attention,
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            output=attention.out_proj,
            norm2=self.layer_norm2,
            mlp=self.mlp,
            eager=self.eager,
            num_heads=attention.num_heads,
            scaling=attention.scale,
            dropout=attention.dropout,
            dim=attention.config.hidden_size,
            inner=attention.config.intermediate_size,
        )


class VisionTower(nn.Module):
    """A vision model, as the engine sees it. To be named before the stock model among the bases."""

    config: Any
    num_prefix_tokens: int = 0  # R. They are encoded wherever a patch of their stream is, and no gate looks at them
    bicubic_embeddings: type | None = None  # the stock class, if its `interpolate_pos_encoding` is plainly bicubic

    def patch_projection(self: Any) -> nn.Conv2d:
        """From pixels [B, C, H, W] to patches [B, D, gh, gw]."""
        return self.embeddings.patch_embedding

    def positions(self: Any) -> Tensor:
        """The position embeddings of the checkpoint's own S x S patches, [S * S, D]."""
        embeddings = self.embeddings
        return embeddings.position_embedding(embeddings.position_ids)[0, self.num_prefix_tokens :]

    def patch_positions(self: Any, patches: Tensor, pixel_values: Tensor, interpolate: bool) -> Tensor:
        """The position embeddings of patches [B, N, D], the same for all streams: [N, D]."""
        if not interpolate:
            return self.positions()
        # the stock methods read this shape, and return the CLS token's position first if there is one
        others = min(self.num_prefix_tokens, 1)
        shaped = patches[:1, :1].expand(-1, others + patches.shape[1], -1)
        return self.embeddings.interpolate_pos_encoding(shaped, *pixel_values.shape[2:])[0, others:]

    def position_table(self: Any) -> Tensor | None:
        """`positions`, where those of other resolutions are their bicubic interpolation and nothing else."""
        stock = getattr(self.bicubic_embeddings, "interpolate_pos_encoding", None)
        # an overridden method may do something else, so it is called
        own = getattr(self.embeddings.interpolate_pos_encoding, "__func__", None)
        return self.positions() if own is stock and own is not None else None

    def prefix_tokens(self) -> Tensor:
        """The prefix tokens with their position embeddings, [R, D]; only called if there are any."""
        raise NotImplementedError

    def before_layers(self, tokens: Tensor) -> Tensor:
        """From embedded tokens, [..., D], to the first layer's input."""
        return tokens

    def encoder_layers(self: Any) -> list[TowerLayer]:
        """The encoder's layers."""
        return list(self.encoder.layers)

    def final_norm(self: Any, hidden: Tensor) -> Tensor:
        """From the last layer's output, [..., D], to `last_hidden_state`."""
        return self.post_layernorm(hidden)

    def pooling(self, exact: bool) -> "Pooling | None":
        """How the tokens are pooled on this frame; None without a head. `exact`: bit for bit as the stock model."""
        raise NotImplementedError
