"""
What `accuracy.py`, `reaction.py` and `fidelity.py` ask their questions of: composed clips, methods, recordings.

Recorded once, kept in the cache folder (`NEUROFLOW_CACHE`), and continued by whichever of the three runs next. Clips
are those of `composed_clips.py`, drawings and photographs that were in no training picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from eval.recordings import Recorder, Recording, RecordSettings, Scene
from eval.report import provenance
from eval.vision import composed_clips
from neuroflow_hf.evaluation.methods import MethodSpec
from neuroflow_hf.evaluation.settings import (
    DENSE,
    FIRST,
    hold_controls,
    mode_methods,
    preset_methods,
    smaller_controls,
)
from neuroflow_hf.loading import DTYPES, load_text_model
from neuroflow_hf.utils.files import finite
from neuroflow_hf.utils.processes import Processes
from neuroflow_hf.utils.provenance import checkout_commit, code_version, key_of
from neuroflow_hf.video.labels import tokenize
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.vision.modeling_neuroflow_siglip import NeuroFlowSiglipModel
from recipes.siglip_dinov2_small.build import default_tower_dir

SEED = 3
NOTHING = "nothing"

Quick = Annotated[
    bool, typer.Option("--quick", help="Use one clip of 1,000 frames of each motion and fewer settings.")
]
FewSettings = Annotated[
    bool, typer.Option("--few-settings", help="Use one or two settings of each mode and smaller input.")
]
Clips = Annotated[int, typer.Option(help="Clips of each motion.", min=1)]
Frames = Annotated[
    int | None,
    typer.Option(help="Frames of each clip.", min=composed_clips.FEWEST, show_default="125; with --quick 1000"),
]
DenseEvery = Annotated[int, typer.Option(help="Compare one of every N frames with dense.", min=1)]
Methods = Annotated[str | None, typer.Option(help="Use only methods whose name or family begins so; separate with |.")]
Checkpoint = Annotated[Path, typer.Option(help="Checkpoint with a text tower.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Folder = Annotated[Path | None, typer.Option(help="Folder of the recordings.", show_default="in the cache folder")]

FRAMES = 125
QUICK_FRAMES = 1000
SLOW_MODES = ("mlp",)
MOST_CHANGES = 8  # of a clip; of those whose label changes all the time, some will do


@dataclass(frozen=True)
class Plan:
    """What to record: `clips` of each motion, of so many `frames` each, by default FRAMES or QUICK_FRAMES."""

    clips: int = 5
    frames: int | None = None
    dense_every: int = 8
    quick: bool = False
    methods: str | None = None
    few_settings: bool = False

    @property
    def settings(self) -> RecordSettings:
        """Which frames are sampled."""
        return RecordSettings(dense_every=self.dense_every, most_changes=MOST_CHANGES)

    @property
    def lengths(self) -> list[int]:
        """How many frames the clips of a motion have."""
        if self.quick:
            return [self.frames or QUICK_FRAMES]
        return [self.frames or FRAMES] * self.clips

    def specs(self, model: torch.nn.Module) -> list[MethodSpec]:
        """
        What to record. A quick run leaves out the mode that takes longest on a processor, and takes two
        settings of each hold: with many, most frames would be dense ones of some.
        """
        few = self.quick or self.few_settings
        modes = [spec for spec in mode_methods(few) if not (self.quick and spec.options["mode"] in SLOW_MODES)]
        controls = [FIRST, *hold_controls(few=self.quick), *smaller_controls(model, few)]
        return chosen([DENSE, *preset_methods(), *modes, *controls], self.methods)


def composed_scene(spec: composed_clips.ClipSpec) -> Scene:
    """A composed clip as a scene."""
    parts = [spec.ground, *(actor.cut for actor in spec.actors)]
    paths = [{name: part for name, part in vars(actor).items() if name != "cut"} for actor in spec.actors]
    scalars = {name: part for name, part in vars(spec).items() if name not in ("ground", "actors")}
    identity = key_of(
        spec=scalars,
        paths=paths,
        pictures=[key_of(shape=part.shape, bytes=part.tobytes().hex()) for part in parts],
        code=code_version([Path(composed_clips.__file__)]),
    )
    return Scene(
        name=f"{spec.motion} {spec.number}, {spec.frames} frames",
        count=spec.frames,
        frames=lambda: ((image, known.label) for image, known in composed_clips.frames(spec)),
        changes=composed_clips.label_changes(spec),
        identity=identity,
        group=spec.motion,
    )


def composed_batches(material: Any, plan: Plan, side: int = composed_clips.SIDE) -> list[list[Scene]]:
    """A batch for each number: that clip of every motion, all of one length."""
    return [
        [
            composed_scene(composed_clips.specify(material, motion, number, frames=frames, seed=SEED, side=side))
            for motion in composed_clips.MOTIONS
        ]
        for number, frames in enumerate(plan.lengths)
    ]


def chosen(specs: Sequence[MethodSpec], names: str | None) -> list[MethodSpec]:
    """
    Those whose name or family begins with one of the names, `|` between them, and dense and the first frame, which
    everything is compared with.

    Raises:
        typer.BadParameter: for a name that none begins with.
    """
    if names is None:
        return list(specs)
    wanted = [name.strip() for name in names.split("|")]
    for name in wanted:
        if not any(spec.name.startswith(name) or spec.family.startswith(name) for spec in specs):
            there = ", ".join(dict.fromkeys(spec.family for spec in specs))
            raise typer.BadParameter(f"No method or family begins with {name!r}; the families are {there}.")
    return [
        spec
        for spec in specs
        if spec in (DENSE, FIRST) or any(spec.name.startswith(name) or spec.family.startswith(name) for name in wanted)
    ]


@torch.no_grad()
def text_embeddings(model: NeuroFlowSiglipModel, tokenizer: Any) -> tuple[list[str], Tensor]:
    """
    All things that the embedded checkpoint was trained on, and `nothing`: names, and unit embeddings float32 [L, D],
    each the mean over phrasings; those of things were in no training caption.
    """
    from recipes.siglip_small.captions import EMPTY_PHRASES, HELD_OUT_PHRASINGS, prompts
    from recipes.siglip_small.sources import things

    def unit(texts: list[str]) -> Tensor:
        tokens = tokenize(tokenizer, texts, model.config.text_config)
        output = model.text_model(**{name: ids.to(model.device) for name, ids in tokens.items()})
        return functional.normalize(output.pooler_output.float(), dim=-1).cpu()

    of_things = sum(unit(prompts(phrasing)) for phrasing in HELD_OUT_PHRASINGS)
    together = torch.cat([of_things, unit(list(EMPTY_PHRASES)).sum(0, keepdim=True)])
    return [*(thing.name for thing in things()), NOTHING], functional.normalize(together, dim=-1)


@dataclass(frozen=True, eq=False)
class Evidence:
    """
    Everything that was recorded.

    Attributes:
        batches: of scenes.
        specs: the methods.
        recordings: by method's name, one for each batch.
        names, texts: labels and their unit embeddings, float32 [L, D].
        about: what was recorded, with what and on what, for JSON.
    """

    batches: list[list[Scene]]
    specs: list[MethodSpec]
    recordings: dict[str, list[Recording]]
    names: list[str]
    texts: Tensor
    about: dict

    @property
    def scenes(self) -> list[tuple[int, Scene]]:
        """All scenes, each with its batch's number."""
        return [(place, scene) for place, batch in enumerate(self.batches) for scene in batch]

    def recording(self, name: str, batch: int) -> Recording:
        """A method's recording of a batch."""
        return self.recordings[name][batch]

    def cost(self, name: str, scenes: Sequence[tuple[int, Scene]]) -> float:
        """A method's cost without the first frames, mean over scenes."""
        costs = [self.recording(name, batch).cost_of(scene.name)[1:].mean().item() for batch, scene in scenes]
        return float(np.mean(costs))

    def spec(self, name: str) -> MethodSpec:
        """A method by its name."""
        return next(spec for spec in self.specs if spec.name == name)


def distinct(values: Sequence[dict]) -> list[dict]:
    """The values that differ, each once, in order."""
    return [value for place, value in enumerate(values) if value not in values[:place]]


def record_evidence(
    plan: Plan,
    model: NeuroFlowSiglipModel,
    preprocess: Preprocessor,
    batches: list[list[Scene]],
    texts: tuple[list[str], Tensor],
    folder: Path,
    processes: Processes,
) -> Evidence:
    """Record what is missing, show how far it is, and read all of it."""
    specs = plan.specs(model)
    recorder = Recorder(model, preprocess, folder, plan.settings, processes)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not processes.is_main
    ) as progress:
        passes, frames = progress.add_task("passes"), progress.add_task("frames")

        def on_pass(what: str, number: int, total: int):
            progress.update(passes, completed=number, total=total)
            batch = int(what.rsplit("batch ", 1)[1].split()[0]) - 1
            progress.reset(frames, description=what, total=batches[batch][0].count)

        recorder.run(batches, specs, on_pass, lambda number: progress.update(frames, completed=number + 1))
    recordings = {spec.name: [recorder.load(scenes, spec) for scenes in batches] for spec in specs}
    of_first = recordings[specs[0].name][0].about
    about = {
        **provenance(),
        "processes": processes.count,
        "commit": checkout_commit(),
        "recorded": {
            "commits": sorted({str(one.about["commit"]) for some in recordings.values() for one in some}),
            "machines": distinct([one.about["machine"] for some in recordings.values() for one in some]),
            **{name: of_first[name] for name in ("versions", "dtype", "settings")},
        },
        "weights": recorder.store.weights,
        "seed": SEED,
        "frames": plan.lengths,
        "scenes": [scene.name for batch in batches for scene in batch],
        "methods": [
            spec.to_dict() | {"seconds": round(sum(one.about["seconds"] for one in recordings[spec.name]), 1)}
            for spec in specs
        ],
    }
    return Evidence(batches, specs, recordings, *texts, about)


def gather_evidence(plan: Plan, checkpoint: Path, dtype: str, folder: Path | None) -> tuple[Evidence, Processes]:
    """Load the checkpoint and the clips' material, and record."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"`--dtype` is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    from recipes.siglip_small.compose import load_material

    processes = Processes()
    device = "auto" if processes.device is None else str(processes.device)
    model, preprocess, tokenizer = load_text_model(checkpoint, DTYPES[dtype], device)
    material = load_material()["held out"]
    batches = composed_batches(material, plan)
    texts = text_embeddings(model, tokenizer)
    folder = folder or default_tower_dir().parent / "evidence"
    return record_evidence(plan, model, preprocess, batches, texts, folder, processes), processes


def rounded(report: Any, digits: int = 6) -> Any:
    """A report with its numbers to so many digits after the point, and None for what is no number."""
    if isinstance(report, dict):
        return {name: rounded(part, digits) for name, part in report.items()}
    if isinstance(report, list | tuple):
        return [rounded(part, digits) for part in report]
    return finite(round(report, digits)) if isinstance(report, float) else report
