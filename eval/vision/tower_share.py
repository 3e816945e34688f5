"""
What share of a whole forward pass is the SigLIP tower's, in Gemma 3 4B and in pi0?

    python -m eval.vision.tower_share

Multiply-adds of matrix products and attention are counted by torch on the meta device, which computes nothing, at the
sizes of the published configurations. Gemma 3 4B: images and a prompt, up to the first token of the answer. pi0:
cameras and a prompt, one step of control with ten steps of denoising. Attention is counted in full, also what masks
leave out. Writes `eval/results/tower_share.json` and a table of `docs/guides/vlms.md`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PI0Config, PI0ForConditionalGeneration

from eval.docs.speed import tower_share_table
from eval.report import RESULTS, provenance, publish

GEMMA3_4B = {
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 256,
}
PI0_BASE: dict = {}  # the defaults of transformers' configuration
PROMPT_TOKENS = {"Gemma 3 4B": 64, "pi0": 48}


def multiply_adds(call: Callable) -> int:
    """Half of the floating point operations that torch counts in a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def of_gemma3(options: dict, images: int, prompt: int) -> tuple[int, int]:
    """Multiply-adds of the tower, and of all up to the first token of the answer."""
    config = Gemma3Config(**options)
    vision, tokens = config.vision_config, images * config.mm_tokens_per_image + prompt
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config).eval()
        model.set_attn_implementation("eager")
        pixels = torch.zeros(images, 3, vision.image_size, vision.image_size)
        inputs = {
            "inputs_embeds": torch.zeros(1, tokens, config.text_config.hidden_size),
            # given, since making them would read values, which the meta device has not
            "attention_mask": dict.fromkeys(
                ("full_attention", "sliding_attention"), torch.zeros(1, 1, tokens, tokens)
            ),
            "position_ids": torch.zeros(1, tokens, dtype=torch.long),
        }
        tower = multiply_adds(lambda: model.model.vision_tower(pixels))
        features = multiply_adds(lambda: model.get_image_features(pixels))
        text = multiply_adds(lambda: model(**inputs, use_cache=False, logits_to_keep=1))
    return tower, features + text


def of_pi0(options: dict, cameras: int, prompt: int) -> tuple[int, int]:
    """Multiply-adds of the tower, and of a whole step of control."""
    config = PI0Config(**options)
    vision = config.vlm_config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    with torch.device("meta"):
        model = PI0ForConditionalGeneration(config).eval().to("meta")  # a buffer may have been made on the CPU
        model.set_attn_implementation("eager")
        pixels = torch.zeros(1, cameras, 3, vision.image_size, vision.image_size)
        ids = torch.zeros(1, cameras * patches + prompt, dtype=torch.long)
        inputs = {
            "state": torch.zeros(1, config.max_state_dim),
            "noise": torch.zeros(1, config.chunk_size, config.max_action_dim),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_attention_mask": torch.ones(1, cameras, dtype=torch.bool),
        }
        tower = multiply_adds(lambda: model.model.vlm.vision_tower(pixels[0]))
        whole = multiply_adds(lambda: model.sample_actions(pixel_values=pixels, **inputs))
    return tower, whole


def main(output: Annotated[Path, typer.Option(help="The JSON file.")] = RESULTS / "tower_share.json"):
    """Count the multiply-adds of the tower and of the whole model."""
    models = {"Gemma 3 4B": (of_gemma3, GEMMA3_4B, (1, 4, 16)), "pi0": (of_pi0, PI0_BASE, (1, 2, 3))}
    rows = []
    for name, (count, options, numbers) in models.items():
        for images in numbers:
            tower, whole = count(options, images, PROMPT_TOKENS[name])
            rows.append({"model": name, "images": images, "tower": tower, "whole": whole, "share": tower / whole})
    report = {**provenance(), "prompt_tokens": PROMPT_TOKENS, "rows": rows}
    publish(output, report, tower_share_table(report))


if __name__ == "__main__":
    typer.run(main)
