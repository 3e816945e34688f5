"""
Embed many videos: several at a time, as streams of one call, while threads decode ahead.

    model, preprocess = load_model("path/to/siglip")
    result = embed_videos(video_paths(["recordings/"]), model, preprocess, "dataset", {"preset": "balanced"})
    result.embedded, result.failures
"""

import contextlib
import glob
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..evaluation.datasets import find_videos
from ..utils.files import prepare_folder, write_whole
from ..utils.jobs import stop_on_interrupt
from ..video.labels import Labels
from ..video.preprocess import Preprocessor
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .dataset import dataset_settings, file_of, finished_videos
from .job import EmbedJob, Ended, Reached, Waiting, Work, embed_waiting

FAILURES = "failures.jsonl"
MOST_STREAMS = 16  # each takes memory and a thread


@dataclass(frozen=True)
class EmbedResult:
    """The result of embedding."""

    videos: int  # how many were asked for
    kept: int  # how many of them an earlier run had finished
    embedded: int  # how many of them this run finished, those that are cut short included
    failures: dict[str, str]  # reason by video, of all in `failures.jsonl`
    interrupted: bool  # whether Ctrl-C or SIGTERM ended the run


def video_paths(places: Sequence[str | Path]) -> list[Path]:
    """
    Absolute paths of videos, each once.

    Args:
        places: videos, folders of any depth, patterns such as `"cam*/*.mp4"`, and `.txt` files with one a line.

    Raises:
        FileNotFoundError: for something that does not exist, and a pattern that nothing fits.
        ValueError: for a folder without videos.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if place.suffix == ".txt" and place.is_file():
            lines = place.read_text(encoding="utf-8").splitlines()
            paths = video_paths([line.strip() for line in lines if line.strip()])
        else:
            matches = [str(place)] if place.exists() else sorted(glob.glob(str(place), recursive=True))
            paths = [video.path for match in matches or [place] for video in find_videos(match, truth=False).videos]
        found |= dict.fromkeys(path.resolve() for path in paths)
    return list(found)


def embed_videos(
    videos: Sequence[Path],
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    out: str | Path,
    gate_options: dict | None = None,
    *,
    streams: int = MOST_STREAMS,
    every: float | None = None,
    labels: Labels | None = None,
    model_name: str = "",
    on_step: Callable[[str, float, float], None] | None = None,
    work: Work = embed_waiting,
) -> EmbedResult:
    """
    Embed videos and write a Parquet file for each to a folder, together a dataset.

    Videos that the folder holds, and that did not change since, are kept. A video that cannot be read to its end, or
    is deleted or changed meanwhile, is listed with the reason in `failures.jsonl`; the frames before are kept, but
    none of a changed one. After Ctrl-C, or a kill at any point, the same call goes on with the videos that are not
    finished.

    Args:
        videos: of `video_paths`.
        model, preprocess: from `load_model`.
        out: the folder; made if missing. One process may write to it at a time.
        gate_options: options of [`NeuroFlowGateConfig`] that override the model's.
        streams: encode at most so many videos in one call; more than 16 gained nothing on CPUs.
        every: seconds; embed the first frame of each interval of this length. None: all frames.
        labels: also store the best of these and its confidence, from `load_model_with_labels`.
        model_name: for the metadata.
        on_step: called with what is done in words, the bytes of video that are done, and those of all.
        work: who embeds: this process, or the machines of `cluster_work`.

    Raises:
        ValueError: for options out of range, a dataset of other settings, and embeddings that are not finite.
        NotADirectoryError, OSError: if `out` is a file or cannot be written to.
    """
    if every is not None and not 0 < every < float("inf"):
        raise ValueError(f"`every` is {every}; expected a number of seconds above 0, or None for all frames.")
    if streams < 1:
        raise ValueError(f"`streams` is {streams}; expected a number of videos, at least 1.")
    options = gate_options or {}
    settings = dataset_settings(model, preprocess, model.new_stream(**options).gate, every, labels)
    out = prepare_folder(out).absolute()
    kept = finished_videos(out, settings) & set(videos)
    sizes = {video: video.stat().st_size if video.exists() else 0 for video in videos}
    # the largest first: at the end, few streams are left for a long one
    waiting = deque(sorted(set(videos) - kept, key=lambda video: (-sizes[video], video)))
    failures = {video: reason for video, reason in read_failures(out).items() if Path(video) not in waiting}
    versions = {name: version(name) for name in ("neuroflow-hf", "torch", "transformers")}
    # gate options as given: a preset by its name
    metadata = settings | {"model": model_name, "gate_options": options, "versions": versions}
    job = EmbedJob(model, preprocess, options, streams, every, labels, out, metadata)
    shares: dict[Path, float] = {}  # of the videos that this run embeds
    done, total = float(sum(sizes[video] for video in kept)), sum(sizes.values())
    embedded, ended = 0, len(kept)

    delete_partial(out)  # of a run that was killed
    with contextlib.ExitStack() as stack:
        stack.callback(delete_partial, out)
        stop = stack.enter_context(stop_on_interrupt())
        for event in stack.enter_context(contextlib.closing(work(waiting, job))):
            if isinstance(event, Waiting):
                what = event.reason
            else:
                share = event.share if isinstance(event, Reached) else 1.0
                done += (share - shares.get(event.video, 0.0)) * sizes[event.video]
                shares[event.video] = share
                what = f"{event.video.name} {share:.0%}"
            if isinstance(event, Ended):
                ended += 1
                if event.reason:  # first, so that a kill after it leaves the video to be tried again
                    failures[str(event.video)] = event.reason
                    write_failures(out, failures)
                if event.partial is not None:
                    event.partial.replace(file_of(out, event.video))
                    embedded += 1
            if on_step is not None:
                on_step(f"{ended} of {len(sizes)} videos, {what}", done, total)
            if stop.is_set():
                break
        interrupted = stop.is_set()
    write_failures(out, failures)
    return EmbedResult(len(sizes), len(kept), embedded, failures, interrupted)


def delete_partial(out: Path):
    """Delete the files of videos that are not finished, and no other program's."""
    for partial in out.glob(".*.parquet.*.part"):
        partial.unlink(missing_ok=True)


def read_failures(out: Path) -> dict[str, str]:
    """Reason by video, from `failures.jsonl`."""
    file = out / FAILURES
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["video"]: line["reason"] for line in map(json.loads, lines)}


def write_failures(out: Path, failures: dict[str, str]):
    """Write `failures.jsonl`; without failures, there is none."""
    if failures:
        lines = [json.dumps({"video": video, "reason": reason}) + "\n" for video, reason in failures.items()]
        write_whole(out / FAILURES, "".join(lines))
    else:
        (out / FAILURES).unlink(missing_ok=True)
