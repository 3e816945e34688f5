"""
Phi-3 whose layers can reuse their last output where a gate says that little changed since the last token.

What differs from transformers' Phi-3: forward and `generate` take `bypass`, options of [`NeuroFlowBypassConfig`], and
the configuration may hold some. Without any, it is Phi-3, bit for bit.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    Phi3ForCausalLM,
    Phi3Model,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.utils import GenerateOutput
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import (
    Phi3DecoderLayer,
    Phi3PreTrainedModel,
    Phi3RMSNorm,
    Phi3RotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .bypass import BypassStep, begin_step, bypassing_layer, layer_index, record_entropy
from .bypass_config import NeuroFlowBypassConfig
from .bypass_state import BypassStatistics, find_state
from .calibration import dense_similarities, percentiles
from .configuration_neuroflow_phi3 import NeuroFlowPhi3Config, adopt_phi3_config, checked_similarities
from .from_llama import phi3_config, phi3_weights
from .lossless_config import NeuroFlowLosslessConfig
from .speculative_decoding import decode_losslessly


class NeuroFlowPhi3DecoderLayer(Phi3DecoderLayer):
    """
    Modifications:

    - `forward` takes a `bypass_step`, by which the gate layer and the cache layers run.
    """

    def forward(  # type: ignore[override]  # what transformers' layer takes is passed on by keyword
        self,
        hidden_states: torch.Tensor,
        bypass_step: BypassStep | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> torch.Tensor:
        """`hidden_states` [B, n, D] to [B, n, D]."""
        if bypass_step is None or not bypass_step.applies_to(layer_index(self)):
            return super().forward(hidden_states, **kwargs)
        return bypassing_layer(self, hidden_states, bypass_step, **kwargs)  # type: ignore[call-arg]  # in `kwargs`


class NeuroFlowPhi3PreTrainedModel(Phi3PreTrainedModel):
    """
    Modifications:

    - `bypass_options` and `bypass_statistics` are added.
    - `save_pretrained` names the classes for every auto class in the configuration.
    """

    config: NeuroFlowPhi3Config
    config_class = NeuroFlowPhi3Config
    _no_split_modules = [*Phi3PreTrainedModel._no_split_modules, "NeuroFlowPhi3DecoderLayer"]
    _can_compile_fullgraph = False  # the host reads the gate's decision
    _auto_classes: tuple[str, ...] = ("AutoModel",)

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        False, so that weights are initialised as in transformers' own models: with custom code, transformers leaves
        out modules without parameters of their own, here the rotary embedding.
        """
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' method; the configuration also names the classes for every auto class."""
        self.config.auto_map = {name: AUTO_MAP[name] for name in ("AutoConfig", *self._auto_classes)}
        super().save_pretrained(*args, **kwargs)

    def bypass_options(
        self, bypass: dict | bool | NeuroFlowBypassConfig | None = None
    ) -> NeuroFlowBypassConfig | None:
        """
        The configuration's options, overridden by a call's, for the model's layers; None for no bypass.

        Args:
            bypass: the call's options; None for the configuration's alone, False for no bypass. A result of this
                method is returned as it is.

        Raises:
            ValueError: for options that do not exist or are out of range, and layers that the model does not have.
            TypeError: for something else.
        """
        if bypass is False or (bypass is None and self.config.bypass is None):
            return None
        if hasattr(bypass, "resolve"):  # instead of `isinstance`: code loaded from the Hub has a class of its own
            return cast(NeuroFlowBypassConfig, bypass)
        if bypass is not None and not isinstance(bypass, dict):
            raise TypeError(f"`bypass` is {bypass!r}; expected a dict of options, None or False.")
        asked = (self.config.bypass, bypass, self.config.num_hidden_layers, self.config.bypass_similarities)
        known = vars(self).get("_resolved_bypass")  # this is called on every step
        if known is None or known[0] != asked:
            options = NeuroFlowBypassConfig.from_options(asked[0], **(bypass or {}))
            known = self._resolved_bypass = (copy.deepcopy(asked), options.resolve(*asked[2:]))
        return known[1]

    @staticmethod
    def bypass_statistics(cache: Cache | None, since: int = 0) -> BypassStatistics:
        """
        How often layers were bypassed in a generation, and how similar the gate's outputs were.

        Args:
            cache: `output.past_key_values` of `generate(..., return_dict_in_generate=True)` or of a forward.
            since: position in the cache to count from, such as the prompt's length.

        Raises:
            ValueError: if there was no bypass.
        """
        state = None if cache is None else find_state(cache)
        if state is None:
            raise ValueError(
                "The cache has seen no bypass: neither the configuration nor the call had options for one."
            )
        return state.statistics(since)


class NeuroFlowPhi3Model(NeuroFlowPhi3PreTrainedModel, Phi3Model):
    """
    Phi-3's decoder, without a head.

    Modifications:

    - `forward` takes `bypass`, except for guards, which need the head's logits.
    - the layers are [`NeuroFlowPhi3DecoderLayer`]s; names and shapes of parameters stay.
    """

    def __init__(self, config: NeuroFlowPhi3Config):
        config = adopt_phi3_config(config)
        Phi3PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [NeuroFlowPhi3DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(  # type: ignore[misc]  # transformers has `position_ids` among the keywords, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        bypass: dict | bool | NeuroFlowBypassConfig | None = None,
        has_head: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        As transformers' method, and

        Args:
            bypass (`dict`, *optional*):
                Options of [`NeuroFlowBypassConfig`] that override those of the configuration; False for no bypass.
                They act on steps of one new token with a cache; all other forwards are dense.
            has_head (`bool`, defaults to `False`): whether a language-model head follows, whose logits guards need.

        Raises:
            ValueError: for bad options, a guard without a head, a cache of fixed size or of another number of
                sequences, and if attentions are requested (bypassed layers have none).
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        options = self.bypass_options(bypass)
        if options is not None and options.is_guarded and not has_head:
            raise ValueError(
                "The bypass option `guard_entropy` needs the logits of the language-model head, and this model has "
                "none. Use `NeuroFlowPhi3ForCausalLM`, or leave the guard out."
            )
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, options = False, None
        if options is None or not (use_cache or past_key_values is not None):
            return super().forward(past_key_values=past_key_values, use_cache=use_cache, **inputs, **kwargs)

        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                "`output_attentions` is not supported with a bypass: a bypassed layer has none. Pass `bypass=False`."
            )
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` was given.")
        step = begin_step(options, past_key_values, (given.shape[0], given.shape[1]), given.device, attention_mask)
        output = super().forward(
            past_key_values=past_key_values, use_cache=use_cache, bypass_step=step, **inputs, **kwargs
        )
        step.finish(past_key_values)
        return output


class NeuroFlowPhi3ForCausalLM(NeuroFlowPhi3PreTrainedModel, Phi3ForCausalLM):
    """
    Phi-3 with its language-model head. Loads any Phi-3 checkpoint (`model_type` `phi3`), no training needed.

    Modifications:

    - the decoder is a [`NeuroFlowPhi3Model`]; `forward` takes `bypass`, with guards.
    - `generate` takes `lossless`.
    - `from_llama` makes one of a loaded Llama.

    Example:

    ```python
    model = NeuroFlowPhi3ForCausalLM.from_pretrained("path/to/phi3")
    output = model.generate(**inputs, bypass={"cache_layers": [24], "threshold": 0.65}, return_dict_in_generate=True)
    model.bypass_statistics(output.past_key_values).rate
    ```
    """

    _auto_classes = ("AutoModel", "AutoModelForCausalLM")

    def __init__(self, config: NeuroFlowPhi3Config):
        config = adopt_phi3_config(config)
        Phi3PreTrainedModel.__init__(self, config)
        self.model = NeuroFlowPhi3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llama(cls, model: LlamaForCausalLM) -> "NeuroFlowPhi3ForCausalLM":
        """
        The same model as a Phi-3, with the same logits. Weights are copied; dtype, device, attention implementation
        and generation configuration are the Llama's.

        Args:
            model: a loaded `LlamaForCausalLM`.

        Raises:
            TypeError: if `model` is something else.
            ValueError: for a Llama with biases, RoPE scaling or heads of another size than the width gives, and for
                weights that are quantised, adapted, hooked, offloaded or on several devices.
        """
        if not isinstance(model, LlamaForCausalLM):
            raise TypeError(
                f"Cannot convert a {type(model).__name__}; expected a loaded transformers `LlamaForCausalLM`."
            )
        config, weights = phi3_config(model.config), phi3_weights(model)
        with torch.device("meta"):  # no memory, and no random weights
            converted = cls(config)
        converted.load_state_dict(weights, assign=True)
        converted.tie_weights()
        converted.model.rotary_emb = Phi3RotaryEmbedding(config)
        for name, frequencies in model.model.rotary_emb.named_buffers():  # which the state dict lacks
            setattr(converted.model.rotary_emb, name, frequencies.clone())
        converted.generation_config = copy.deepcopy(model.generation_config)
        return converted.train(model.training)

    def forward(  # type: ignore[misc]  # transformers has `position_ids` among the keywords, too
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        bypass: dict | bool | NeuroFlowBypassConfig | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        As transformers' method, with `bypass` as in [`NeuroFlowPhi3Model.forward`]. Guards know only the logits of
        `logits_to_keep`: after the cache is cropped to a position without logits, the next step is computed.
        """
        options = self.bypass_options(bypass)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            bypass=False if options is None else options,
            has_head=True,
            return_dict=True,
            **kwargs,
        )
        cache = past_key_values if output.past_key_values is None else output.past_key_values
        if options is not None and options.is_guarded and cache is not None:
            state = find_state(cache)
            if state is not None and state.end == cache.get_seq_length():
                record_entropy(state, output.logits, logits_to_keep)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        lossless: dict | bool | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """
        As transformers' method, with `bypass` among the keywords for the model, and

        Args:
            lossless (`dict` or `bool`, *optional*):
                Options of [`NeuroFlowLosslessConfig`] that override the configuration's, or True for these. The next
                tokens are drafted and then verified by the dense model, in one cache. The text is that of dense
                generation, greedy or, from the same seed, sampled, except where rounding decides between two tokens.
                With `return_dict_in_generate`, the result is a [`NeuroFlowLosslessOutput`] with counts.

        Raises:
            ValueError: with `lossless`, for beams, several sequences, and caches that cannot be cropped; for
                `stop_strings` without a tokenizer.
        """
        if lossless is None or lossless is False:
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]  # wants a Protocol
        options = NeuroFlowLosslessConfig.from_options(lossless, self.config.lossless)
        for name in ("custom_generate", "assistant_model"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` and `lossless` are two ways to decode; pass one of them.")
        # transformers gives a custom decoding method neither the streamer nor, for `stop_strings`, the tokenizer
        decode = functools.partial(decode_losslessly, options=options, streamer=kwargs.get("streamer"))
        strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
        defaults = self.generation_config if generation_config is None else generation_config
        if strings is None and defaults.stop_strings is not None:
            strings, generation_config = defaults.stop_strings, copy.deepcopy(defaults)
            generation_config.stop_strings = None
        if strings is not None:
            if tokenizer is None:
                raise ValueError("`stop_strings` need the tokenizer; pass `tokenizer=`, too.")
            criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
        return super().generate(  # type: ignore[misc]
            inputs, generation_config, *args, custom_generate=decode, **kwargs
        )

    def calibrate_bypass(
        self,
        prompts: Sequence[Sequence[int]],
        gate_layer: int | None = None,
        max_new_tokens: int = 64,
        batch_size: int = 16,
        on_prompts: Callable[[int], object] = lambda done: None,
    ) -> list[float]:
        """
        Continue prompts densely, and store the percentiles of the gate's similarities in
        `config.bypass_similarities`, so that `bypass={"rate": 0.2}` finds its threshold. `save_pretrained` keeps them.

        Args:
            prompts: token ids of each prompt. A few hundred new tokens in all give a threshold whose rate is right
                within a few percentage points on texts of the same kind.
            gate_layer: the gate layer; None for that of the configuration's `bypass`, or 1.
            max_new_tokens: maximum number of tokens to generate after each prompt.
            batch_size: prompts at once.
            on_prompts: called after each batch with the number of prompts finished.

        Returns:
            The 101 percentiles of the similarities.

        Raises:
            ValueError: for a layer that the model does not have, for no prompts or empty ones, and if the model ends
                all texts at their first token.
        """
        if gate_layer is None:
            gate_layer = NeuroFlowBypassConfig.from_options(self.config.bypass).gate_layer
        checked_similarities({str(gate_layer): [0]}, self.config.num_hidden_layers)
        if max_new_tokens < 2:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens}; expected at least 2, for a step to compare.")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("`prompts` holds no prompts, or empty ones; expected the token ids of some texts.")
        similarities: list[float] = []
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            similarities += dense_similarities(self, batch, gate_layer, max_new_tokens)
            on_prompts(begin + len(batch))
        found = percentiles(similarities)
        self.config.bypass_similarities = {**(self.config.bypass_similarities or {}), str(gate_layer): found}
        return found

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """As transformers' method, without this model's bypass options: an `assistant_model` has its own."""
        model_kwargs = {name: value for name, value in kwargs["model_kwargs"].items() if name != "bypass"}
        kwargs |= {"model_kwargs": model_kwargs}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]


CONFIGURATION, MODELING = "configuration_neuroflow_phi3", "modeling_neuroflow_phi3"
AUTO_MAP = {
    "AutoConfig": f"{CONFIGURATION}.NeuroFlowPhi3Config",
    "AutoModel": f"{MODELING}.NeuroFlowPhi3Model",
    "AutoModelForCausalLM": f"{MODELING}.NeuroFlowPhi3ForCausalLM",
}

NeuroFlowPhi3Model.register_for_auto_class("AutoModel")
NeuroFlowPhi3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["NeuroFlowPhi3ForCausalLM", "NeuroFlowPhi3Model"]
