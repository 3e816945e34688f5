"""What a distillation writes beside the weights: a report in JSON, a plot, and a model card."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from huggingface_hub import ModelCardData
from matplotlib.figure import Figure

from ..utils.files import report_text, write_whole
from ..utils.plots import BASELINE_FIRST, BASELINE_HELD, OURS, save_plot, tidy
from ..utils.tables import markdown_table
from .measure import HeldOut, plain_values
from .train import DistillResult

HEADERS = ["encoded on a sparse frame", "cost", "held-out clips", "mean cosine to dense", "p5"]


def write_report(result: DistillResult, folder: Path, base: str, command: str) -> list[str]:
    """Write `distill.json`, `distill.png` and `README.md` to a folder; their names."""
    report = {
        "command": command,
        "base_model": base,
        "settings": asdict(result.settings),
        "clips": {"training": result.training_clips, "held_out": result.held_out_clips},
        "seconds": round(result.seconds),
        "best_step": result.best_step,
        "held_out": plain_values(result.held_out),
        "losses": [round(loss, 6) for loss in result.losses],
    }
    write_whole(folder / "distill.json", report_text(report))
    save_plot(plot_distillation(result), folder / "distill.png")
    write_whole(folder / "README.md", card(result, base, command))
    return ["distill.json", "distill.png", "README.md"]


def held_out_rows(result: DistillResult) -> list[list[str]]:
    """Rows for HEADERS: the keyframe repeated, before training, and the weights that were written."""
    rows = []
    for share, before in result.held_out[0].items():
        after = result.held_out[result.best_step][share]
        rows += [
            ("nothing", 0.0, "keyframe repeated", before.repeated_mean, before.repeated_p5),
            (share, before.cost, "before", before.mean, before.p5),
            (share, after.cost, f"after {result.best_step} steps", after.mean, after.p5),
        ]
    rows = list(dict.fromkeys(rows))  # the keyframe repeated is the same for each share
    return [[share, f"{cost:.3f}", name, f"{mean:.4f}", f"{p5:.4f}"] for share, cost, name, mean, p5 in rows]


def held_out_words(step: int, measured: dict[str, HeldOut]) -> str:
    """A line about one measurement."""
    parts = [f"{figures.mean:.4f}, p5 {figures.p5:.4f} ({share})" for share, figures in measured.items()]
    return f"step {step}: held-out cosine {'; '.join(parts)}"


def plot_distillation(result: DistillResult) -> Figure:
    """Panels over the steps: the loss, and for each share the held-out cosine beside the keyframe repeated."""
    shares = list(result.held_out[0])
    figure = Figure(figsize=(9, 2.8 * (1 + len(shares))), layout="constrained")
    losses, *panels = figure.subplots(1 + len(shares), 1, sharex=True)
    steps = np.arange(1, len(result.losses) + 1)
    losses.plot(steps, result.losses, color=BASELINE_HELD, alpha=0.3, linewidth=0.8, label="each step")
    width = max(1, len(steps) // 30)
    smooth = np.convolve(result.losses, np.ones(width) / width, mode="valid")
    losses.plot(steps[width - 1 :], smooth, color=BASELINE_HELD, label=f"mean of {width} steps")
    losses.set_ylabel("loss")
    measured = dict(sorted(result.held_out.items()))
    for share, panel in zip(shares, panels, strict=True):
        for name, style in (("mean", "-"), ("p5", "--")):
            curve = [getattr(figures[share], name) for figures in measured.values()]
            panel.plot(list(measured), curve, style, color=OURS, label=f"distilled, {name}")
            level = getattr(result.held_out[0][share], f"repeated_{name}")
            panel.axhline(level, linestyle=style, color=BASELINE_FIRST, label=f"keyframe repeated, {name}")
        panel.axvline(result.best_step, color=BASELINE_HELD, linewidth=0.8, label="written")
        panel.set_ylabel(f"cosine, {share}")
    panels[-1].set_xlabel("step")
    for panel in (losses, *panels):
        tidy(panel, "y")
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, fontsize=9)
    return figure


def card(result: DistillResult, base: str, command: str) -> str:
    """The card of the adapter, or of the model."""
    settings = result.settings
    about = ModelCardData(base_model=base, library_name="transformers", tags=["neuroflow", "siglip", "video"])
    if settings.method == "lora":
        what = (
            f"A sparse adapter for `{base}` in mode `{settings.mode}`: low-rank weights (rank {settings.rank}, "
            f"{', '.join(settings.targets)}) that apply on sparse frames of a video only. On keyframes, and without a "
            "stream, the model computes what it computed before, to the bit."
        )
        use = (
            "```python\nfrom neuroflow_hf import NeuroFlowSiglipModel\n\n"
            f'model = NeuroFlowSiglipModel.from_pretrained("{base}", sparse_adapter="path/to/this/folder")\n'
            "stream = model.new_stream(keyframe_interval=30)\n```"
        )
    else:
        what = (
            f"The vision tower of `{base}`, all of whose weights were trained for mode `{settings.mode}`. Zero-shot "
            "accuracy is lost by this; compare with the original tower before using it."
        )
        use = (
            "```python\nfrom neuroflow_hf import NeuroFlowSiglipVisionModel\n\n"
            f'model = NeuroFlowSiglipVisionModel.from_pretrained("path/to/this/folder")\n'
            f'stream = model.new_stream(mode="{settings.mode}", keyframe_interval=30)\n```'
        )
    table = markdown_table((HEADERS, held_out_rows(result)))
    return (
        f"---\n{about.to_yaml()}\n---\n\n# {base}, distilled for `{settings.mode}`\n\n{what}\n\n{use}\n\n"
        f"Measured on {result.held_out_clips} held-out clips of {settings.clip_frames} frames, each with a keyframe "
        "at its start. Costs are of a sparse frame, relative to dense; cosines are to the embeddings of the original "
        f"model.\n\n{table}\n\n"
        f"Trained on {result.training_clips} clips in {result.seconds / 60:.0f} minutes:\n\n```\n{command}\n```\n"
    )
