"""Tiny random Llama models."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Kernels do the same for fused and for separate weights where heads and MLP fill whole vectors, as checkpoints have:
# heads of a multiple of 16, an MLP of a multiple of 64, and `silu`. Then logits are equal to the last bit.
TINY_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_llama(seed=0, attention="sdpa", **options):
    """A `LlamaForCausalLM` whose attention is far from uniform and whose logits are far apart."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(LlamaConfig(**TINY_LLAMA | options), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.9 / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(2)
    return model.eval()
