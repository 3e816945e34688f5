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
from pathlib import Path

from ..evaluation.datasets import find_videos
from ..utils.files import prepare_folder, write_whole
from ..utils.jobs import stop_on_interrupt
from ..video.labels import Labels
from ..video.preprocess import Preprocessor
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .dataset import dataset_settings, file_of, finished_videos
from .job import EmbedJob, Ended, Event, Waiting, Work, embed_waiting

FAILURES = "failures.jsonl"
MOST_STREAMS = 16  # more gained nothing on CPUs, and each takes memory and a thread


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
    streams: int | None = None,
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
        streams: how many videos to encode in one call; default: all, at most 16.
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
    if streams is not None and streams < 1:
        raise ValueError(f"`streams` is {streams}; expected a number of videos, at least 1.")
    options = gate_options or {}
    settings = dataset_settings(model, preprocess, model.new_stream(**options).gate, every, labels)
    out = prepare_folder(out).absolute()
    kept = finished_videos(out, settings) & set(videos)
    progress = EmbedProgress({video: size_of(video) for video in videos}, kept)
    # the largest first: at the end, few streams are left for a long one
    waiting = deque(sorted(set(videos) - kept, key=lambda video: (-progress.sizes[video], video)))
    failures = {video: reason for video, reason in read_failures(out).items() if Path(video) not in waiting}
    metadata = settings | {"model": model_name, "gate_options": options}  # as given: a preset by its name
    job = EmbedJob(model, preprocess, options, streams or MOST_STREAMS, every, labels, out, metadata)
    embedded = 0

    delete_partial(out)  # of a run that was killed
    with contextlib.ExitStack() as stack:
        stack.callback(delete_partial, out)
        stop = stack.enter_context(stop_on_interrupt())
        for event in stack.enter_context(contextlib.closing(work(waiting, job))):
            if isinstance(event, Ended):
                if event.reason:  # first, so that a kill after it leaves the video to be tried again
                    failures[str(event.video)] = event.reason
                    write_failures(out, failures)
                if event.partial is not None:
                    event.partial.replace(file_of(out, event.video))
                    embedded += 1
            if on_step is not None:
                on_step(*progress.after(event))
            if stop.is_set():
                break
        interrupted = stop.is_set()
    write_failures(out, failures)
    return EmbedResult(len(progress.sizes), len(kept), embedded, failures, interrupted)


def delete_partial(out: Path):
    """Delete the files of videos that are not finished, and no other program's."""
    for partial in out.glob(".*.parquet.*.part"):
        partial.unlink(missing_ok=True)


def size_of(video: Path) -> int:
    """Bytes of a video; 0 if it is gone."""
    try:
        return video.stat().st_size
    except FileNotFoundError:
        return 0


class EmbedProgress:
    """How much is done, in bytes of video; `kept` are the videos that were done before."""

    def __init__(self, sizes: dict[Path, int], kept: set[Path]):
        self.sizes, self.total = sizes, sum(sizes.values())
        self.done, self.videos_done = sum(sizes[video] for video in kept), len(kept)
        self.shares: dict[Path, float] = {}  # of the videos that are being embedded

    def after(self, event: Event) -> tuple[str, float, float]:
        """Take in what happened: what is done in words, and in bytes, and the bytes of all videos."""
        if isinstance(event, Waiting):
            what = event.reason
        elif isinstance(event, Ended):
            self.shares.pop(event.video, None)
            self.done += self.sizes[event.video]
            self.videos_done += 1
            what = f"{event.video.name} done"
        else:
            self.shares[event.video] = event.share
            what = f"{event.video.name} {event.share:.0%}"
        running = sum(share * self.sizes[video] for video, share in self.shares.items())
        return f"{self.videos_done} of {len(self.sizes)} videos, {what}", self.done + running, self.total


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
