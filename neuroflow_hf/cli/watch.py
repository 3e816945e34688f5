"""`neuroflow watch`: cameras, and their labels as they change."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options
from .errors import one_line_errors
from .option_groups import with_groups
from .options import option
from .output import figure_table
from .vision_model import VISION, check_vision


@with_groups(how=VISION)
def watch(
    how: dict,
    sources: Annotated[
        list[str],
        typer.Argument(help="Cameras: /dev/video0, RTSP or HTTP URLs; or video files, which play at their own speed."),
    ],
    overlay: Annotated[
        Path | None,
        option("Write a video of all cameras that marks encoded patches.", metavar="FILE.mp4", default="none"),
    ] = None,
    webhook: Annotated[
        str | None, option("Also send each event to this HTTP address, by POST.", metavar="URL", default="none")
    ] = None,
    fps: Annotated[
        float | None, option("Look at most N times a second.", default="as often as possible", metavar="N")
    ] = None,
    debug: options.Debug = False,
):
    """
    Watch cameras, several in one call, and print a line of JSON whenever a camera's best label changes.

    Frames that come faster than they can be encoded are dropped, so that results stay close to the present. A camera
    that is lost is tried again. Ctrl-C ends with a summary.
    """
    with one_line_errors(debug, nothing_done="nothing was watched."), contextlib.ExitStack() as stack:
        from ..cameras.mosaic import Mosaic
        from ..cameras.sources import open_sources
        from ..cameras.watch import watch_cameras
        from ..cameras.webhook import Webhook, post_json
        from ..video.run import covered_share

        if how["labels"] is None and overlay is None:
            raise ValueError("There is nothing to report; give --labels 'a person, a car', or --overlay FILE.mp4.")
        if overlay is not None and (overlay.suffix != ".mp4" or not overlay.absolute().parent.is_dir()):
            raise ValueError(f"--overlay {overlay} cannot be written; expected an .mp4 file in a folder that exists.")
        hook = None if webhook is None else Webhook(post_json(webhook))
        gate_options, load = check_vision(how)
        opened = open_sources(sources)
        loaded, preprocess, embedded = load()
        mosaic = None
        if overlay is not None:
            mosaic = Mosaic(overlay, list(opened), covered_share(loaded, preprocess), embedded is not None)
            stack.callback(mosaic.close)

        def emit(event: dict):
            print(json.dumps(event), flush=True)
            if hook is not None:
                hook.post(event)

        summary = watch_cameras(
            opened,
            loaded,
            preprocess,
            gate_options,
            labels=embedded,
            fps=fps,
            emit=emit,
            on_round=None if mosaic is None else mosaic.add,
        )
        if hook is not None:
            hook.close()
            summary["webhook"] = {"sent": hook.sent, "failed": hook.failed, "reason": hook.reason}
        emit_summary(summary)


def emit_summary(summary: dict):
    """Print the summary as a line of JSON on stdout, and as a table on stderr."""
    print(json.dumps({"event": "summary"} | summary), flush=True)
    headers = ("source", "received", "encoded", "dropped", "mean cost", "delay: median", "p95", "max", "lost")
    rows = []
    for name, line in summary["sources"].items():
        delays = ["" if delay is None else f"{delay:.2f} s" for delay in line["delay_seconds"].values()]
        cost = "" if line["mean_cost"] is None else f"{line['mean_cost']:.3f}"
        counts = [str(line[key]) for key in ("received", "encoded", "dropped")]
        rows.append((name, *counts, cost, *delays, str(line["losses"])))
    console = Console(stderr=True, highlight=False)
    console.width = max(console.width, 120)
    console.print(figure_table(headers, rows, title=f"{summary['seconds']:.1f} seconds"))
    failed = summary.get("webhook", {}).get("failed")
    if failed:
        console.print(f"{failed} events did not reach the webhook: {summary['webhook']['reason']}", markup=False)
