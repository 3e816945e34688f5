"""
How much of a clip do fewer image tokens keep, and what do they save: in the tower, and in the language model?

    OMP_NUM_THREADS=1 python -m eval.vision.static_tokens

T frames of a clip, every fourth, go through the real small tower and are pooled 2x2 to N tokens a frame, as in
LLaVA-OneVision. `faithful` and `balanced` keep the tokens of which the gate encoded a patch (`gate`), or the tokens
whose streamed features are furthest from the last token kept at their place (`min_change`). Baselines with the same
number of tokens: whole frames at even distances, where the tower encodes no other frames; the rule of vLLM's EVS,
which encodes all frames and keeps the tokens that differ most from the frame before; and `min_change` after the dense
tower. Fidelity is the cosine to the dense token over the frames after the first, where each token that was left out is
replaced by the last one kept at its place.

Multiply-adds are those of LLaVA-OneVision 7B, the tower's in the proportion that the small tower had. Processor time
is the small tower's, plus a language model of Qwen2 0.5B's sizes with random weights, of which one layer is measured
and multiplied. Answers are not measured. Writes `eval/results/static_tokens.json`, shown in `docs/guides/vlms.md`.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity
from transformers import Qwen2Config, Qwen2Model

from eval.docs.speed import static_tokens_table
from eval.report import RESULTS, provenance, publish, rounded
from eval.vision.clip_recorder import load_clip
from neuroflow_hf import NeuroFlowSiglipVisionModel
from neuroflow_hf.attachment.static_tokens import changed_since_kept
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.cost import dense_frame
from recipes.siglip_dinov2_small.build import build_tower, default_tower_dir

CLIPS = {
    "fixed camera": ("walker", "dancer", "treadmill", "webcam", "object-stops"),
    "moving camera": ("pan", "hand-held", "city-by-night"),
}
PRESETS = ("faithful", "balanced")
FIXED_SHARE = 0.3  # share of the tokens, compared at in addition to the shares that the gate keeps
EVERY, FRAMES, PROMPT = 4, 24, 32  # the last: words of the prompt
# of LLaVA-OneVision 7B, whose tokens are 14 x 14 a frame
TOWER_7B = {"num_patches": 729, "num_layers": 26, "dim": 1152, "inner": 4304, "patch_features": 588, "num_heads": 16}
TOKENS_7B, WIDTH_7B, INNER_7B, LAYERS_7B, KEY_VALUE_7B = 196, 3584, 18944, 28, 512
QWEN2_HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
LAYERS_HALF, REPEATS = 24, 3
TOKEN_COUNTS = (128, 512, 1024, 1568)


def pooled(patches: Tensor) -> Tensor:
    """Tokens [T, N / 4, D], averages over 2x2 patches [T, N, D] of a square grid."""
    side = int(patches.shape[1] ** 0.5)
    return avg_pool2d(patches.mT.unflatten(-1, (side, side)), 2).flatten(2).mT


def most_changed(tokens: Tensor, count: int) -> Tensor:
    """EVS: mask [T, N] of the first frame's tokens, and of those least like the frame before, `count` in all."""
    change = 1 - cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
    change = torch.cat([torch.full_like(change[:1], torch.inf), change]).flatten()
    mask = torch.zeros_like(change, dtype=torch.bool)
    mask[change.argsort(descending=True, stable=True)[:count]] = True
    return mask.view(tokens.shape[:2])


def even_frames(num_frames: int, kept: int) -> Tensor:
    """Mask [T] of frames at even distances, the first among them."""
    mask = torch.zeros(num_frames, dtype=torch.bool)
    mask[torch.arange(kept) * num_frames // kept] = True
    return mask


def cosines(tokens: Tensor, mask: Tensor, dense: Tensor) -> np.ndarray:
    """Cosines [T - 1, N] to dense [T, N, D], where the last kept token replaces those that were left out."""
    numbers = torch.arange(len(mask))[:, None].expand(mask.shape)
    last = torch.where(mask, numbers, 0).cummax(0).values
    shown = tokens.gather(0, last[..., None].expand(tokens.shape))
    return cosine_similarity(shown[1:], dense[1:], dim=-1).numpy()


def figures(found: np.ndarray, mask: Tensor, tower: float, seconds: float) -> dict[str, float]:
    """Fidelity, share of the tokens kept, and the tower's cost relative to dense and its processor time."""
    fidelity = {"mean": float(found.mean()), "p5": float(np.percentile(found, 5))}
    return fidelity | {"kept": mask.float().mean().item(), "tower": tower, "tower_seconds": seconds}


def mixed(low: dict, high: dict, kept: float) -> dict:
    """The mixture of two settings that keeps this share of the tokens."""
    weight = 0 if high["kept"] == low["kept"] else (kept - low["kept"]) / (high["kept"] - low["kept"])
    return {name: (1 - weight) * low[name] + weight * high[name] for name in low}


def timed(call: Callable) -> tuple[list, float]:
    """The results of a generator, and the processor time that they took."""
    begun = time.process_time()
    return list(call()), time.process_time() - begun


def least_change(tokens: Tensor, count: int) -> Tensor:
    """`changed_since_kept` with the smallest `min_change` that keeps no more than `count` of tokens [T, N]."""
    low, high = -1.0, 2.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if changed_since_kept(tokens, [0], middle).sum() > count else (low, middle)
    return changed_since_kept(tokens, [0], high)


def even(dense: Tensor, kept: float, seconds: float) -> dict[str, float]:
    """Figures of frames at even distances that keep this share of the tokens, of which the tower sees no others."""
    ends = []
    for count in (int(kept * len(dense)), min(int(kept * len(dense)) + 1, len(dense))):
        mask = even_frames(len(dense), count)[:, None].expand(dense.shape[:2])
        share = count / len(dense)
        ends.append(figures(cosines(dense, mask, dense), mask, share, share * seconds))
    return mixed(*ends, kept)


def measure(model: NeuroFlowSiglipVisionModel, pixels: list[Tensor]) -> dict[tuple[str, str], dict]:
    """Figures of a clip by tokens kept and method."""
    outputs, seconds = timed(lambda: (model(frame) for frame in pixels))
    dense = pooled(torch.cat([one.last_hidden_state for one in outputs]))
    streams, counts = {"dense": (dense, torch.ones(dense.shape[:2]) > 0, 1.0, seconds)}, {}
    for preset in PRESETS:
        outputs, own_seconds = timed(lambda preset=preset: model.stream_frames(pixels, preset=preset))
        tokens = pooled(torch.cat([one.last_hidden_state for one in outputs]))
        active = torch.cat([one.active_mask for one in outputs]).flatten(1).unsqueeze(-1)
        gate = pooled(active.float()).squeeze(-1) > 0
        streams[preset] = tokens, gate, torch.cat([one.cost for one in outputs]).mean().item(), own_seconds
        counts[f"{preset}'s gate"] = int(gate.sum())
    counts["fixed"] = int(FIXED_SHARE * dense[..., 0].numel())
    found = {}
    for head, count in counts.items():
        of_head = {"even frames": even(dense, count / dense[..., 0].numel(), seconds)}
        of_head["EVS"] = figures(cosines(dense, mask := most_changed(dense, count), dense), mask, 1, seconds)
        for name, (tokens, gate, cost, own_seconds) in streams.items():
            if name in PRESETS and "gate" in head and name not in head:
                continue
            masks = {f"{name}, gate": gate} if name in head else {}
            for key, mask in (masks | {f"{name}, min_change": least_change(tokens, count)}).items():
                of_head[key] = figures(cosines(tokens, mask, dense), mask, cost, own_seconds)
        found |= {(head, name): row for name, row in of_head.items()}
    return found


def multiply_adds_7b(tokens: float) -> float:
    """Of the language model's layers: projections and MLP, and attention in full."""
    weights = 2 * WIDTH_7B * (WIDTH_7B + KEY_VALUE_7B) + 3 * WIDTH_7B * INNER_7B
    return LAYERS_7B * (tokens * weights + 2 * tokens**2 * WIDTH_7B)


def seconds_of_prefill() -> np.ndarray:
    """Processor time of all layers by number of tokens, as a polynomial."""
    config = Qwen2Config(**QWEN2_HALF, num_hidden_layers=1, vocab_size=8)
    model = Qwen2Model(config).eval()
    least = []
    for count in TOKEN_COUNTS:
        inputs = torch.randn(1, count, config.hidden_size)
        runs = [timed(lambda inputs=inputs: [model(inputs_embeds=inputs, use_cache=False)])[1] for _ in range(REPEATS)]
        least.append(LAYERS_HALF * min(runs))
    return np.polyfit(TOKEN_COUNTS, least, 2)


def with_language_model(row: dict, frames: int, per_frame: int, polynomial: np.ndarray) -> dict:
    """A row with the cost and the time of the language model, and the sums."""
    whole_tower = dense_frame(**TOWER_7B, pooled=False) * frames
    tower, text = row["tower"] * whole_tower, multiply_adds_7b(row["kept"] * frames * TOKENS_7B + PROMPT)
    whole = whole_tower + multiply_adds_7b(frames * TOKENS_7B + PROMPT)
    seconds = float(np.polyval(polynomial, row["kept"] * frames * per_frame + PROMPT))
    return row | {
        "tower_share": tower / whole,
        "prefill_share": text / whole,
        "cost": (tower + text) / whole,
        "prefill_seconds": seconds,
        "seconds": row["tower_seconds"] + seconds,
    }


@torch.inference_mode()
def main(output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "static_tokens.json"):
    """Measure the clips and the layer, and write the report."""
    folder = build_tower(default_tower_dir())
    model = NeuroFlowSiglipVisionModel.from_pretrained(folder, vision_use_head=False).eval()
    preprocess, polynomial, rows = Preprocessor.from_pretrained(folder), seconds_of_prefill(), []
    for kind, names in CLIPS.items():
        clips: list[dict[tuple[str, str], dict]] = []
        for name in names:
            pictures = itertools.islice(load_clip(name, folder.parent).frames(), 0, EVERY * FRAMES, EVERY)
            pixels = [preprocess(picture, model.dtype) for picture in pictures]
            per_frame = (model.config.image_size // model.config.patch_size) ** 2 // 4
            found = measure(model, pixels)
            clips.append(
                {key: with_language_model(row, len(pixels), per_frame, polynomial) for key, row in found.items()}
            )
            Console(stderr=True).print(f"{name} is measured.")
        for at in clips[0]:
            means = {key: float(np.mean([clip[at][key] for clip in clips])) for key in clips[0][at]}
            rows.append({"clips": kind, "count": len(clips), "at": at[0], "method": at[1], **means})
    report = {**provenance(), "clips": CLIPS, "every": EVERY, "frames": FRAMES, "prompt": PROMPT, "rows": rows}
    report = rounded(report)
    publish(output, report, static_tokens_table(report))


if __name__ == "__main__":
    typer.run(main)
