"""
Which loss, which rank and which resolutions train the best adapter on the same small budget?

    python -m eval.vision.distill_variants          # some 20 minutes of one core; run again to continue
    python -m eval.vision.distill_variants --quick  # two steps on two videos, to see it work

The small SigLIP in mode `reconstruct`. Every variant has the same seed, clips and number of steps. Held-out clips come
from other drawings and photographs. Differences to the variant REFERENCE are paired by clip. Gains are of the *last*
weights, not of the best: a loss that does harm shows it.

Writes `eval/results/distill_variants.json`, shown in `docs/results/distillation.md`.
"""

import dataclasses
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.docs.distillation import distill_variants_table
from eval.report import RESULTS, provenance, publish, rounded
from neuroflow_hf.distill import DistillSettings, distill
from neuroflow_hf.evaluation.statistics import mean_interval
from neuroflow_hf.loading import load_model
from recipes.composed_clips import MOTIONS
from recipes.siglip_dinov2_small.build import default_tower_dir
from recipes.siglip_small.sparse_adapter import CHECKPOINT, write_clips

BUDGET = DistillSettings(
    clip_frames=5, frame_stride=6, keyframe_ages=(5, 5), steps=30, evaluate_every=30, summary_tokens=64
)
REFERENCE = "angle"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "as published": {"angle": 0.0, "mse": 1.0, "cosine": 0.5},
    "angle, rank 4": {"rank": 4},
    "angle, rank 64": {"rank": 64},
    "angle, 16 summary tokens": {"summary_tokens": 16},
    "angle, 448 and 224 pixels, measured at 448": {"resolutions": (448, 224)},
}


def gains(variants: dict[str, dict]) -> list[dict]:
    """
    A row for each variant and share: the gain in mean cosine, and its difference to REFERENCE, by clip. A variant that
    is measured at another resolution has no such difference.
    """
    rows = []
    for name, found in variants.items():
        for share, after in found["after"].items():
            gain, usual = (
                [one - other for one, other in zip(to["by_clip"], of["by_clip"], strict=True)]
                for to, of in ((after, found["before"][share]), (after, variants[REFERENCE]["after"][share]))
            )
            row = {"variant": name, "share": share, "seconds": found["seconds"], "mean": after["mean"]}
            row |= {"p5": after["p5"], "before": found["before"][share]["mean"], "cost": after["cost"]}
            row |= {"before_p5": found["before"][share]["p5"], "repeated": after["repeated_mean"]}
            row |= {"gain": sum(gain) / len(gain), "gain_interval": mean_interval(gain)}
            if name != REFERENCE and "resolutions" not in found["changes"]:
                row |= {"to_reference": sum(usual) / len(usual), "to_reference_interval": mean_interval(usual)}
            rows.append(row)
    return rows


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two steps on two videos.")] = False,
):
    """Train and measure every variant that is not yet in the cache, and write the report."""
    console, cache = Console(stderr=True), default_tower_dir().parent / "distilled"
    clips = write_clips(default_tower_dir().parent / "sparse-clips", console)
    wanted = [f"{motion.replace(' ', '-')}-0" for motion in MOTIONS][: 2 if quick else None]
    training, held_out = ([path for path in clips[split] if path.stem in wanted] for split in ("training", "held out"))
    model, preprocess = load_model(CHECKPOINT)
    found = {}
    for name, changes in VARIANTS.items():
        settings = dataclasses.replace(BUDGET, **changes)
        if quick:
            settings = dataclasses.replace(settings, steps=2, evaluate_every=2)
        folder = cache / f"variants{'-quick' * quick}" / name.replace(", ", "-").replace(" ", "-")
        result = distill(training, model, preprocess, folder, settings, held_out, cache=cache / "cache-variants")
        if not result.finished:
            raise typer.Exit(130)
        before, after = (
            {share: dataclasses.asdict(figures) for share, figures in result.held_out[step].items()}
            for step in (0, settings.steps)
        )
        found[name] = {"changes": changes, "seconds": result.seconds, "before": before, "after": after}
        report = {
            **provenance(),
            "settings": dataclasses.asdict(BUDGET),
            "clips": {"training": result.training_clips, "held_out": result.held_out_clips},
            "rows": gains(found),
        }
        output = folder.parent if quick else RESULTS
        publish(output / "distill_variants.json", rounded(report), distill_variants_table(report))


if __name__ == "__main__":
    typer.run(main)
