"""
Write the tables of README.md, the documentation and the model cards from the JSON files in eval/results/.

    python -m eval.docs.tables

Each table stands between two comments, `<!-- figures:NAME:begin -->` and `<!-- figures:NAME:end -->`.
"""

from pathlib import Path

from eval.docs import distillation, fidelity, labels, language, speed
from eval.docs.cells import load, spread, table
from eval.report import RESULTS, fill_block, write_whole

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").rglob("README.md"))]
# Recorded with the presets as they were before the controller of the cost budget. To be measured again; then the name
# goes from this list.
BEFORE_CONTROLLER = {"headline_variants"}


def glance_table(
    accuracy: dict, reaction: dict, long_clips: dict, alternatives: dict, headline: dict, drift: dict, lossless: dict
) -> str:
    """README's results at a glance for the default preset: one row for each question."""
    results = (accuracy["results"], reaction["own"]["results"], long_clips["results"])
    label, delay, cosine = (next(row for row in rows if row["name"] == "balanced") for rows in results)
    top1, texts = label["top1"], lossless["summary"]["all"]
    lookup, stock = (texts[name]["processor"]["times_dense"] for name in ("lookup", "stock lookup"))
    ways = {row["method"]: row for row in alternatives["rows"] if row["resolution"] == 448}
    times, own = {name: row["ms"] for name, row in ways.items()}, ways["balanced"]
    dense = [name for name in times if name.startswith("dense")]
    best = min(dense, key=times.__getitem__)
    large = {
        row["method"]: row for row in headline["rows"] if row["side"] == 1792 and row["activity"] != "own activity"
    }
    adapter = large["reconstruct with summary, distilled"]
    rows = [
        (
            "Times faster than dense, and cosine to it: 1792 px, 3% of the patches active, `reconstruct` with the "
            "adapter that ships, CPU, float32",
            f"{adapter['speed_up']:.0f}; {adapter['mean']:.3f}",
            f"{large['keyframe repeated']['mean']:.3f} (keyframe repeated)",
        ),
        (
            f"Zero-shot top-1, {len(accuracy['scenes'])} composed clips (dense: {top1['dense']:.1%})",
            f"{top1['accuracy']:.1%}",
            f"{top1['best control']['control']:.1%}",
        ),
        (
            f"Frames by which the label changes later than dense's, {reaction['own']['events']} events",
            spread(delay["delay"], delay["interval"], form=".1f"),
            f"{delay['best control']['control']:.1f}",
        ),
        (
            f"5th percentile of the cosine to dense over {long_clips['frames'][0]:,} frames",
            f"{cosine['p5']:.3f}",
            f"{cosine['best control']['control']:.3f}",
        ),
        (
            "Times faster than transformers' model, 448 px, the shipped street clip at cost "
            f"{own['cost']:.2f} (1 / cost: {1 / own['cost']:.1f}), CPU",
            f"{times['dense, torch'] / own['ms']:.1f}",
            f"{times['dense, torch'] / times[best]:.1f} ({best}, the fastest of {len(dense)})",
        ),
        (
            f"SmolLM2, {sum(drift['prompts']['of_task'].values())} texts: tokens that change if an attention layer is "
            "bypassed on a fifth of the steps",
            f"{drift['configurations'][0]['tasks']['all']['drift']:.0%}",
            "0%, lossless generation",
        ),
        (
            "Times faster than dense, lossless text of SmolLM2, drafts by lookup",
            spread(lookup["median"], lookup["interval"], form=".2f"),
            f"{stock['median']:.2f} (transformers' prompt lookup)",
        ),
    ]
    return table(rows, {"question": "{0}", "measured": "{1}", "best baseline at equal cost": "{2}"})


BLOCKS = {
    "presets": (fidelity.presets_table, "vision_policies"),
    "glance": (
        glance_table,
        *("accuracy", "reaction", "fidelity", "benchmark_alternatives", "headline", "token_drift"),
        "benchmark_lossless",
    ),
    "policies": (fidelity.policies_table, "vision_policies"),
    "modes": (fidelity.policies_table, "vision_modes"),
    "dinov2": (fidelity.policies_table, "vision_policies_dinov2"),
    "dinov2 beforehand": (fidelity.beforehand_table, "vision_policies_dinov2"),
    "holding": (fidelity.holding_table, "vision_policies"),
    "beforehand": (fidelity.beforehand_table, "vision_policies"),
    "delays": (fidelity.delays_table, "vision_policies"),
    "oracle": (fidelity.oracle_table, "vision_policies"),
    "promises": (fidelity.promises_table, "vision_policies"),
    "times": (fidelity.times_table, "vision_policies"),
    "speed": (speed.speed_table, "benchmark_vision"),
    "start-up": (speed.start_up_table, "start_up"),
    "linear costs": (speed.linear_costs_table, "linear_costs"),
    "compiled frames": (speed.compiled_frames_table, "compiled_frames"),
    "alternatives": (speed.alternatives_table, "benchmark_alternatives"),
    "streams": (speed.streams_table, "benchmark_streams"),
    "speed cuda": (speed.speed_table, "benchmark_vision_cuda"),
    "streams cuda": (speed.streams_table, "benchmark_streams_cuda"),
    "search": (speed.search_table, "benchmark_search"),
    "embed": (speed.throughput_table, "embed_throughput"),
    "headline": (distillation.headline_table, "headline"),
    "stretch": (distillation.stretch_table, "headline"),
    "headline variants": (distillation.headline_variants_table, "headline_variants"),
    "adapters": (distillation.adapters_table, "distill_reconstruct", "distill_extrapolate", "distill_published"),
    "adapter variants": (distillation.distill_variants_table, "distill_variants"),
    "held-out": (distillation.held_out_table, "distill_reconstruct"),
    "run": (fidelity.run_table, "run"),
    "labels": (labels.labels_table, "run_labels"),
    "motion": (labels.motion_table, "motion_masks"),
    "accuracy": (labels.accuracy_table, "accuracy"),
    "zero-shot": (labels.zero_shot_table, "zero_shot_small", "zero_shot_small_again"),
    "tower": (fidelity.tower_table, "tower_fidelity"),
    "motions": (labels.motions_table, "accuracy"),
    "reaction": (labels.reaction_table, "reaction"),
    "fidelity": (fidelity.fidelity_table, "fidelity"),
    "laws": (labels.laws_table, "published_laws"),
    "drift": (language.drift_table, "token_drift"),
    "drift-findings": (language.findings_table, "token_drift"),
    "drift-cascade": (language.drift_table, "drift_cascade"),
    "drift-json": (language.json_table, "json_drift"),
    "patches": (fidelity.patches_table, "vision_policies"),
    "tower share": (speed.tower_share_table, "tower_share"),
    "static tokens": (speed.static_tokens_table, "static_tokens"),
    "export": (speed.export_table, "export_fidelity"),
    "lossless": (language.lossless_table, "benchmark_lossless"),
    "checks": (language.check_table, "check_costs"),
}


def filled(page: str) -> str:
    """A page with each of its tables written anew, but for those that were not measured yet."""
    for name, (make, *results) in BLOCKS.items():
        is_measured = all((RESULTS / f"{result}.json").exists() for result in results)
        if is_measured and f"<!-- figures:{name}:begin -->" in page:
            text = make(*map(load, results))
            if BEFORE_CONTROLLER.intersection(results):
                text += "\n\nPresets: as they were before the controller of the cost budget."
            page = fill_block(page, f"figures:{name}", text)
    return page


if __name__ == "__main__":
    for path in PAGES:
        write_whole(path, filled(path.read_text(encoding="utf-8")))
