"""
Measure a checkpoint on videos: dense, methods and baselines on each video, then one report.

    videos = find_videos("clips")
    checkpoint = load_checkpoint("path/to/siglip", chosen_labels(videos, None))
    methods = chosen_methods(checkpoint.model.config.patch_size, checkpoint.preprocess.resolution)
    report = Evaluation(checkpoint, videos, Path("out"), methods).run()
    report["methods"][1]["beside"]["p5"]["verdict"]

A recording is what one method gave for one video, a file under `records/`. A second run uses it if code, libraries,
weights, video and options are the same. Under `accelerate launch` or `torchrun`, the processes share the videos.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..loading import NoTextTowerError, load_model, load_model_with_labels
from ..utils.files import finite
from ..utils.jobs import timed
from ..utils.processes import Processes
from ..utils.provenance import checkout_commit, dtype_name, machine_and_versions
from ..video.labels import TEMPLATE, Labels
from ..video.prefetch import prefetch
from ..video.preprocess import Preprocessor
from ..video.reader import VideoError, VideoReader
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .datasets import EvalVideo, VideoSet, file_digest
from .equal_cost import Outcome, baseline_families, compare, outcome_figures, questions, video_figures
from .methods import HELD, MethodSpec, make_methods
from .recordings import RecordingStore, VideoRecording, passes_of
from .settings import DENSE
from .statistics import ranks

BOOTSTRAP = {"samples": 1000, "seed": 0}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint to measure."""

    name: str  # for the report
    model: NeuroFlowSiglipVisionModel  # the vision tower, in evaluation mode
    preprocess: Preprocessor
    labels: Labels | None = None
    note: str = ""  # why there are no labels, if some were given


def load_checkpoint(
    source: str | Path, names: Sequence[str] = (), template: str = TEMPLATE, must_read_text: bool = False, **how
) -> Checkpoint:
    """
    Load a checkpoint, with labels if names are given. Without a text tower there are no labels but a note, or, if it
    `must_read_text`, an error. Other arguments and errors are those of `load_model_with_labels`.
    """
    name, note = Path(source).name, ""
    if names:
        try:
            return Checkpoint(name, *load_model_with_labels(source, names, template, **how))
        except NoTextTowerError:
            if must_read_text:
                raise
        note = "The checkpoint has no text tower, so there are no labels."
    return Checkpoint(name, *load_model(source, **how), note=note)


def record(checkpoint: Checkpoint, reader: VideoReader, specs: Sequence[MethodSpec]) -> dict[str, VideoRecording]:
    """
    Run methods over a video. ValueError for embeddings that are not finite, VideoError if the video cannot be read to
    the last frame, or has a single frame.
    """
    model, methods = checkpoint.model, make_methods(checkpoint.model, specs)
    rows: dict[str, list] = {spec.name: [] for spec in specs}
    for method in methods:
        method.start(1)
    pixels = (checkpoint.preprocess(frame.image, model.dtype, model.device) for frame in reader)
    with torch.inference_mode(), contextlib.closing(prefetch(pixels)) as frames:
        for number, pixel_values in enumerate(frames):
            for spec, method in zip(specs, methods, strict=True):
                step, spent = timed(lambda m=method, x=pixel_values: m.step(x), model.device)
                embedding = step.embeddings[0].float().cpu()
                if not embedding.isfinite().all():
                    raise ValueError(
                        f"{spec.name} gives an embedding with NaN or infinite values for frame {number} of "
                        f"{reader.path}. Choose another --dtype: the range of float16 is too small for some "
                        "checkpoints."
                    )
                if spec.kind in HELD:  # a copy of a dense embedding, which other methods may have computed
                    embedding, spent = embedding.new_empty(0), math.nan
                rows[spec.name].append((embedding, step.cost[0].item(), step.skip_rate[0].item(), spent))
    if len(rows[specs[0].name]) < 2:
        raise VideoError(f"{reader.path} gives a single frame; expected at least two to compare.")
    recordings = {}
    for name, of_method in rows.items():
        embeddings, *figures = zip(*of_method, strict=True)
        recordings[name] = VideoRecording(torch.stack(embeddings), *map(torch.tensor, figures))
    return recordings


def outcome_of(
    spec: MethodSpec, recording: VideoRecording, dense: VideoRecording, video: EvalVideo, labels: Labels | None
) -> Outcome:
    """A method's outcome on one video. The video's label is that of the mean of its frames' normalised embeddings."""
    embeddings, reference = recording.embeddings_of(dense)[1:], dense.embeddings[1:]
    cosine = torch.nn.functional.cosine_similarity(embeddings.double(), reference.double(), dim=-1)
    cost, skip, milliseconds = (
        values[1:].double().numpy() for values in (recording.cost, recording.skip, recording.milliseconds)
    )
    outcome = Outcome(spec, [cost], [cosine.numpy()], [skip], [float(np.median(milliseconds))])
    if labels is not None and video.labelled:
        best, best_of_dense = (labels.logits(some).argmax(-1) for some in (embeddings, reference))
        outcome.agrees.append((best == best_of_dense).numpy())
        logits = labels.logits(torch.nn.functional.normalize(embeddings, dim=-1).mean(0))
        outcome.labels.append(labels.names[int(logits.argmax())])
        if video.truth is not None:
            outcome.ranks.append(int(ranks(spec.name, [logits.tolist()], [labels.names.index(video.truth)])[0]))
    return outcome


class Evaluation:
    """
    Measures dense, methods and baselines on videos.

    Args:
        checkpoint: from `load_checkpoint`.
        videos: from `find_videos`.
        out: folder; `records/` in it holds the recordings.
        specs: from `chosen_methods`, dense first.
        frames, stride: use the first N frames of each video (None for all), and every Nth frame.
        fresh: record everything again.
        on_step: called with the name of a video, the current step, the number of videos done and of all videos.

    ValueError for fewer than two frames, and a resolution of less than one patch.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        videos: VideoSet,
        out: Path,
        specs: Sequence[MethodSpec],
        frames: int | None = None,
        stride: int = 1,
        fresh: bool = False,
        on_step: Callable[[str, str, int, int], None] = lambda *_: None,
    ):
        if frames is not None and frames < 2:
            raise ValueError(f"`frames` is {frames}; expected a whole number of at least 2.")
        model, preprocess = checkpoint.model, checkpoint.preprocess
        preprocess.patches_per_side(model.config.patch_size)  # refuses too low a resolution
        self.checkpoint, self.videos, self.specs = checkpoint, videos, specs
        self.settings = {"frames": frames, "stride": stride}
        self.fresh, self.on_step, self.processes = fresh, on_step, Processes()
        self.store = RecordingStore(out / "records", model, preprocess, ["video/reader.py"], ["av"])

    def recordings_of(self, video: EvalVideo, say: Callable[[str], None]) -> dict[str, VideoRecording]:
        """The recordings of all methods for one video, read or made. Errors are those of `record`."""
        reader = VideoReader(video.path, stride=self.settings["stride"], max_frames=self.settings["frames"])
        depends = {"video": file_digest(video.path), **self.settings}
        paths = {spec.name: self.store.path(video.path.stem[:40], spec, **depends) for spec in self.specs}
        found = {} if self.fresh else {name: VideoRecording.read(path) for name, path in paths.items()}
        missing = [spec for spec in self.specs if found.get(spec.name) is None]
        for group in passes_of(missing):
            say(group[0].name)
            for name, recording in record(self.checkpoint, reader, group).items():
                recording.write(paths[name])
                found[name] = recording
        return found

    def run(self) -> dict:
        """
        Measure this process's videos, and return the report on the videos of all processes. It lists videos that
        cannot be read as skipped, with the reason. ValueError for embeddings that are not finite, VideoError if no
        video can be measured, OSError if a recording cannot be written.
        """
        mine = self.processes.share(len(self.videos.videos))
        measured, skipped = [], []
        for done, place in enumerate(mine):
            video = self.videos.videos[place]

            def say(what, name=video.name, done=done):
                if self.processes.is_main:
                    self.on_step(name, what, done, len(mine))

            say("reading")
            try:
                found = self.recordings_of(video, say)
            except VideoError as error:
                skipped.append((place, str(error)))
            else:
                dense, labels = found[DENSE.name], self.checkpoint.labels
                outcomes = [outcome_of(spec, found[spec.name], dense, video, labels) for spec in self.specs]
                measured.append((place, outcomes))
        measured, skipped = (dict(sorted(self.processes.gather(found))) for found in (measured, skipped))
        if not measured:
            raise VideoError(f"None of the {len(skipped)} videos can be measured: {next(iter(skipped.values()))}")
        return finite(self.report(measured, skipped))

    def report(self, measured: dict[int, list[Outcome]], skipped: dict[int, str]) -> dict:
        """The report, from each video's outcomes or the reason why it was skipped, by the video's place."""
        checkpoint, labels, videos = self.checkpoint, self.checkpoint.labels, self.videos.videos
        model, side = checkpoint.model, checkpoint.preprocess.patches_per_side(checkpoint.model.config.patch_size)
        names = [] if labels is None else list(labels.names)
        outcomes = [Outcome.joined(of_method) for of_method in zip(*measured.values(), strict=True)]
        dense = outcomes[0]
        report = {
            "model": {
                "name": checkpoint.name,
                "weights": self.store.weights,
                "parameters": model.num_parameters(),
                "resolution": checkpoint.preprocess.resolution,
                "grid": [side, side],
                "dtype": dtype_name(model.dtype),
            },
            "videos": {
                "name": self.videos.name,
                "count": len(videos),
                "measured": len(measured),
                "frames": sum(map(len, dense.cost)),
                "skipped": [{"name": videos[place].name, "reason": reason} for place, reason in skipped.items()],
                "names": [videos[place].name for place in measured],
            },
            "labels": {
                "names": names,
                "template": None if labels is None else labels.template,
                "true": bool(dense.ranks),
                "videos_asked": len(dense.agrees),
                "note": checkpoint.note,
            },
            "settings": {**self.settings, **BOOTSTRAP},
            "processes": self.processes.count,
            "commit": checkout_commit(),
            **machine_and_versions(str(model.device)),
            "methods": [],
            "truths": [videos[place].truth for place in measured] if dense.ranks else [],
        }
        families, asked = baseline_families(outcomes), questions(dense, len(names))
        for outcome, of_videos in zip(outcomes, zip(*measured.values(), strict=True), strict=True):
            entry = asdict(outcome.spec) | {
                "figures": outcome_figures(outcome, None if outcome is dense else dense, len(names)),
                "videos": [video_figures(of_video) for of_video in of_videos],
            }
            if outcome.spec.kind == "stream":
                entry["beside"] = {one.name: compare(outcome, families, one, **BOOTSTRAP) for one in asked}
            report["methods"].append(entry)
        return report
