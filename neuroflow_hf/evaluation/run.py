"""
A checkpoint measured on videos: dense, methods and baselines on each video, then one report.

    videos = find_videos("clips")
    checkpoint = load_checkpoint("path/to/siglip", chosen_labels(videos, None))
    report = evaluate_checkpoint(checkpoint, videos, Path("out"))
    report["methods"][1]["beside"]["p5"]["verdict"]

A recording is one method over one video, a file under `records/`. A second run uses the recordings of the first while
the code, the libraries, the weights, the video and the options are the same. Under `accelerate launch` or `torchrun`,
the processes share the videos.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..loading import NoTextTowerError, load_model, load_model_with_labels
from ..utils.files import finite, write_whole
from ..utils.jobs import timed
from ..utils.processes import Processes
from ..utils.provenance import checkout_commit, machine_and_versions
from ..video.labels import TEMPLATE, Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..video.reader import VideoError, VideoReader
from ..video.run import require_one_patch
from ..vision.gate_config import PRESETS
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .datasets import EvalVideo, VideoSet, file_digest
from .equal_cost import Outcome, compare, outcome_figures, questions
from .methods import HELD, MethodSpec, make_methods
from .recordings import RecordingStore, passes_of
from .settings import DENSE, FIRST, hold_controls, mode_methods, preset_methods, smaller_controls
from .zero_shot import ranks

RECORDS = "records"
TUNED = "own settings"  # those of a configuration file
MERGED_SCHEDULE = "constant"  # the paper's main schedule of token merging
OnStep = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class EvalSettings:
    """
    Settings of an evaluation.

    Args:
        frames (`int | None`, defaults to 96): use the first N frames of each video; None for all.
        stride (`int`, defaults to 1): use every Nth frame.
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
        preprocess: the checkpoint's.
        labels: to choose among; None for none.
        note: why there are no labels, if some were named; else empty.
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
    Load a checkpoint, with labels if there are any and it has a text tower.

    Args:
        source, dtype, device, resolution: as in `load_model`.
        names, template: as in `embed_labels`; no names for no labels.
        must_read_text: raise for a checkpoint without a text tower; else leave out the labels, with a note.

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
    Dense, the methods of these names, and the baselines.

    Args:
        model: the vision tower.
        resolution: side of the frames in pixels; smaller inputs and merged tokens are scaled to it.
        names: of methods or of their families, such as `"balanced"` or `"context"`, also split at the commas in a
            setting's name; None for the presets.
        quick: fewer settings of each baseline.

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
    Join names of methods that were split at their own commas: `["context", "threshold 0.01"]` to
    `["context, threshold 0.01"]`. The longest known name wins.

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
    """Scale a baseline made for frames of `native` pixels to others: a smaller input's side, how many tokens merge."""
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


def baseline_families(outcomes: Sequence[Outcome], kinds: dict[str, str]) -> dict[str, list[Outcome]]:
    """
    The baselines by family. Dense ends every family, and the first frame repeated begins those that hold.

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
            if kind in HELD:
                settings.insert(0, by_name[FIRST.name])
    return families


# --- recordings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VideoRecording:
    """
    One method over one video of T frames.

    Args:
        embeddings: float32 [T, D]; [T, 0] of methods that hold dense embeddings, see `embeddings_of`.
        cost, skip, milliseconds: float32 [T]; NaN where a method has no skip rate, or was not timed.
    """

    embeddings: torch.Tensor
    cost: torch.Tensor
    skip: torch.Tensor
    milliseconds: torch.Tensor


class EvalJob:
    """
    One evaluation; arguments as of `evaluate_checkpoint`.

    Attributes:
        specs: the methods, dense first.
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
        self.fresh, self.on_step, self.processes = fresh, on_step, Processes()
        self.store = RecordingStore(
            out / RECORDS, checkpoint.model, checkpoint.preprocess, ["video/reader.py"], ["av"]
        )

    def record_video(self, video: EvalVideo, say: Callable[[str], None]) -> dict[str, VideoRecording]:
        """
        All methods over one video; recordings that exist are read.

        Raises:
            VideoError: if the video cannot be read to the last frame, or has one frame only.
        """
        reader = VideoReader(video.path, stride=self.settings.stride, max_frames=self.settings.frames)
        digest = file_digest(video.path)
        depends = {"video": digest, "frames": self.settings.frames, "stride": self.settings.stride}
        paths = {spec.name: self.store.path(video.path.stem[:40], spec, **depends) for spec in self.specs}
        found = {} if self.fresh else {name: one for name, path in paths.items() if (one := read_recording(path))}
        for group in passes_of([spec for spec in self.specs if spec.name not in found]):
            say(group[0].name)
            for name, recording in self.record(reader, group).items():
                write_recording(paths[name], recording)
                found[name] = recording
        return found

    def record(self, reader: VideoReader, specs: Sequence[MethodSpec]) -> dict[str, VideoRecording]:
        """
        Run some methods over a video.

        Raises:
            ValueError: for embeddings that are not finite.
        """
        model, methods = self.checkpoint.model, make_methods(self.checkpoint.model, specs)
        rows: list[list] = [[] for _ in specs]
        for method in methods:
            method.start(1)
        pixels = (self.checkpoint.preprocess(frame.image, model.dtype, model.device) for frame in reader)
        with torch.inference_mode(), contextlib.closing(prefetch(pixels)) as frames:
            for number, pixel_values in enumerate(frames):
                for spec, method, of_method in zip(specs, methods, rows, strict=True):
                    step, spent = timed(lambda m=method, x=pixel_values: m.step(x), model.device)
                    skip = math.nan if step.skip_rate is None else step.skip_rate[0].item()
                    embedding = step.embeddings[0].float().cpu()
                    require_finite(embedding, method.name, number, reader.path)
                    if spec.kind in HELD:  # shares dense frames with others, so its time means nothing
                        embedding, spent = nothing_of(embedding), math.nan
                    of_method.append((embedding, step.cost[0].item(), skip, spent))
        if len(rows[0]) < 2:
            raise VideoError(f"{reader.path} gives a single frame; expected at least two to compare.")
        return {spec.name: recording_of(of_method) for spec, of_method in zip(specs, rows, strict=True)}

    def run(self) -> dict:
        """Measure this process's videos, and return the report of all of them, on all processes."""
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
        """The report of all videos, from the line of each."""
        checkpoint, labels = self.checkpoint, self.checkpoint.labels
        model, side = checkpoint.model, checkpoint.preprocess.resolution // checkpoint.model.config.patch_size
        asked = [line for line in lines if line["asked"]] if labels is not None else []
        true = bool(asked) and all(line["truth"] is not None for line in lines)
        count = 0 if labels is None else len(labels.names)
        report = {
            "model": {
                "name": checkpoint.name,
                "weights": self.store.weights,
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
        families = baseline_families(outcomes, {spec.name: spec.kind for spec in self.specs})
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


def recording_of(rows: Sequence[tuple]) -> VideoRecording:
    """A recording from its frames' embedding, cost, skip rate and milliseconds."""
    embeddings, *figures = zip(*rows, strict=True)
    return VideoRecording(torch.stack(embeddings), *map(torch.tensor, figures))


def require_finite(embedding: torch.Tensor, method: str, frame: int, path: Path):
    """Raise a ValueError if an embedding [D] is not finite."""
    if not embedding.isfinite().all():
        raise ValueError(
            f"{method} gives an embedding with NaN or infinite values for frame {frame} of {path}; expected numbers. "
            "Choose another --dtype: float16 is too small for some checkpoints."
        )


def embeddings_of(recording: VideoRecording, dense: VideoRecording) -> torch.Tensor:
    """A recording's embeddings, float32 [T, D]: its own, or dense's of the frame that was encoded last."""
    if recording.embeddings.shape[-1]:
        return recording.embeddings
    places = torch.arange(len(recording.skip))
    return dense.embeddings[torch.where(recording.skip == 0, places, 0).cummax(0).values]


def read_recording(path: Path) -> VideoRecording | None:
    """A recording from its file; None if there is none that can be read."""
    try:
        return VideoRecording(**load_file(path))
    except (FileNotFoundError, SafetensorError, TypeError):
        return None


def write_recording(path: Path, recording: VideoRecording):
    """Write a recording, whole or not at all."""
    write_whole(path, save({name: value.contiguous() for name, value in vars(recording).items()}))


# --- figures -------------------------------------------------------------------------------------------------------


def video_line(video: EvalVideo, recordings: dict[str, VideoRecording], labels: Labels | None) -> dict:
    """
    Each method's arrays and figures on one video, without the first frame. A video's label is that of the mean of its
    frames' normalised embeddings.
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
    """One method's arrays of all videos."""
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
    Measure dense, methods and baselines on videos.

    Args:
        checkpoint: from `load_checkpoint`.
        videos: from `find_videos`.
        out: folder; recordings are read from and written to `records/` in it.
        settings: [`EvalSettings`]; None for the defaults.
        methods, quick: see `chosen_methods`.
        fresh: record everything again.
        on_step: called with a video's name, what is being done, the video's number and the number of videos.
        gate: gate options of one more method.

    Returns:
        The report, on all processes. It lists videos that cannot be read as skipped, with the reason.

    Raises:
        ValueError: for unknown methods and settings out of range.
        VideoError: if no video can be measured.
        OSError: if a recording cannot be written.
    """
    specs = chosen_methods(checkpoint.model, checkpoint.preprocess.resolution, methods, quick)
    if gate is not None:
        specs.insert(1, MethodSpec(TUNED, TUNED, "stream", gate))
    return EvalJob(checkpoint, videos, Path(out), specs, settings or EvalSettings(), fresh, on_step).run()
