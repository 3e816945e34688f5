"""
Watch cameras: all with a new picture in one call, as streams; events as their labels change.

    sources = {name: open_source(place) for name, place in places.items()}
    summary = watch_cameras(sources, model, preprocess, {"preset": "balanced"}, labels=labels, emit=print)
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..utils.files import significant
from ..utils.jobs import stop_on_interrupt
from ..video.labels import Labels
from ..video.preprocess import Preprocessor
from ..video.records import best_label
from ..vision.modeling_neuroflow_siglip import NeuroFlowSiglipVisionModel
from .latest import LatestPictures, stamp
from .sources import Source
from .streams import CameraStreams

TICK = 0.2  # seconds between looks at whether to stop
DELAYS_KEPT = 10_000  # of the last frames of a source, for quantiles


@dataclass(frozen=True, eq=False)
class Seen:
    """What the model gave for a picture."""

    source: str  # its name
    image: np.ndarray  # uint8 RGB [H, W, 3]
    mask: np.ndarray  # bool [grid_h, grid_w], the encoded patches
    cost: float  # relative to dense
    label: str | None  # label, confidence: the best label and SigLIP's probability of it; None without labels
    confidence: float | None


@dataclass
class SourceFigures:
    """What is counted of a source."""

    frames: int = 0  # pictures that were encoded
    cost: float = 0.0  # their summed cost, relative to dense
    losses: int = 0  # how often it was lost
    changes: int = 0  # how often its label changed; the first label counts
    # seconds from a picture's arrival to its result: the longest, and those of the last frames
    longest_delay: float | None = None
    delays: deque = field(default_factory=lambda: deque(maxlen=DELAYS_KEPT))

    def add_delay(self, delay: float):
        """Count a picture's."""
        self.longest_delay = max(self.longest_delay or 0.0, delay)
        self.delays.append(delay)

    def line(self, received: int, dropped: int) -> dict:
        """The figures of a source in the summary."""
        quantiles = np.quantile(self.delays, (0.5, 0.95)).tolist() if self.delays else [None, None]
        delays = {"median": quantiles[0], "p95": quantiles[1], "max": self.longest_delay}
        return {
            "received": received,
            "encoded": self.frames,
            "dropped": dropped,
            "mean_cost": significant(self.cost / self.frames) if self.frames else None,
            "delay_seconds": {name: significant(delay, 4) for name, delay in delays.items()},
            "label_changes": self.changes,
            "losses": self.losses,
        }


def watch_cameras(
    sources: Mapping[str, tuple[Source, bool]],
    model: NeuroFlowSiglipVisionModel,
    preprocess: Preprocessor,
    gate_options: dict | None = None,
    *,
    labels: Labels | None = None,
    fps: float | None = None,
    emit: Callable[[dict], Any] = print,
    on_round: Callable[[list[Seen], float], Any] | None = None,
) -> dict:
    """
    Watch cameras until all files among them ended, or until Ctrl-C or SIGTERM.

    In each round, the newest picture of every source that has one is encoded, all in one call. What came meanwhile but
    for the newest is dropped, so a result comes at most two rounds after its picture. A source that is lost is tried
    again after pauses that grow, and begins anew with a keyframe; the others go on.

    Args:
        sources: by name, of `open_source`.
        model, preprocess: from `load_model`.
        gate_options: options of [`NeuroFlowGateConfig`] that override the model's.
        labels: from `load_model_with_labels`; without, there are no events but those of connections.
        fps: at most so many rounds a second; None: as many as the machine can do.
        emit: called with each event, a dict.
        on_round: called with what was seen in a round, and seconds since the beginning.

    Returns:
        `seconds`, and the figures of each source under `sources`: pictures `received`, `encoded` and `dropped`,
        `mean_cost`, `delay_seconds` from a picture's arrival to its result (median and p95 of the last 10,000, and the
        longest of all), `label_changes` and `losses`.

    Raises:
        ValueError: for no source, and `fps` out of range.
    """
    if not sources:
        raise ValueError("There are no sources; expected at least one.")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"`fps` is {fps}; expected a number of rounds a second above 0, or None.")
    figures = {name: SourceFigures() for name in sources}
    streams = CameraStreams(model, gate_options or {})
    best: dict[str, str] = {}
    begun = time.monotonic()
    with stop_on_interrupt() as stop, LatestPictures(sources) as pictures:
        while not stop.is_set() and not pictures.all_ended:
            round_begun = time.monotonic()
            events, arrivals = pictures.take(TICK)
            for event in events:
                emit(event)
                if event["event"] == "connected":
                    streams.restart(event["source"])
                figures[event["source"]].losses += event["event"] == "lost"
            if not arrivals:
                continue
            images = [arrival.picture() for arrival in arrivals.values()]
            pixel_values = torch.cat([preprocess(image, model.dtype, model.device) for image in images])
            with torch.inference_mode():
                stream = streams.of(list(arrivals))
                output = model(pixel_values=pixel_values, interpolate_pos_encoding=True, stream=stream)
            embeddings, costs = output.pooler_output.float().cpu(), output.cost.tolist()
            logits = None if labels is None else labels.logits(embeddings)
            masks = output.active_mask.cpu().numpy()
            seen = []
            for row, (name, arrival) in enumerate(arrivals.items()):
                delay, counted = time.monotonic() - arrival.arrived, figures[name]
                counted.frames += 1
                counted.cost += costs[row]
                counted.add_delay(delay)
                found = {} if logits is None else best_label(labels.names, logits[row])
                if found and found["label"] != best.get(name):
                    when = {"event": "label", "source": name, "time": stamp(time.time() - delay)}
                    emit(when | found | {"previous": best.get(name)})
                    best[name] = found["label"]
                    counted.changes += 1
                label, confidence = found.get("label"), found.get("confidence")
                seen.append(Seen(name, images[row], masks[row], costs[row], label, confidence))
            if on_round is not None:
                on_round(seen, time.monotonic() - begun)
            if fps is not None:
                stop.wait(max(0.0, round_begun + 1 / fps - time.monotonic()))
    lines = {name: of.line(pictures.received[name], pictures.dropped[name]) for name, of in figures.items()}
    return {"seconds": round(time.monotonic() - begun, 3), "sources": lines}
