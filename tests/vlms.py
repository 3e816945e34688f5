"""Tiny random models that have a SigLIP tower inside, and a way to ask each about images."""

from dataclasses import dataclass

import torch
import transformers
from torch import nn

from tests.conftest import TINY_VISION, lively, random_video

IMAGE, VIDEO = 97, 98
VISION = {"model_type": "siglip_vision_model", **TINY_VISION, "vision_use_head": False}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 99, "max_position_embeddings": 512}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Tiny:
    """
    A model class with a SigLIP tower.

    Args:
        model_class: its name in transformers.
        reads: the output of the tower that it reads.
        call: the method that is asked about images: `generate`, `sample_actions` or `forward`.
        tokens: how many tokens of the text one image takes.
        config: the configuration's parts; `text` stands for the text model's type.
    """

    model_class: str
    reads: str
    call: str
    tokens: int
    config: dict

    def build(self, **options) -> nn.Module:
        """A random model in float64; `options` go to the configuration."""
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model = lively(model_class(model_class.config_class(**{**self.config, **options}))).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "vision_" not in name:
                    parameter.normal_(std=0.2)  # as they are, some are 0, and answers do not depend on the images
        return model

    @torch.no_grad()
    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """What the model makes of the tower's output for images or frames [R, C, H, W]."""
        if self.model_class.startswith("Llava"):
            return model.get_video_features(images.unsqueeze(0)).pooler_output
        owner = [module for module in model.modules() if hasattr(module, "get_image_features")][-1]
        images = images.unsqueeze(0) if self.model_class.startswith("ModernVBert") else images
        pooled = owner.get_image_features(images).pooler_output
        return pooled if isinstance(pooled, torch.Tensor) else torch.cat(pooled)

    @torch.no_grad()
    def ask(self, model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The model's answer about images or frames [R, C, H, W]: tokens and logits, actions, or logits."""
        inputs = {"pixel_values": images}
        tokens = [IMAGE] * self.tokens * len(images)
        if self.model_class.startswith("Llava"):
            inputs, tokens = {"pixel_values_videos": images.unsqueeze(0)}, [VIDEO] * (self.tokens * len(images) + 1)
        elif self.call == "sample_actions" or self.model_class.startswith("ModernVBert"):
            inputs = {"pixel_values": images.unsqueeze(0)}
        inputs["input_ids"] = torch.tensor([[1, 5, *tokens, 7, 8]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if self.call == "forward":
            return (model(**inputs).logits,)
        if self.call == "sample_actions":
            noise = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).double()
            mask = torch.ones(1, len(images), dtype=torch.bool)
            state = torch.zeros(1, 4).double()
            return (model.sample_actions(state=state, noise=noise, pixel_attention_mask=mask, **inputs),)
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        answer = model.generate(**inputs, **options)
        return answer.sequences, torch.stack(answer.logits)


def still_and_moving(frames: int) -> torch.Tensor:
    """Two clips [2, T, C, H, W] in float64: one of a single picture, one of which little changes."""
    moving = torch.cat(random_video(frames, changed=0.05)).double()
    return torch.stack([moving[:1].expand_as(moving), moving])


def vlm(text: str, **options) -> dict:
    """A configuration with a text model of this type."""
    return {"text_config": {**TEXT, "model_type": text}, "vision_config": VISION, **options}


GEMMA3 = vlm("gemma3_text", mm_tokens_per_image=9, image_token_index=IMAGE)
PALIGEMMA = vlm("gemma", projection_dim=32, image_token_index=IMAGE)
T5GEMMA2 = vlm("t5gemma2_text", mm_tokens_per_image=9, image_token_index=IMAGE)
PI0 = {
    "vlm_config": {**PALIGEMMA, "model_type": "paligemma"},
    "dit_config": {**TEXT, "model_type": "gemma"},
    "chunk_size": 3,
    "max_state_dim": 4,
    "max_action_dim": 4,
    "num_inference_steps": 2,
}
LLAVA = vlm("qwen2", image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[24, 24]])
COMMAND_A = vlm("cohere2", image_token_id=IMAGE, alignment_intermediate_size=32)
MODELS = {
    "Gemma 3": Tiny("Gemma3ForConditionalGeneration", "last_hidden_state", "generate", 9, GEMMA3),
    "PaliGemma": Tiny("PaliGemmaForConditionalGeneration", "last_hidden_state", "generate", 36, PALIGEMMA),
    "LLaVA-OneVision": Tiny("LlavaOnevisionForConditionalGeneration", "hidden_states", "generate", 9, LLAVA),
    "Aya Vision": Tiny(
        "AyaVisionForConditionalGeneration", "hidden_states", "generate", 9, vlm("cohere2", image_token_index=IMAGE)
    ),
    "Command A Vision": Tiny("Cohere2VisionForConditionalGeneration", "last_hidden_state", "generate", 9, COMMAND_A),
    "DeepSeek-VL": Tiny(
        "DeepseekVLForConditionalGeneration", "last_hidden_state", "generate", 36, vlm("llama", image_token_id=IMAGE)
    ),
    "T5Gemma 2": Tiny(
        "T5Gemma2ForConditionalGeneration",
        "last_hidden_state",
        "generate",
        9,
        {"encoder": T5GEMMA2, "decoder": TEXT, "image_token_index": IMAGE, "eoi_token_index": 96},
    ),
    "ShieldGemma 2": Tiny(
        "ShieldGemma2ForImageClassification",
        "last_hidden_state",
        "forward",
        9,
        {**GEMMA3, "yes_token_index": 3, "no_token_index": 4},
    ),
    "ModernVBERT": Tiny(
        "ModernVBertForMaskedLM",
        "last_hidden_state",
        "forward",
        9,
        vlm("modernbert", pixel_shuffle_factor=2, image_token_id=IMAGE),
    ),
    "pi0": Tiny("PI0ForConditionalGeneration", "last_hidden_state", "sample_actions", 36, PI0),
}
