"""
How many frames per second does `neuroflow embed` give, from file to Parquet, against batched dense?

    python -m eval.vision.embed_throughput     # 20 minutes on two idle cores

Copies of the clip that ships with the package are embedded by `embed_videos`, as the command does it. Dense does the
same with all patches encoded, and with the number of videos in one call that suits it best. All its
frames cost the same, so it gets fewer. The methods take turns, so that a machine that slows down slows all of them.
Decoding, and preprocessing after it, are also timed alone, in one thread. SigLIP-base's geometry at 224 px with random
weights.

Writes `eval/results/embed_throughput.json`, shown in `docs/guides/archives.md`. Run it on a machine that does nothing
else.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import av
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.progress import track

from eval.docs.speed import throughput_table
from eval.report import RESULTS, provenance, publish
from eval.vision.benchmark_vision import base_model
from neuroflow_hf import PRESETS
from neuroflow_hf.archive.embed import embed_videos
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoReader, bundled_clip

DENSE = {"mode": "dense"}
VIDEOS, FRAMES, DENSE_FRAMES, BATCHES, REPEATS = 16, 60, 10, (1, 4, 16), 3


def write_copies(folder: Path, videos: int, frames: int) -> list[Path]:
    """Copies of the clip's first frames, as they are encoded there."""
    paths = [folder / f"{frames}-{number:02d}.mkv" for number in range(videos)]
    for path in paths:
        with av.open(str(bundled_clip())) as clip, av.open(str(path), "w") as copy:
            stream = copy.add_stream_from_template(clip.streams.video[0])
            for packet in itertools.islice(clip.demux(video=0), frames):
                if packet.size:  # an empty packet marks the end
                    packet.stream = stream
                    copy.mux(packet)
    return paths


def time_embedding(videos: list[Path], model, preprocess: Preprocessor, gate: dict, streams: int) -> dict:
    """Frames per second of `embed_videos` with all it does, and the mean cost of its rows."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        result = embed_videos(videos, model, preprocess, out, gate, streams=streams)
        seconds = time.perf_counter() - begun
        assert result.embedded == len(videos)
        costs = [cost for file in Path(out).glob("*.parquet") for cost in pq.read_table(file)["cost"].to_pylist()]
    return {"frames_per_second": len(costs) / seconds, "cost": statistics.fmean(costs)}


def rate_of(items: Iterable, work: Callable = lambda item: item) -> float:
    """How many items per second are given and worked on, one after the other."""
    begun, count = time.perf_counter(), 0
    for item in items:
        work(item)
        count += 1
    return count / (time.perf_counter() - begun)


def measure(videos: list[Path], dense_videos: list[Path], model, preprocess: Preprocessor) -> dict:
    """Frames per second of all methods, the median of the repeats: what `throughput_table` shows."""
    methods = {f"dense, {batch} in one call": (dense_videos, DENSE, batch) for batch in BATCHES}
    methods |= {preset: (videos, {"preset": preset}, len(videos)) for preset in PRESETS}
    rates: dict[str, list[float]] = {name: [] for name in ("decoding", "decoding and preprocessing", *methods)}
    costs = {}
    for _ in track(range(REPEATS), "rounds", console=Console(stderr=True)):
        rates["decoding"].append(rate_of(VideoReader(videos[0])))
        images = (frame.image for frame in VideoReader(videos[0]))
        rates["decoding and preprocessing"].append(
            rate_of(images, lambda image: preprocess(image, model.dtype, model.device))
        )
        for name, (paths, gate, streams) in methods.items():
            found = time_embedding(paths, model, preprocess, gate, streams)
            rates[name].append(found["frames_per_second"])
            costs[name] = found["cost"]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in methods if name not in PRESETS), key=medians.__getitem__)
    return {
        "frames_per_second": medians,
        "all": rates,
        "best_dense": best,
        "presets": [
            {"preset": name, "cost": cost, "times_dense": medians[name] / medians[best], "aim": 0.85 / cost}
            for name, cost in costs.items()
            if name in PRESETS
        ],
    }


def main(
    output: Annotated[Path, typer.Option(help="Write this JSON file.")] = RESULTS / "embed_throughput.json",
):
    """Time embedding with all presets and dense, and show the table."""
    torch.manual_seed(0)
    model = base_model("float32", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        videos, dense_videos = (write_copies(Path(folder), VIDEOS, count) for count in (FRAMES, DENSE_FRAMES))
        measured = measure(videos, dense_videos, model, Preprocessor(model.config.image_size))
    report = {**provenance(), "videos": VIDEOS, "dtype": "float32", "device": "cpu", "frames": FRAMES}
    report |= {"dense_frames": DENSE_FRAMES, **measured}
    publish(output, report, throughput_table(report))


if __name__ == "__main__":
    typer.run(main)
