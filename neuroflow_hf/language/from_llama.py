"""
Llama in Phi-3's form. Phi-3 is Llama with the projections for queries, keys and values fused into one, and those for
gate and up, too: the fused weights are Llama's, one below the other.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_neuroflow_phi3 import NeuroFlowPhi3Config
from .plain import are_plain

# fused module: Llama's modules in it, in the order of their rows
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
# what both configurations have, besides what all of transformers' configurations have
SAME_FIELDS = set(LlamaConfig.__annotations__) & set(Phi3Config.__annotations__) - {"rope_parameters", "model_type"}
PLAIN_MODULES = (nn.Linear, nn.Embedding, LlamaRMSNorm)


def phi3_config(config: LlamaConfig) -> NeuroFlowPhi3Config:
    """
    The configuration of the same model as a Phi-3.

    Raises:
        ValueError: for an architecture other than Llama, and for what Phi-3 lacks: biases, RoPE scaling, and heads
            whose size does not follow from the width. All of it is named.
    """
    if config.model_type != LlamaConfig.model_type:
        raise ValueError(f"This is a model of type `{config.model_type}`; expected `llama`.")
    refused = what_phi3_lacks(config)
    if refused:
        raise ValueError(f"This Llama cannot be a Phi-3, which lacks {'; '.join(refused)}.")
    fields: dict[str, Any] = {name: getattr(config, name) for name in SAME_FIELDS}
    converted = NeuroFlowPhi3Config(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": cast(dict, config.rope_parameters)["rope_theta"]},
        sliding_window=None,
        # at this length Phi-3's generation feeds all tokens once more, for RoPE factors that Llama does not have
        original_max_position_embeddings=config.max_position_embeddings,
        dtype=config.dtype,
    )
    converted.name_or_path = config.name_or_path
    converted._attn_implementation = config._attn_implementation
    return converted


def what_phi3_lacks(config: LlamaConfig) -> list[str]:
    """What a Llama's configuration asks for and Phi-3 does not have, in words."""
    lacks = [f"biases (`{name}`)" for name in ("attention_bias", "mlp_bias") if getattr(config, name)]
    rope = cast(dict, config.rope_parameters)["rope_type"]
    if rope != "default":
        lacks.append(f"RoPE scaling of type `{rope}` (`rope_parameters`)")
    heads, width = config.num_attention_heads, config.hidden_size
    if config.head_dim is not None and config.head_dim * heads != width:
        lacks.append(
            f"a head size of its own (`head_dim` {config.head_dim}; a width of {width} with {heads} heads makes it "
            f"{width / heads:g})"
        )
    return lacks


def phi3_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """
    Copies of a Llama's weights, by the names that Phi-3 has for them.

    Raises:
        ValueError: for weights that are quantised, adapted, hooked, offloaded or on several devices.
    """
    require_plain(model)
    stored, weights = model.state_dict(), {}
    for layer in range(model.config.num_hidden_layers):
        for fused, parts in FUSED.items():
            rows = [stored.pop(f"model.layers.{layer}.{part}.weight").detach() for part in parts]
            weights[f"model.layers.{layer}.{fused}.weight"] = torch.cat(rows)
    return weights | {name: weight.detach().clone() for name, weight in stored.items()}


def require_plain(model: LlamaForCausalLM) -> None:
    """Raise a ValueError unless the model is nothing but its weights, and these are at hand on one device."""
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if (weights and type(module) not in PLAIN_MODULES) or not are_plain([module], weights):
            raise ValueError(
                f"`{name or 'model'}` ({type(module).__name__}) is more than its weights, or these are not here. Load "
                "the model without quantisation, offloading and hooks, and merge its adapters first."
            )
    devices = {str(weight.device) for weight in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"The model is on several devices ({', '.join(sorted(devices))}); load it on one.")
