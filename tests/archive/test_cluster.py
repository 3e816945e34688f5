"""Embedding on a cluster gives the dataset of one machine, whatever dies: on two nodes of Ray, and without it."""

import contextlib
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from neuroflow_hf.archive.embed import embed_videos, video_paths
from neuroflow_hf.video.preprocess import Preprocessor
from tests.archive.test_embed import GATE, assert_same_rows
from tests.cli.test_run import call, write_clip
from tests.processes import neuroflow, start

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "neuroflow-hf[cluster]".')
cluster = pytest.importorskip("neuroflow_hf.archive.cluster")

FRAMES = {"long": 240, "middle": 40, "a": 12, "b": 9, "c": 7, "d": 5, "e": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of different lengths, one that is cut short, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in FRAMES.items():
        write_clip(folder / f"{name}.mkv", frames)
    middle = folder / "middle.mkv"
    middle.write_bytes(middle.read_bytes()[: middle.stat().st_size // 2])
    (folder / "none.mkv").write_text("no video")
    return folder


def contents(out):
    """The names of all files in a dataset, and its failures, in any order."""
    lines = (out / "failures.jsonl").read_text().splitlines()
    return sorted(path.name for path in out.iterdir()), sorted(lines)


# --- two nodes of Ray ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes with a CPU each."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # on a busy machine
    os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "300")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def writers(folder, name):
    """The processes of Ray's workers that write the file of a video whose name begins so."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended just now
            if b"ray::" not in (process / "cmdline").read_bytes():
                continue
            if any(os.readlink(file).startswith(f"{folder}/.{name}") for file in (process / "fd").iterdir()):
                yield int(process.name)


def wait_for(found, driver):
    """What a function finds, while a process runs."""
    while not (things := list(found())):
        assert driver.is_alive()
        time.sleep(0.02)
    return things


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc").exists(), reason="Workers are found by /proc, which is not there.")
def test_after_kills_of_driver_and_worker_the_dataset_is_that_of_one_machine(nodes, folder, model_folder, tmp_path):
    command = ("embed", folder, "--model", model_folder, "--gate", "threshold=0.02", "--streams", 2, "--out")
    assert call(*command, tmp_path / "one").exit_code == 1

    out = tmp_path / "out"
    driver, _ = start(neuroflow, *command, out, "--ray", nodes.address)
    wait_for(lambda: out.glob("*.parquet"), driver)
    driver.kill()
    driver.join()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    assert 0 < len(kept) < len(FRAMES) and not list(out.glob("long*"))

    for _ in range(3000):
        if not list(writers(out, "")):
            break  # the workers ended with their driver
        time.sleep(0.02)
    driver, result = start(neuroflow, *command, out, "--ray", nodes.address)
    lost = wait_for(lambda: writers(out, "long"), driver)
    os.kill(lost[0], signal.SIGKILL)
    assert lost[0] != driver.pid and not list(out.glob("long*"))
    code, printed, errors = result.recv()
    driver.join()
    assert code == 1 and "failures.jsonl says why" in errors
    assert printed == (
        f"8 videos: {len(FRAMES) - len(kept)} embedded, {len(kept)} were there already. Dataset: {out}\n"
    )
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert contents(out) == contents(tmp_path / "one")
    assert_same_rows(out, tmp_path / "one")


# --- the same without processes ------------------------------------------------------------------------------------


class Calls:
    """
    Ray's functions that `embed_on_workers` uses, with workers that are called in this process, one after the other.

    Args:
        choose: gives the place of the call that is answered next, of their number.
        dies: whether a worker dies instead of answering with these events.
    """

    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7")

    def __init__(self, choose=lambda number: 0, dies=lambda events: False):
        self.choose, self.dies, self.hired, self.killed = choose, dies, [], []

    def remote(self, kind):
        return SimpleNamespace(options=lambda **place: SimpleNamespace(remote=lambda: self.hire(kind())))

    def hire(self, worker):
        later = {}
        for name in ("start", "work"):
            method = getattr(worker, name)
            later[name] = SimpleNamespace(remote=lambda *given, method=method: [method, given])
        actor = SimpleNamespace(**later, worker=worker)
        self.hired.append(actor)
        return actor

    def put(self, value):
        return value

    def get_gpu_ids(self):
        return []

    def wait(self, calls, timeout):
        return [calls[self.choose(len(calls))]], []

    def get(self, call):
        answered = call[0](*call[1])
        if self.dies(answered if isinstance(answered, list) else []):
            raise ray.exceptions.ActorDiedError()
        return answered

    def kill(self, actor):
        self.killed.append(actor)
        if isinstance(getattr(actor.worker, "events", None), Generator):
            actor.worker.events.close()  # its threads


@pytest.fixture(scope="module")
def short(folder):
    """All but the longest."""
    return [video for video in video_paths([folder]) if video.stem != "long"]


@pytest.fixture
def embed(vision64, short, monkeypatch):
    """`embed_videos` with the tiny model in float64; with `calls`, on workers that answer them."""

    def embed(out, calls=None, number=2, videos=None, **options):
        if calls is not None:
            monkeypatch.setattr(cluster, "ray", calls)
            monkeypatch.setattr(cluster, "SECONDS", 0.02)  # many answers
            options["work"] = lambda waiting, job: cluster.embed_on_workers(waiting, job, [{}] * number)
        return embed_videos(videos or short, vision64, Preprocessor(resolution=24), out, GATE, streams=2, **options)

    return embed


@pytest.fixture(scope="module")
def whole(vision64, short, tmp_path_factory):
    """The dataset of one machine."""
    out = tmp_path_factory.mktemp("whole")
    result = embed_videos(short, vision64, Preprocessor(resolution=24), out, GATE, streams=2)
    assert result.embedded == len(list(out.glob("*.parquet"))) == len(FRAMES) - 1
    return out


@pytest.mark.parametrize("seed", range(3))
def test_two_lost_workers_change_nothing(embed, whole, tmp_path, seed):
    chance, deaths = random.Random(seed), []

    def dies(events):
        if events and len(deaths) < 2 and chance.random() < 0.2:
            deaths.append(events)
        return bool(deaths) and deaths[-1] is events

    calls = Calls(chance.randrange, dies)
    embed(tmp_path, calls, number=1 + seed)
    assert len(deaths) == 2 and len(calls.hired) == 1 + seed + 2
    assert calls.killed and set(map(id, calls.killed)) == set(map(id, calls.hired))
    assert contents(tmp_path) == contents(whole)
    assert_same_rows(tmp_path, whole)


def test_a_video_that_kills_its_workers_is_listed_and_those_beside_it_are_not(embed, whole, tmp_path):
    companies = []

    def dies(events):
        fatal = any(event.video.stem == "a" for event in events)
        if fatal:
            companies.append({event.video.stem for event in events})
        return fatal

    result = embed(tmp_path, Calls(dies=dies))
    assert len(companies) == cluster.MOST_DEATHS and companies[-1] == {"a"}
    reasons = {video.rpartition("/")[2]: reason for video, reason in result.failures.items()}
    assert reasons.keys() == {"a.mkv", "middle.mkv", "none.mkv"} and "workers died" in reasons["a.mkv"]
    names, lines = contents(whole)
    assert [name for name in names if not name.startswith("a-")] == contents(tmp_path)[0]
    assert embed(tmp_path, Calls()).embedded == 1  # tried again
    assert contents(tmp_path) == (names, lines)
    assert_same_rows(tmp_path, whole)


def test_every_worker_gets_its_share_and_no_more_than_two_calls_need():
    def shares(count, number, streams, rounds=1, deaths=()):
        waiting = cluster.deque(range(count))
        crew = [cluster.Hired({}, None, None) for _ in range(number)]
        for worker in crew * rounds:
            worker.videos.update(cluster.more_videos(worker, crew, waiting, cluster.Counter(deaths), streams))
        return [sorted(worker.videos) for worker in crew], list(waiting)

    assert shares(4, 2, 16) == ([[0, 1], [2, 3]], [])
    assert shares(5, 3, 16, rounds=2) == ([[0, 1], [2, 3], [4]], [])
    assert shares(9, 2, 2, rounds=2) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [8])
    assert shares(1, 3, 2) == ([[0], [], []], [])
    last = [2] * (cluster.MOST_DEATHS - 1) + [3] * (cluster.MOST_DEATHS - 1)
    assert shares(4, 2, 16, rounds=2, deaths=last) == ([[0, 1], [2]], [3])


def test_ctrl_c_keeps_what_is_finished_and_dismisses_all(embed, whole, tmp_path):
    calls = Calls()

    def on_step(what, done, total):
        if what.startswith("1 of"):
            signal.raise_signal(signal.SIGINT)

    other = tmp_path / ".download.part"  # of another program
    other.touch()
    result = embed(tmp_path, calls, on_step=on_step)
    assert result.interrupted and calls.killed == calls.hired
    assert [path for path in tmp_path.iterdir() if path.suffix == ".part"] == [other]
    other.unlink()
    assert not embed(tmp_path, Calls()).interrupted
    assert contents(tmp_path) == contents(whole)
    assert_same_rows(tmp_path, whole)


def test_machines_that_see_other_folders_end_the_run(embed, folder, tmp_path, monkeypatch):
    def not_there(video):
        raise FileNotFoundError(f"No such file: {video}")

    monkeypatch.setattr("neuroflow_hf.archive.decode.video_state", not_there)
    with pytest.raises(FileNotFoundError, match=r"10\.0\.0\.7 does not see .*/middle\.mkv"):
        embed(tmp_path, Calls())
    shutil.copytree(folder, tmp_path / "videos")
    videos = video_paths([tmp_path / "videos"])
    shutil.rmtree(tmp_path / "videos")  # from all machines: nothing is wrong with this one
    assert len(embed(tmp_path / "gone", Calls(), videos=videos).failures) == len(FRAMES) + 1

    class Elsewhere(cluster.Worker):
        def start(self, job, sign):
            return super().start(job, tmp_path / "elsewhere" / sign.name)

    monkeypatch.setattr(cluster, "Worker", Elsewhere)
    with pytest.raises(FileNotFoundError, match=r"does not see .*machines_that.* as this one does"):
        embed(tmp_path, Calls())


def test_workers_that_cannot_begin_end_the_run(embed, tmp_path):
    class NeverBegins(Calls):
        def get(self, call):
            raise ray.exceptions.ActorDiedError()

    calls = NeverBegins()
    with pytest.raises(RuntimeError, match="No worker could begin"):
        embed(tmp_path, calls)
    assert len(calls.hired) == 2


def node(name, **resources):
    return {"NodeID": name, "Alive": True, "Resources": {key.upper(): value for key, value in resources.items()}}


def test_workers_share_the_machines():
    def placed(*asked):
        places = cluster.worker_places(*asked)
        return [(place["scheduling_strategy"].node_id, place["num_cpus"], place["num_gpus"]) for place in places]

    a, b = node("a" * 56, cpu=8.0, gpu=2.0), node("b" * 56, cpu=4.0)
    gone, head = node("c" * 56, cpu=64.0) | {"Alive": False}, node("d" * 56, memory=1.0)
    machines = {"a": a["NodeID"], "b": b["NodeID"]}

    def expected(*places):
        return [(machines[name], cpus, gpus) for name, cpus, gpus in places]

    assert placed([a, b, gone, head], None, "auto") == expected(("a", 4, 1), ("a", 4, 1))
    assert placed([a, b, gone, head], None, "cpu") == expected(("a", 8, 0), ("b", 4, 0))
    assert placed([a, b], 3, "cpu") == expected(("a", 4, 0), ("a", 4, 0), ("b", 4, 0))
    assert placed([a, b], 3, "cuda") == expected(*[("a", 2, 0.5)] * 3)
    c = node("c" * 56, cpu=8.0, gpu=1.0)
    assert placed([a, c], 2, "auto") == [(a["NodeID"], 8, 1), (c["NodeID"], 8, 1)]
    assert placed([b], 8, "auto") == expected(*[("b", 0.5, 0)] * 8)
    for nodes, number, device, wrong in (
        ([b], None, "cuda", "GPU"),
        ([b], None, "cuda:1", "cuda:1"),
        ([b], 0, "auto", "at least 1"),
        ([head, gone], None, "auto", "--num-cpus"),
    ):
        with pytest.raises(ValueError, match=wrong):
            placed(nodes, number, device)


def test_what_the_command_refuses(folder, tmp_path):
    result = call("embed", folder, "--out", tmp_path / "out", "--workers", 2)
    assert result.exit_code == 2 and "--workers needs --ray" in result.output
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    result = call("embed", folder, "--out", tmp_path / "out", "--ray", address)  # nothing listens there any more
    assert result.exit_code != 0 and f"Cannot reach a Ray cluster at '{address}'" in result.output
