"""
Evidence on a checkpoint and videos: dense, methods and controls over all of them, one recording each, one report.

    videos = find_videos("clips")
    checkpoint = load_checkpoint("path/to/siglip", chosen_labels(videos, None))
    report = evaluate_checkpoint(checkpoint, videos, Path("out"))
    report["methods"][1]["beside"]["p5"]["verdict"]

A recording is one method over one video, a file under `records/`, written whole or not at all; one that is there is
not made again while the code, the libraries, the weights, the video and the options are the same. Started by
`accelerate launch` or `torchrun`, the videos are split over the processes, and the first one writes the report.
Nothing is printed here.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..loading import NoTextTowerError, load_model, load_model_with_labels
from ..utils.code_keys import key_of, model_version
from ..utils.processes import Processes
from ..utils.provenance import checkout_commit, fingerprint, finite, machine_and_versions, write_whole_bytes
from ..video.labels import TEMPLATE, Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..video.reader import VideoError, VideoReader
from ..video.run import require_one_patch, timed
from ..vision.gate_config import PRESETS, NeuroFlowGateConfig
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .datasets import EvalVideo, VideoSet, file_digest
from .equal_cost import Outcome, compare, outcome_figures, questions
from .methods import MethodSpec, make_methods
from .settings import DENSE, FIRST, hold_controls, mode_methods, preset_methods, smaller_controls
from .zero_shot import ranks

RECORDS = "records"
# beside the model's, the code that recordings rest on
CODE = ("evaluation/methods.py", "evaluation/token_merging.py", "video/preprocess.py", "video/reader.py")
LIBRARIES = ("torch", "transformers", "av", "pillow")  # and what computes, decodes and resizes
# Holding can spend any share of dense's cost: its settings begin at the first frame repeated, and end at dense.
HOLDS = ("every", "surprise", "pixels")
HELD = (*HOLDS, FIRST.kind)  # what returns dense's embeddings
TUNED = "own settings"  # of a configuration that is named
MERGED_SCHEDULE = "constant"  # of token merging, the paper's main one
OnStep = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class EvalSettings:
    """
    How an evaluation is done.

    Args:
        frames (`int | None`, defaults to 96): the first so many of each video; None for all.
        stride (`int`, defaults to 1): take every so many.
        samples (`int`, defaults to 1000), seed (`int`, defaults to 0): of the bootstrap behind the intervals.

    Raises:
        ValueError: for a value out of range.
    """

    frames: int | None = 96
    stride: int = 1
    samples: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name, least in (("frames", 2), ("stride", 1), ("samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` is {value}; expected a whole number of at least {least}.")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """
    What is measured.

    Args:
        name: for the report.
        model: the vision tower, in evaluation mode.
        preprocess: what makes its pixel values.
        labels: what to choose among; None for none.
        note: what could not be asked of it; else empty.
    """

    name: str
    model: NeuroFlowSiglipVisionModel
    preprocess: Preprocessor
    labels: Labels | None = None
    note: str = ""


def load_checkpoint(
    source: str | Path,
    names: Sequence[str] = (),
    template: str = TEMPLATE,
    dtype: torch.dtype = torch.float32,
    device: str = "auto",
    resolution: int | None = None,
    must_read_text: bool = False,
) -> Checkpoint:
    """
    A checkpoint with labels, if there are any and it reads text.

    Args:
        source, dtype, device, resolution: as in `load_model`.
        names, template: as in `embed_labels`; no names for no labels.
        must_read_text: whether a checkpoint without text tower is an error; else labels are left out, with a note.

    Raises:
        ModelLoadError, ValueError: as in `load_model_with_labels`.
    """
    how, name = (dtype, device, resolution), Path(source).name
    if names:
        try:
            return Checkpoint(name, *load_model_with_labels(source, names, template, *how))
        except NoTextTowerError:
            if must_read_text:
                raise
    note = "The checkpoint has no text tower: subfolders' names are not asked about." if names else ""
    return Checkpoint(name, *load_model(source, *how), note=note)


# --- which methods -------------------------------------------------------------------------------------------------


def chosen_methods(model: NeuroFlowSiglipVisionModel, resolution: int, names: Sequence[str] | None, quick: bool):
    """
    Dense, the methods of these names, and the controls.

    Args:
        model: the vision tower.
        resolution: side of the frames in pixels, which smaller inputs and merged tokens are in proportion to.
        names: of methods or of their families, such as `"balanced"` or `"context"`, also parted at the commas that a
            setting's name has in it; None for the presets.
        quick: fewer settings of each control.

    Raises:
        ValueError: for a name that there is not.
    """
    methods = [*preset_methods(), *mode_methods()]
    if names is None:
        wanted = [spec for spec in methods if spec.name in PRESETS]
    else:
        known = list(dict.fromkeys(part for spec in methods for part in (spec.name, short_family(spec))))
        names = whole_names(names, known)
        wanted = [spec for spec in methods if {spec.name, short_family(spec)} & set(names)]
    smaller = [
        spec for spec in smaller_controls(model, quick) if spec.options.get("schedule") in (None, MERGED_SCHEDULE)
    ]
    kept = [FIRST, *hold_controls(), *smaller]
    scaled = [for_resolution(spec, resolution, model.config.image_size, model.config.patch_size) for spec in kept]
    return [DENSE, *wanted, *{spec.name: spec for spec in scaled}.values()]


def whole_names(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """
    Names of methods, those put together again that were parted at commas of their own: `["context", "threshold 0.01"]`
    to `["context, threshold 0.01"]`. The longest that is known is taken.

    Raises:
        ValueError: for a name that is not known.
    """
    found, place = [], 0
    while place < len(names):
        for end in range(len(names), place, -1):
            name = ", ".join(names[place:end])
            if name in known:
                break
        else:
            raise ValueError(f"There is no method {names[place]!r}; expected some of {', '.join(map(repr, known))}.")
        found.append(name)
        place = end
    return found


def short_family(spec: MethodSpec) -> str:
    """A family's name without what stands in parentheses: `"reconstruct (the paper's C)"` to `"reconstruct"`."""
    return spec.family.split(" (")[0]


def for_resolution(spec: MethodSpec, resolution: int, native: int, patch: int) -> MethodSpec:
    """A control that was made for frames of `native` pixels, for others: a smaller input's side, how many merge."""
    cells, own = resolution // patch, native // patch
    if cells == own:
        return spec
    if spec.kind == "smaller":
        side = max(1, min(cells - 1, round(spec.options["resolution"] / patch / own * cells))) * patch
        return replace(spec, name=f"{side} px", options={"resolution": side})
    if spec.kind == "merged":
        r = max(1, round(spec.options["r"] * cells**2 / own**2))
        return replace(spec, name=f"ToMe {r}, {spec.options['schedule']}", options={**spec.options, "r": r})
    return spec


def control_families(outcomes: Sequence[Outcome], kinds: dict[str, str]) -> dict[str, list[Outcome]]:
    """
    The controls by family, each with what ends its curve.

    Args:
        outcomes: of all methods.
        kinds: of each, by its name.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.control:
            families.setdefault(outcome.family, []).append(outcome)
    for settings in families.values():
        kind = kinds[settings[0].name]
        if kind != FIRST.kind:
            settings.append(by_name[DENSE.name])
        if kind in HOLDS:
            settings.insert(0, by_name[FIRST.name])
    return families


# --- recordings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recording:
    """
    One method over one video of T frames.

    Args:
        embeddings: float32 [T, D]; [T, 0] of what returns dense's, for there are dozens of these: see `embeddings_of`.
        cost, skip, milliseconds: float32 [T]; `skip` is NaN where a method knows of none, `milliseconds` where it was
            not timed.
    """

    embeddings: torch.Tensor
    cost: torch.Tensor
    skip: torch.Tensor
    milliseconds: torch.Tensor


class EvalJob:
    """
    One evaluation under way; arguments as those of `evaluate_checkpoint`.

    Attributes:
        specs: the methods, dense first.
        processes: those that work on it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        videos: VideoSet,
        out: Path,
        specs: Sequence[MethodSpec],
        settings: EvalSettings,
        fresh: bool,
        on_step: OnStep | None,
    ):
        require_one_patch(checkpoint.preprocess, checkpoint.model.config.patch_size)
        self.checkpoint, self.videos, self.specs, self.settings = checkpoint, videos, specs, settings
        self.records, self.fresh, self.on_step = out / RECORDS, fresh, on_step
        self.processes = Processes()
        self.weights = fingerprint(checkpoint.model)

    def path_of(self, video: EvalVideo, digest: str, spec: MethodSpec) -> Path:
        """Where a recording lies; the name changes with whatever it depends on."""
        options = spec.options
        if spec.kind == "stream":
            options = NeuroFlowGateConfig.from_options({}, **options).to_dict()
        model, preprocess = self.checkpoint.model, self.checkpoint.preprocess
        key = key_of(
            weights=self.weights,
            video=digest,
            method=[spec.kind, options],
            frames=self.settings.frames,
            stride=self.settings.stride,
            preprocess=asdict(preprocess),
            dtype=str(model.dtype),
            device=model.device.type,
            code=model_version(*CODE),
            libraries={name: version(name) for name in LIBRARIES},
        )
        return self.records / f"{video.path.stem[:40]}-{key}.safetensors"

    def record_video(self, video: EvalVideo, say: Callable[[str], None]) -> dict[str, Recording]:
        """
        All methods over one video, those that are there from their files.

        Raises:
            VideoError: if it cannot be read to the last frame that is wanted, or has one frame only.
        """
        reader = VideoReader(video.path, stride=self.settings.stride, max_frames=self.settings.frames)
        digest = file_digest(video.path)
        paths = {spec.name: self.path_of(video, digest, spec) for spec in self.specs}
        found = {} if self.fresh else {name: one for name, path in paths.items() if (one := read_recording(path))}
        missing = [spec for spec in self.specs if spec.name not in found]
        together = [spec for spec in missing if spec.shares_dense]
        for group in [together, *([spec] for spec in missing if not spec.shares_dense)]:
            if not group:
                continue
            say(group[0].name)
            for name, recording in self.record(reader, group).items():
                write_recording(paths[name], recording)
                found[name] = recording
        return found

    def record(self, reader: VideoReader, specs: Sequence[MethodSpec]) -> dict[str, Recording]:
        """
        Some methods over a video, frame by frame.

        Raises:
            ValueError: for embeddings that are not finite.
        """
        model, methods = self.checkpoint.model, make_methods(self.checkpoint.model, specs)
        rows: dict[str, list] = {spec.name: [] for spec in specs}
        held = {spec.name for spec in specs if spec.kind in HELD}
        for method in methods:
            method.start(1)
        with torch.inference_mode(), contextlib.closing(prefetch(self.pixels(reader))) as frames:
            for pixel_values in frames:
                for method in methods:
                    step, spent = timed(lambda m=method, x=pixel_values: m.step(x), model.device)
                    skip = math.nan if step.skip_rate is None else step.skip_rate[0].item()
                    embedding = step.embeddings[0].float().cpu()
                    require_finite(embedding, method.name, len(rows[method.name]), reader.path)
                    if method.name in held:
                        embedding = nothing_of(embedding)
                    rows[method.name].append((embedding, step.cost[0].item(), skip, spent))
        if len(rows[specs[0].name]) < 2:
            raise VideoError(f"{reader.path} gives a single frame; expected at least two to compare.")
        kinds = {spec.name: spec.kind for spec in specs}
        return {name: recording_of(of_method, kinds[name]) for name, of_method in rows.items()}

    def pixels(self, reader: VideoReader) -> Iterator[torch.Tensor]:
        """Pixel values [1, 3, R, R] of the frames."""
        model = self.checkpoint.model
        for frame in reader:
            yield self.checkpoint.preprocess(frame.image, model.dtype, model.device)

    def run(self) -> dict:
        """All of it; the report, on all processes."""
        mine = self.processes.share(len(self.videos.videos))
        lines, skipped = [], []
        for done, place in enumerate(mine):
            video = self.videos.videos[place]

            def say(what, name=video.name, done=done):
                if self.on_step is not None and self.processes.is_main:
                    self.on_step(name, what, done, len(mine))

            say("reading")
            try:
                recordings = self.record_video(video, say)
            except VideoError as error:
                skipped.append((place, {"name": video.name, "reason": str(error)}))
            else:
                lines.append((place, video_line(video, recordings, self.checkpoint.labels)))
        lines, skipped = (
            [line for _, line in sorted(self.processes.gather(found), key=lambda pair: pair[0])]
            for found in (lines, skipped)
        )
        if not lines:
            raise VideoError(f"None of the {len(skipped)} videos can be measured: {skipped[0]['reason']}")
        return self.report(lines, skipped)

    def report(self, lines: Sequence[dict], skipped: Sequence[dict]) -> dict:
        """What the videos' lines say together."""
        checkpoint, labels = self.checkpoint, self.checkpoint.labels
        model, side = checkpoint.model, checkpoint.preprocess.resolution // checkpoint.model.config.patch_size
        asked = [line for line in lines if line["asked"]] if labels is not None else []
        true = bool(asked) and all(line["truth"] is not None for line in lines)
        count = 0 if labels is None else len(labels.names)
        report = {
            "model": {
                "name": checkpoint.name,
                "weights": self.weights,
                "reads_text": labels is not None,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "resolution": checkpoint.preprocess.resolution,
                "grid": [side, side],
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "videos": {
                "name": self.videos.name,
                "count": len(self.videos.videos),
                "measured": len(lines),
                "frames": sum(line["frames"] for line in lines),
                "skipped": list(skipped),
                "names": [line["name"] for line in lines],
            },
            "labels": {
                "names": [] if labels is None else list(labels.names),
                "template": None if labels is None else labels.template,
                "true": true,
                "videos_asked": len(asked),
                "note": checkpoint.note,
            },
            "settings": asdict(self.settings),
            "processes": self.processes.count,
            "commit": checkout_commit(),
            **machine_and_versions(str(model.device)),
        }
        outcomes = [joined(spec, lines, bool(asked), true) for spec in self.specs]
        families = control_families(outcomes, {spec.name: spec.kind for spec in self.specs})
        asking = questions(
            [line["frames"] for line in lines],
            [line["frames"] for line in asked] if asked else None,
            len(lines) if true else None,
            count,
        )
        report["methods"] = []
        for spec, outcome in zip(self.specs, outcomes, strict=True):
            entry = spec.to_dict() | {
                "figures": outcome_figures(outcome, None if spec == DENSE else outcomes[0], count),
                "videos": [line["methods"][spec.name]["figures"] for line in lines],
            }
            if spec.kind == "stream":
                how = {"samples": self.settings.samples, "seed": self.settings.seed}
                entry["beside"] = {one.name: compare(outcome, families, one, **how) for one in asking}
            report["methods"].append(entry)
        report["truths"] = [line["truth"] for line in lines] if true else []
        return finite(report)


def nothing_of(embedding: torch.Tensor) -> torch.Tensor:
    """An empty tensor [0] of the same type; an empty view would keep the whole embedding [D] in memory."""
    return embedding.new_empty(0)


def recording_of(rows: Sequence[tuple], kind: str) -> Recording:
    """Frames' values stacked; controls that hold share their dense frames with others, so their time says nothing."""
    embeddings, cost, skip, milliseconds = zip(*rows, strict=True)
    if kind in HELD:
        milliseconds = [math.nan] * len(rows)
    return Recording(torch.stack(embeddings), *(torch.tensor(values) for values in (cost, skip, milliseconds)))


def require_finite(embedding: torch.Tensor, method: str, frame: int, path: Path):
    """ValueError if an embedding [D] is not finite: figures of it would compare with nothing."""
    if not embedding.isfinite().all():
        raise ValueError(
            f"{method} gives an embedding with NaN or infinite values for frame {frame} of {path}; expected numbers. "
            "Choose another --dtype: float16 is too small for some checkpoints."
        )


def embeddings_of(recording: Recording, dense: Recording) -> torch.Tensor:
    """A recording's embeddings, float32 [T, D]: its own, or dense's of the frame that was encoded last."""
    if recording.embeddings.shape[-1]:
        return recording.embeddings
    places = torch.arange(len(recording.skip))
    return dense.embeddings[torch.where(recording.skip == 0, places, 0).cummax(0).values]


def read_recording(path: Path) -> Recording | None:
    """A recording from its file; None if there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        return Recording(**load_file(path))
    except (SafetensorError, TypeError):
        return None


def write_recording(path: Path, recording: Recording):
    """Write a recording, whole or not at all."""
    write_whole_bytes(path, save({name: value.contiguous() for name, value in vars(recording).items()}))


# --- figures -------------------------------------------------------------------------------------------------------


def video_line(video: EvalVideo, recordings: dict[str, Recording], labels: Labels | None) -> dict:
    """
    What one video says of each method, without its first frame: arrays for all videos together, and figures of its
    own. A video's label is that of the mean of its frames' embeddings, each of length 1.
    """
    dense = recordings[DENSE.name].embeddings[1:]
    asked = labels is not None and video.labelled
    line = {"name": video.name, "truth": video.truth, "asked": asked, "frames": len(dense), "methods": {}}
    dense_best = labels.logits(dense).argmax(-1) if asked else None
    for name, recording in recordings.items():
        embeddings = embeddings_of(recording, recordings[DENSE.name])[1:]
        cosine = torch.nn.functional.cosine_similarity(embeddings.double(), dense.double(), dim=-1).numpy()
        cost, skip = (values[1:].double().numpy() for values in (recording.cost, recording.skip))
        # without the frame on which kernels are chosen and memory is claimed
        milliseconds = float(np.median(recording.milliseconds[1:].double().numpy()))
        found: dict[str, Any] = {"cost": cost, "cosine": cosine, "skip": skip, "milliseconds": milliseconds}
        figures = {
            "cost": float(cost.mean()),
            "cosine_mean": float(cosine.mean()),
            "cosine_p5": float(np.percentile(cosine, 5)),
        }
        if asked:
            found["agrees"] = (labels.logits(embeddings).argmax(-1) == dense_best).numpy()
            unit = torch.nn.functional.normalize(embeddings, dim=-1).mean(0)
            logits = labels.logits(unit)
            figures |= {"agreement": float(found["agrees"].mean()), "label": labels.names[int(logits.argmax())]}
            if video.truth is not None:
                found["rank"] = int(ranks(name, [logits.tolist()], [labels.names.index(video.truth)])[0])
                figures["rank"] = found["rank"]
        line["methods"][name] = {**found, "figures": figures}
    return line


def joined(spec: MethodSpec, lines: Sequence[dict], asked: bool, true: bool) -> Outcome:
    """One method over all videos."""
    parts = [line["methods"][spec.name] for line in lines]

    def together(name):
        return np.concatenate([part[name] for part in parts if name in part])

    skip = together("skip")
    return Outcome(
        name=spec.name,
        family=spec.family,
        control=spec.control,
        cost=together("cost"),
        cosine=together("cosine"),
        skip=None if np.isnan(skip).any() else skip,
        agrees=together("agrees") if asked else None,
        ranks=np.array([part["rank"] for part in parts]) if true else None,
        milliseconds=float(np.median([part["milliseconds"] for part in parts])),
    )


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    videos: VideoSet,
    out: Path,
    settings: EvalSettings | None = None,
    methods: Sequence[str] | None = None,
    quick: bool = False,
    fresh: bool = False,
    on_step: OnStep | None = None,
    gate: dict | None = None,
) -> dict:
    """
    Measure dense, methods and controls on videos.

    Args:
        checkpoint: from `load_checkpoint`.
        videos: from `find_videos`.
        out: folder; recordings go to `records/` in it, and what is there is used.
        settings: [`EvalSettings`]; None for the defaults.
        methods: see `chosen_methods`.
        quick: fewer settings of each control.
        fresh: make all recordings anew.
        on_step: called with a video's name, what is being done, and the number of it among how many.
        gate: options of one more method, TUNED.

    Returns:
        The report, on all processes. A video that cannot be read is in it as skipped, with the reason.

    Raises:
        ValueError: for names of methods that there are not, settings out of range, and if no video can be measured.
        OSError: if a recording cannot be written.
    """
    specs = chosen_methods(checkpoint.model, checkpoint.preprocess.resolution, methods, quick)
    if gate is not None:
        specs.insert(1, MethodSpec(TUNED, TUNED, "stream", gate))
    return EvalJob(checkpoint, videos, Path(out), specs, settings or EvalSettings(), fresh, on_step).run()
