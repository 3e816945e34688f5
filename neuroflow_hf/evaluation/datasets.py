"""
Videos to measure a checkpoint on: a file, or a folder of files, whose subfolders may be named after their labels.

    videos = find_videos("UCF-101")
    videos.name, videos.classes[:2], videos.videos[0].truth
    # "UCF-101", ("apply eye makeup", "apply lipstick"), "apply eye makeup"
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..video.reader import bundled_clip, labelled_clip

KINDS = "3gp asf avi flv gif h264 h265 m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts vob webm wmv"
ENDINGS = [f".{kind}" for kind in KINDS.split()]
SHIPPED = "shipped clips"
SHIPPED_LABELS = ("a dog", "a bicycle", "a cat", "nothing")
LETTER = r"[^\W\d_]"
# between dog|House, TV|Show, show|2 and 2|nd
WORD_ENDS = re.compile(rf"(?<=[^\W\d_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<={LETTER})(?=\d)|(?<=\d)(?={LETTER})")


@dataclass(frozen=True)
class EvalVideo:
    """One video."""

    path: Path  # the file
    name: str  # its path in the folder, with `/`
    truth: str | None = None  # the true label, from the subfolder's name; None if unknown
    labelled: bool = True  # whether to compare the video with labels


@dataclass(frozen=True)
class VideoSet:
    """Videos in the order of their names."""

    name: str  # of the file or the folder
    videos: tuple[EvalVideo, ...]  # at least one
    classes: tuple[str, ...] = ()  # the true labels, each once, in the order of the subfolders; empty if unknown


def class_words(folder: str) -> str:
    """A folder's name as a label: `"ApplyEyeMakeup"` and `"apply_eye_makeup"` to `"apply eye makeup"`."""
    words = WORD_ENDS.sub(" ", re.sub(r"[\W_]+", " ", folder)).split()
    return " ".join(words).lower() if words else folder


def find_videos(path: str | Path | None, truth: bool = True) -> VideoSet:
    """
    Find videos: a file; those of a folder; or those of a folder with a subfolder for each class. None stands for the
    two clips that ship with the package. `truth` says whether names of subfolders are true labels; if not, folders may
    have any depth. FileNotFoundError if `path` does not exist, ValueError if the folder has no videos or has videos at
    several depths.
    """
    if path is None:
        clips = {labelled_clip(): True, bundled_clip(): False}
        return VideoSet(SHIPPED, tuple(EvalVideo(clip, clip.name, labelled=own) for clip, own in clips.items()))
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}; expected a video file or a folder of videos.")
    if not path.is_dir():
        return VideoSet(path.name, (EvalVideo(path, path.name),))
    name = path.resolve().name
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS and file.is_file()]
    files = [(file, file.relative_to(path)) for file in found]
    files = [(file, place) for file, place in files if not any(part.startswith(".") for part in place.parts)]
    if not files:
        kinds = ", ".join(ENDINGS)
        raise ValueError(f"There is no video in {path}; expected files that end in {kinds}, or subfolders of them.")
    depths = sorted({len(place.parts) for _, place in files})
    if not truth or depths == [1]:
        return VideoSet(name, tuple(EvalVideo(file, place.as_posix()) for file, place in files))
    if depths != [2]:
        raise ValueError(
            f"The videos in {path} lie {' and '.join(str(depth - 1) for depth in depths)} folders deep; expected all "
            "in the folder itself, or all in subfolders named after what they show. Name another folder, or give "
            "--no-truth to take them all without such names."
        )
    videos = tuple(EvalVideo(file, place.as_posix(), class_words(place.parts[0])) for file, place in files)
    return VideoSet(name, videos, tuple(dict.fromkeys(video.truth for video in videos)))


def chosen_labels(videos: VideoSet, named: Sequence[str] | None) -> tuple[str, ...]:
    """
    The labels to choose among: those given, else the videos' classes, else those of the shipped clips; may be empty.
    ValueError if a class is not among the labels given, and if there is a single label.
    """
    own = SHIPPED_LABELS if videos.name == SHIPPED else videos.classes
    labels = own if named is None else tuple(named)
    missing = [name for name in videos.classes if name not in labels]
    if missing:
        raise ValueError(
            f"--labels lacks {', '.join(map(repr, missing[:5]))}{' and others' * (len(missing) > 5)}, after which "
            f"subfolders of {videos.name} are named. Add them, leave --labels out, or give --no-truth if the names of "
            "the subfolders do not say what the videos show."
        )
    if len(labels) == 1 and labels[0]:
        raise ValueError(
            f"There is a single label, {labels[0]!r}, which is the best one on every frame; give two --labels, "
            "or give --no-truth."
        )
    return labels


def file_digest(path: Path) -> str:
    """16 hex digits that change with a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
