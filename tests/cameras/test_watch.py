"""Watching cameras: nothing queues, a lost source disturbs no other, a stream is as if alone, events are true."""

import base64
import json
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from neuroflow_hf.cameras import latest, sources
from neuroflow_hf.cameras.latest import Arrival, LatestPictures
from neuroflow_hf.cameras.mosaic import Mosaic
from neuroflow_hf.cameras.sources import SourceLostError, open_source, open_sources, source_name
from neuroflow_hf.cameras.streams import CameraStreams
from neuroflow_hf.cameras.watch import Seen, SourceFigures, watch_cameras
from neuroflow_hf.cameras.webhook import Webhook, post_json
from neuroflow_hf.video.labels import Labels
from neuroflow_hf.video.preprocess import Preprocessor
from neuroflow_hf.video.reader import VideoError, VideoReader
from tests.cli.test_run import call, count_frames, write_clip
from tests.conftest import GATED_MODES

GATE = {"mode": "extrapolate", "threshold": 0.02, "keyframe_interval": 6}
SERVER = Path(__file__).parent / "rtsp_server.py"
PREPROCESS = Preprocessor(resolution=24)


def picture(number, height=48, width=64):
    """A picture that moves with its number, uint8 [H, W, 3]."""
    image = np.random.default_rng(0).integers(0, 160, (height, width, 3), dtype=np.uint8)
    image[16:28, 2 * number % 36 : 2 * number % 36 + 12] = 255
    return image


def lazily(image):
    return lambda: image


# --- the newest picture --------------------------------------------------------------------------------------------


def test_late_pictures_are_dropped_and_not_queued():
    go_on, sent = threading.Event(), threading.Event()

    def source():
        for number in range(100):
            yield lazily(number)
        sent.set()
        go_on.wait(10)
        yield lazily(100)

    with LatestPictures({"a": (source, False)}) as pictures:
        assert sent.wait(10)
        events, arrivals = pictures.take(1)
        assert [(event["event"], event["source"]) for event in events] == [("connected", "a")]
        assert arrivals["a"].picture() == 99
        assert (pictures.received, pictures.dropped) == ({"a": 100}, {"a": 99})
        assert pictures.take(0.01) == ([], {})
        go_on.set()
        found = pictures.take(10)[1]
        assert found["a"].picture() == 100 and time.monotonic() - found["a"].arrived < 5
        while not pictures.all_ended:
            pictures.take(1)
    assert pictures.dropped == {"a": 99}


def test_a_lost_source_is_tried_again_with_growing_pauses_while_others_run(monkeypatch):
    monkeypatch.setattr(latest, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(latest, "LONGEST_PAUSE", 0.06)
    tries, steady = [], threading.Event()

    def failing():
        tries.append(time.monotonic())
        if len(tries) == 4:
            yield lazily(1)
        raise SourceLostError(f"try {len(tries)}")

    def going_on():
        number = 0
        while not steady.is_set():
            number += 1
            yield lazily(number)
            time.sleep(0.005)

    seen, changes = 0, []
    with LatestPictures({"a": (failing, True), "b": (going_on, True)}) as pictures:
        while len(tries) < 6:
            found, arrivals = pictures.take(5)
            seen += "b" in arrivals
            changes += [event for event in found if event["source"] == "a"]
        steady.set()
    kinds = [(event["event"], event.get("reason"), event.get("retry_seconds")) for event in changes][:6]
    assert kinds == [
        ("lost", "try 1", 0.02),
        ("lost", "try 2", 0.04),
        ("lost", "try 3", 0.06),
        ("connected", None, None),
        ("lost", "try 4", 0.02),
        ("lost", "try 5", 0.04),
    ]
    waited = np.diff(tries)
    assert all(waited >= np.array([0.02, 0.04, 0.06, 0.02, 0.04])) and seen > 5
    assert not any(thread.is_alive() for thread in pictures.threads)


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [GATE, {"preset": "thrifty"}, {"mode": "reconstruct", "max_age": 5}, *({"mode": mode} for mode in GATED_MODES)],
    ids=str,
)
def test_a_camera_is_encoded_as_if_alone(vision64, options):
    rounds = ["ab", "ab", "a", "abc", "c", "cb", "abc", "abc", "b", "a", "ca", "abc"]
    restarted = 7  # before this round, camera b is
    streams = CameraStreams(vision64, options)
    alone = {name: vision64.new_stream(**options) for name in "abc"}
    with torch.no_grad():
        for number, names in enumerate(rounds):
            if number == restarted:
                streams.restart("b")
                alone["b"].reset()
            frames = {name: PREPROCESS(picture(number + 5 * place), torch.float64) for place, name in enumerate(names)}
            output = vision64(pixel_values=torch.cat(list(frames.values())), stream=streams.of(list(names)))
            for row, (name, frame) in enumerate(frames.items()):
                expected = vision64(pixel_values=frame, stream=alone[name])
                assert torch.equal(output.active_mask[row], expected.active_mask[0]), (number, name)
                torch.testing.assert_close(output.pooler_output[row], expected.pooler_output[0])
                assert output.cost[row].item() == pytest.approx(expected.cost.item())


# --- the loop ------------------------------------------------------------------------------------------------------


class Script:
    """What `LatestPictures` gives, written down: a list of rounds."""

    def __init__(self, rounds, names):
        self.rounds, self.all_ended = iter(rounds), False
        self.received = self.dropped = dict.fromkeys(names, 7)

    def __call__(self, _):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def take(self, _):
        found = next(self.rounds, None)
        self.all_ended = found is None
        events, arrivals = found or ([], {})
        arrived = time.monotonic() - 0.5
        return events, {name: Arrival(lazily(image), arrived) for name, image in arrivals.items()}


def event(kind, source, **more):
    return {"event": kind, "source": source, "time": latest.stamp(time.time()), **more}


def test_events_say_what_changed_and_the_summary_counts(vision, monkeypatch):
    dark, bright = np.zeros((48, 64, 3), np.uint8), np.full((30, 90, 3), 255, np.uint8)
    with torch.no_grad():
        outputs = [vision(pixel_values=PREPROCESS(image)).pooler_output[0] for image in (dark, bright)]
    texts = torch.nn.functional.normalize(torch.stack(outputs) - sum(outputs) / 2, dim=-1)
    labels = Labels(("dark", "bright"), "{}", texts, 10.0, -1.0)
    rounds = [
        ([event("connected", "a"), event("connected", "b")], {"a": dark, "b": bright}),
        ([], {"a": dark}),
        ([event("lost", "b", reason="gone", retry_seconds=2.0)], {"a": bright}),
        ([], {}),
        ([event("connected", "b")], {"b": bright, "a": bright}),
    ]
    seen, events = [], []
    monkeypatch.setattr("neuroflow_hf.cameras.watch.LatestPictures", Script(rounds, "ab"))
    how = {"labels": labels, "emit": events.append, "on_round": lambda found, _: seen.append(found)}
    summary = watch_cameras(dict.fromkeys("ab"), vision, PREPROCESS, GATE, **how)
    kinds = [(event["event"], event["source"], event.get("label"), event.get("previous")) for event in events]
    assert kinds == [
        ("connected", "a", None, None),
        ("connected", "b", None, None),
        ("label", "a", "dark", None),
        ("label", "b", "bright", None),
        ("lost", "b", None, None),
        ("label", "a", "bright", "dark"),
        ("connected", "b", None, None),
    ]
    assert (events[4]["reason"], events[4]["retry_seconds"]) == ("gone", 2.0)
    assert events[2]["confidence"] == pytest.approx(labels.best(outputs[0])[1], rel=1e-3)
    assert events[2]["time"].endswith("+00:00") and events[2]["time"] < events[0]["time"]  # when it arrived
    assert json.loads(json.dumps(events)) == events
    counts = {
        name: (line["encoded"], line["label_changes"], line["losses"]) for name, line in summary["sources"].items()
    }
    assert counts == {"a": (4, 2, 0), "b": (2, 1, 1)}
    line = summary["sources"]["a"]
    assert line["received"] == 7 and 0 < line["mean_cost"] < 1
    assert 0.5 <= line["delay_seconds"]["median"] <= line["delay_seconds"]["p95"] <= line["delay_seconds"]["max"] < 30
    assert [[one.source for one in found] for found in seen] == [["a", "b"], ["a"], ["a"], ["b", "a"]]
    assert all(one.mask.all() for found in (seen[0], seen[3][:1]) for one in found)  # b began anew


def test_ctrl_c_ends_with_the_summary_and_options_are_checked(vision):
    def endless():
        while True:
            yield lazily(picture(0))

    summary = watch_cameras(
        {"a": (endless, True)},
        vision,
        PREPROCESS,
        GATE,
        emit=id,
        on_round=lambda *_: signal.raise_signal(signal.SIGINT),
        fps=0.01,
    )
    assert summary["sources"]["a"]["encoded"] == 1 and summary["seconds"] < 50
    with pytest.raises(ValueError, match="no sources"):
        watch_cameras({}, vision, PREPROCESS)
    with pytest.raises(ValueError, match="`fps` is 0"):
        watch_cameras({"a": (endless, True)}, vision, PREPROCESS, fps=0)


# --- sources -------------------------------------------------------------------------------------------------------


def test_sources_by_name(tmp_path):
    assert open_source("/dev/video9")[1] and open_source("RTSP://camera/main")[1]
    clip = write_clip(tmp_path / "clip.mkv", 5)
    source, live = open_source(str(clip))
    begun = time.monotonic()
    images = [give() for give in source()]
    assert not live and time.monotonic() - begun >= 0.4
    assert all(np.array_equal(image, frame.image) for image, frame in zip(images, VideoReader(clip), strict=True))
    with pytest.raises(ValueError, match=r"ftp://camera/a is no camera"):
        open_source("ftp://me:secret@camera/a")
    with pytest.raises(FileNotFoundError):
        open_source(str(tmp_path / "none.mp4"))
    with pytest.raises(VideoError):
        open_source(str(tmp_path))
    with pytest.raises(SourceLostError, match="No such file"):
        next(open_source("/dev/video99")[0]())


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("rtsp://me:secret@camera:554/main?a=secret&b=", "rtsp://camera:554/main?a=...&b=..."),
        ("rtsp://me:se/secret@camera/a", "rtsp://camera/a"),
        ("rtsp://camera/user=me&password=secret&channel=1/sub", "rtsp://camera/user=...&password=...&channel=.../sub"),
        ("http://camera?secret", "http://camera?..."),
        ("http://camera/a#secret", "http://camera/a"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("/dev/video0", "/dev/video0"),
        ("a=b?c=d.mp4", "a=b?c=d.mp4"),
    ],
)
def test_secrets_in_a_url_have_no_place_in_its_name(url, name):
    assert source_name(url) == name


def test_cameras_that_differ_in_secrets_only_have_two_names():
    opened = open_sources(["http://camera/?id=1", "http://camera/?id=2", "http://camera/"])
    assert list(opened) == ["http://camera/?id=...", "http://camera/?id=... (source 2)", "http://camera/"]


def test_secrets_in_a_url_are_not_shown(capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for url in (f"rtsp://me:secret@{address}/a", f"http://{address}/'secret'?token=secret"):
            with pytest.raises(SourceLostError) as caught:  # nobody listens
                next(open_source(url)[0]())
            assert "refused" in str(caught.value) and "secret" not in str(caught.value)
    assert "secret" not in "".join(capfd.readouterr())  # FFmpeg has a log of its own


class Camera(BaseHTTPRequestHandler):
    """A camera of JPEG pictures over HTTP; `server.going` False ends it, `server.silent` leaves it without a word."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        size = {"/a": (48, 64), "/b": (72, 80)}[self.path]
        number = 0
        while self.server.going:
            if not self.server.silent:
                jpeg = BytesIO()
                Image.fromarray(picture(number, *size)).save(jpeg, "JPEG", quality=95)
                head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg.getvalue())}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + jpeg.getvalue() + b"\r\n")
                except OSError:
                    return
                number += 1
            time.sleep(0.05)

    def log_message(self, *_):
        pass


def serve(handler, port=0):
    """An HTTP server in a thread, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads, server.going, server.silent = True, True, False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class Scenario:
    """
    Two cameras: both are seen, `cut` loses them, `come_back` brings them back, both are seen again, Ctrl-C. What is
    called from `watch_cameras` drives it.
    """

    def __init__(self, cut, come_back, names):
        self.cut, self.come_back, self.names = cut, come_back, names
        self.counts, self.events, self.phase = dict.fromkeys(names, 0), [], 0
        self.shapes, self.until = {}, time.monotonic() + 90

    def emit(self, event):
        self.events.append(event)
        assert time.monotonic() < self.until, self.events
        lost = {event["source"] for event in self.events if event["event"] == "lost"}
        if self.phase == 1 and lost == set(self.names):
            self.phase, self.counts = 2, dict.fromkeys(self.names, 0)
            self.come_back()

    def on_round(self, seen, _):
        assert time.monotonic() < self.until, self.events
        for one in seen:
            self.counts[one.source] += 1
            self.shapes[one.source] = one.image.shape
        if min(self.counts.values()) >= 3 and self.phase == 0:
            self.phase = 1
            self.cut()
        elif min(self.counts.values()) >= 3 and self.phase == 2:
            signal.raise_signal(signal.SIGINT)

    def run(self, model, places):
        how = {"emit": self.emit, "on_round": self.on_round}
        return watch_cameras(open_sources(places), model, PREPROCESS, GATE, **how)


def assert_came_back(scenario, summary):
    for name in scenario.names:
        kinds = [event["event"] for event in scenario.events if event["source"] == name]
        assert kinds[0] == "connected" and kinds[-1] == "connected" and "lost" in kinds
        line = summary["sources"][name]
        assert kinds.count("connected") == 2 and line["losses"] >= 1 and line["encoded"] >= 6


def test_http_cameras_that_fall_silent_and_come_back(vision, monkeypatch):
    monkeypatch.setattr(sources, "READ_SECONDS", 1)
    monkeypatch.setattr(latest, "FIRST_PAUSE", 0.1)
    server = serve(Camera)
    port = server.server_address[1]
    names = [f"http://127.0.0.1:{port}/{camera}" for camera in "ab"]
    scenario = Scenario(partial(setattr, server, "silent", True), partial(setattr, server, "silent", False), names)
    summary = scenario.run(vision, names)
    server.going = False
    server.shutdown()
    assert_came_back(scenario, summary)
    assert scenario.shapes == {names[0]: (48, 64, 3), names[1]: (72, 80, 3)}


def has_rtsp_server():
    try:
        return subprocess.run(["/usr/bin/python3", SERVER], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def test_rtsp_cameras_whose_server_stops_and_comes_back(vision, request, monkeypatch):
    monkeypatch.setattr(latest, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(latest, "LONGEST_PAUSE", 0.5)
    if not has_rtsp_server():
        pytest.skip("needs Debian's python3-gi, gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-base and -good")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = []

    def begin():
        server = subprocess.Popen(["/usr/bin/python3", SERVER, str(port)], stdout=subprocess.PIPE, text=True)
        request.addfinalizer(server.kill)
        servers.append(server)
        assert server.stdout.readline() == "ready\n"

    begin()
    names = [f"rtsp://127.0.0.1:{port}/{camera}" for camera in "ab"]
    scenario = Scenario(lambda: servers[0].kill(), begin, names)
    summary = scenario.run(vision, [name.replace("//", "//me:secret@") for name in names])
    assert_came_back(scenario, summary)
    assert scenario.shapes == {names[0]: (240, 320, 3), names[1]: (144, 176, 3)}
    assert "secret" not in json.dumps([scenario.events, summary])


# --- outputs -------------------------------------------------------------------------------------------------------


class Hook(BaseHTTPRequestHandler):
    """Takes events; refuses those without a label."""

    def do_POST(self):
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.events.append((self.headers["Content-Type"], self.headers["Authorization"], event))
        self.send_response(200 if "label" in event else 500)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_longest_delay_of_all_is_kept():
    counted = SourceFigures(delays=deque(maxlen=3))
    assert counted.line(0, 0)["delay_seconds"] == {"median": None, "p95": None, "max": None}
    for delay in (9.0, 0.1, 0.2, 0.3):
        counted.add_delay(delay)
    assert counted.line(4, 0)["delay_seconds"] == {"median": 0.2, "p95": 0.29, "max": 9.0}


def test_a_webhook_gets_events_in_order_and_failures_are_counted():
    server = serve(Hook)
    server.events = []
    hook = Webhook(post_json(f"http://me:se%40cret@127.0.0.1:{server.server_address[1]}/"))
    events = [{"label": "a"}, {"event": "lost"}, {"label": "b"}]
    for event in events:
        hook.post(event)
    hook.close()
    server.shutdown()
    header = f"Basic {base64.b64encode(b'me:se@cret').decode()}"
    assert server.events == [("application/json", header, event) for event in events]
    assert (hook.sent, hook.failed) == (2, 1) and "500" in hook.reason
    hook.thread.join(5)
    assert not hook.thread.is_alive()
    for wrong in ("file:///etc/passwd", "http://me:secret@", "http://me:secret@host:no", "http://host/?a=secret b"):
        with pytest.raises(ValueError, match=r"is no address.*http://") as caught:
            post_json(wrong)
        assert "secret" not in str(caught.value)


def test_a_webhook_that_hangs_delays_nothing(monkeypatch):
    monkeypatch.setattr("neuroflow_hf.cameras.webhook.MOST_WAITING", 3)
    hang = threading.Event()
    monkeypatch.setattr("neuroflow_hf.cameras.webhook.SECONDS", 0.1)
    hook = Webhook(lambda _: hang.wait(20))
    begun = time.monotonic()
    for number in range(50):
        hook.post({"number": number})
    hook.close()
    assert time.monotonic() - begun < 5 and hook.failed >= 46 and "wait already" in hook.reason
    hang.set()


def test_the_overlay_shows_all_cameras(tmp_path):
    mosaic = Mosaic(tmp_path / "overlay.mp4", ["a", "b", "c"], 1.0, labelled=True)
    mask = np.eye(6, dtype=bool)
    for number in range(4):
        seen = [
            Seen("a", picture(number), mask, 0.5, "a dog", 0.7),
            Seen("b", picture(0, 90, 30), mask, 1, None, None),
        ]
        mosaic.add(seen[: 1 + number % 2], number / 10)
    mosaic.close()
    assert count_frames(tmp_path / "overlay.mp4") == 4
    with av.open(str(tmp_path / "overlay.mp4")) as container:
        assert container.streams.video[0].width == 2 * 480


def test_the_command_watches_files(model_folder, tmp_path):
    overlay = tmp_path / "overlay.mp4"
    clips = [write_clip(tmp_path / f"{name}.mkv", frames) for name, frames in (("a", 4), ("b", 7))]
    result = call("watch", *clips, "--model", model_folder, "--overlay", overlay, "--gate", "threshold=0.02")
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events if event.get("source") == str(clips[0])] == ["connected", "ended"]
    assert events[-1]["event"] == "summary" and events[-1]["sources"][str(clips[1])]["received"] == 7
    assert "delay: median" in result.stderr and count_frames(overlay) >= 2
    for words, arguments in {
        "nothing to report": (clips[0],),
        "is given twice": (clips[0], clips[0], "--overlay", overlay),
        "cannot be written": (clips[0], "--overlay", tmp_path / "none" / "a.mp4"),
        "is no address": (clips[0], "--overlay", overlay, "--webhook", "ftp://a"),
        "is no camera": ("ftp://me:secret@camera/a", "--overlay", overlay),
        "no video file": (tmp_path / "none.mkv", "--overlay", overlay),
    }.items():
        refused = call("watch", *arguments, "--model", model_folder)
        assert refused.exit_code == 2 and words in refused.stderr and "secret" not in refused.stderr, refused.output
