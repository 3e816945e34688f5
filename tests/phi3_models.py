"""Tiny random Phi-3 models of every kind of checkpoint, and ways to run them."""

import inspect

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from neuroflow_hf import NeuroFlowPhi3ForCausalLM

VOCABULARY = 61
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 7
# transformers 5.17 drops the cache where long RoPE switches, and then goes on without the text before
SWITCHES = "next_sequence_length" in inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)
LONG_AFTER = 16 if SWITCHES else 64
# what stock checkpoints differ in
KINDS = {
    "plain": {},
    "window": {"sliding_window": WINDOW},  # mini 4k
    "longrope": {  # mini 128k
        "max_position_embeddings": 64,
        "original_max_position_embeddings": LONG_AFTER,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
    "partial": {  # Phi-4-mini
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}


# How near two ways to the same numbers are, in relation to their norm. Phi-3's norms and rotations are
# float32 whatever the model's dtype, so float64 would not bring them nearer.
FLOAT32 = 1e-5


def make_stock(kind="plain", seed=0, **options):
    """A `Phi3ForCausalLM`, lively: attention is far from uniform, layers matter, and logits are far apart."""
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(Phi3Config(**TINY | KINDS[kind] | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.9 / parameter.shape[1] ** 0.5)
            if name.endswith("qkv_proj.weight"):
                parameter.mul_(2)
    return model.eval()


def adopt(stock, bypass=None):
    """A NeuroFlow model of the same weights."""
    ours = NeuroFlowPhi3ForCausalLM(stock.config)
    ours.load_state_dict(stock.state_dict())
    ours.set_attn_implementation(stock.config._attn_implementation)
    ours.config.bypass = bypass
    return ours.eval()


def make_ours(kind="plain", seed=0, bypass=None, **options):
    """A NeuroFlow model of a lively stock model's weights."""
    return adopt(make_stock(kind, seed, **options), bypass)


def random_ids(batch_size=1, length=5, seed=0):
    """Token ids [B, T] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch_size, length), generator=generator)


def run_steps(model, ids, prompt_length, cache=None, **kwargs):
    """
    The prompt in one forward, then the other tokens of `ids` [B, T] one by one: logits [B, T - prompt_length + 1, V]
    of the prompt's last token and of those, and the cache.
    """
    with torch.no_grad():
        output = model(ids[:, :prompt_length], past_key_values=cache, use_cache=True, **kwargs)
        logits = [output.logits[:, -1]]
        for position in range(prompt_length, ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, **kwargs)
            logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1), output.past_key_values


def save_checkpoint(folder, tokenizer=None, **options):
    """`folder`, with a tiny NeuroFlow model and its tokenizer."""
    tokenizer = tokenizer or make_tokenizer()
    make_ours(vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer():
    """A tokenizer of one token per character."""
    vocabulary = {
        token: index for index, token in enumerate(["<pad>", "<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between them
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_chat_tokenizer():
    """The same with a chat template, whose control tokens are 30 to 33."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_tokens([AddedToken(role, special=True) for role in roles], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
