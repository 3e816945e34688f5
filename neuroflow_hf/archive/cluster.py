"""
Embedding on the machines of a Ray cluster, which share the folders of the videos and of the dataset.

    with cluster_work("auto") as work:
        result = embed_videos(videos, model, preprocess, "dataset", work=work)
"""

import contextlib
import functools
import math
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .job import EmbedJob, Ended, Event, Reached, Waiting, Work, embed_waiting

try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise ImportError('A Ray cluster needs the extra `cluster`: pip install "neuroflow-hf[cluster]".') from error

CONNECT_SECONDS = 10
SECONDS = 1.0  # between two reports of a worker
MOST_DEATHS = 3  # of workers with the same video, the last with it alone


@contextlib.contextmanager
def cluster_work(address: str, workers: int | None = None, device: str = "auto") -> Iterator[Work]:
    """
    The `work` of `embed_videos` on a cluster, whose machines have this package, and see videos and dataset at the same
    paths as this one. Workers get the model through Ray, once each. One that dies is replaced, and its videos are
    embedded anew.

    Args:
        address: as in `ray.init`: `"auto"`, `"ray://host:10001"`, or `"local"` for a cluster on this machine alone. A
            connection that there is already is used, and stays.
        workers: how many; default: one for each GPU, or for each machine if there are none. Those on one machine share
            its CPUs.
        device: `"cuda"`, `"cpu"`, or `"auto"`: GPUs if the cluster has any.

    Raises:
        ConnectionError: if no cluster can be reached at the address.
        ValueError: for a number or a device that the cluster does not have.
    """
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            options: dict = {"include_dashboard": False} if address == "local" else {}
            try:
                require_open_port(address)
                ray.init(address, log_to_driver=False, logging_level="error", **options)
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                reason = str(error).partition("\n")[0]
                raise ConnectionError(
                    f"Cannot reach a Ray cluster at {address!r} ({reason}); expected `auto`, `local`, or an address "
                    "such as `ray start --head` prints."
                ) from error
            stack.callback(ray.shutdown)
        yield functools.partial(embed_on_workers, places=worker_places(ray.nodes(), workers, device))


def require_open_port(address: str) -> None:
    """Raise an OSError if nothing listens at an address with a port, which Ray would try again for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def worker_places(nodes: list[dict], workers: int | None, device: str) -> list[dict]:
    """Where workers run on `ray.nodes`, and the CPUs and GPUs of each, as options of Ray's actors."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"The device is {device!r}; expected auto, cpu or cuda: Ray chooses which GPU.")
    if workers is not None and workers < 1:
        raise ValueError(f"The number of workers is {workers}; expected at least 1.")
    machines = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    gpus = {name: int(has["GPU"]) for name, has in machines.items() if device != "cpu" and has.get("GPU", 0) >= 1}
    if device == "cuda" and not gpus:
        raise ValueError("No machine of the cluster has a GPU that Ray knows of; choose --device cpu.")
    room = gpus or {name: 1 for name, has in machines.items() if has.get("CPU", 0) > 0}
    if not room:
        raise ValueError("No machine of the cluster has CPUs that Ray may use; start its nodes with --num-cpus.")
    # the first of each machine, the second of each ...
    order = [name for turn in range(max(room.values())) for name in room if turn < room[name]]
    counts = Counter(order[place % len(order)] for place in range(workers or len(order)))
    places = []
    for name, count in counts.items():
        cpus = machines[name].get("CPU", 0) / count
        options = {
            "num_cpus": int(cpus) if cpus >= 1 else cpus,  # Ray takes no fractions above 1
            "num_gpus": 1 / math.ceil(count / gpus[name]) if gpus else 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(name, soft=True),
        }
        places += [options] * count
    return places


# --- workers ---------------------------------------------------------------------------------------------------------


class Worker:
    """Embeds on a machine of the cluster."""

    def start(self, job: EmbedJob, sign: Path) -> str:
        """Take the job; `sign` is a file in the dataset's folder. Returns the machine's address."""
        machine = ray.util.get_node_ip_address()
        if not sign.exists():
            raise FileNotFoundError(
                f"The machine {machine} does not see {job.out} as this one does; expected a folder that all share."
            )
        self.job = replace(job, model=job.model.to("cuda" if ray.get_gpu_ids() else "cpu"))
        self.waiting: deque[Path] = deque()
        self.events: Iterator[Event] = iter(())
        return machine

    def work(self, videos: list[Path]) -> list[Event]:
        """Take more videos, and embed until one ends or `SECONDS` are over. The last event of each video."""
        self.waiting.extend(videos)
        until = time.monotonic() + SECONDS
        events: dict[Path, Event] = {}
        for event in self.events:
            events[event.video] = event
            if isinstance(event, Ended) or time.monotonic() > until:
                break
        else:  # begins at the next call, with as many streams as there are videos then
            self.events = embed_waiting(self.waiting, self.job)
        return list(events.values())


@dataclass(eq=False)
class Hired:
    """A worker: place, actor, the call that it has not answered yet, its videos, and its address once it began."""

    place: dict
    actor: Any
    call: Any
    videos: set[Path] = field(default_factory=set)
    machine: str = ""


def embed_on_workers(waiting: deque[Path], job: EmbedJob, places: list[dict]) -> Iterator[Event]:
    """
    Embed the videos in a queue on a cluster, by a worker for each of `worker_places`; a [`Work`]. The model is on
    the CPU. FileNotFoundError if a machine does not see the dataset's folder, or a video that this one sees;
    RuntimeError if no worker can begin.
    """
    if job.model.device.type != "cpu":
        raise ValueError(f"The model is on {job.model.device}; expected the CPU, from where workers get it.")
    sign = job.out / f".sign.parquet.{secrets.token_hex(4)}.part"  # deleted with what is not finished
    deaths: Counter[Path] = Counter()

    def hire(place: dict) -> Hired:
        actor = ray.remote(Worker).options(**place).remote()
        return Hired(place, actor, actor.start.remote(shared, sign))

    sign.touch()
    with contextlib.ExitStack() as stack:
        shared = ray.put(job)
        workers = [hire(place) for place in places]
        stack.callback(lambda: [ray.kill(worker.actor) for worker in workers])
        while waiting or any(worker.videos for worker in workers):
            for worker in workers:
                if worker.call is None:
                    videos = more_videos(worker, workers, waiting, deaths, job.streams)
                    worker.videos.update(videos)
                    worker.call = worker.actor.work.remote(videos) if worker.videos else None
            ready, _ = ray.wait([worker.call for worker in workers if worker.call is not None], timeout=SECONDS)
            if not ready:
                yield Waiting(f"{sum(bool(worker.machine) for worker in workers)} of {len(workers)} workers began")
                continue
            worker = next(worker for worker in workers if worker.call == ready[0])
            workers.sort(key=lambda other: other is worker)  # it is the last now, so that all get their turn
            try:
                yield from answer(worker)
            except RayActorError as error:
                workers.remove(worker)
                ray.kill(worker.actor)  # it may only be out of reach
                if worker.machine:
                    workers.append(hire(worker.place))
                elif not workers:
                    raise RuntimeError(f"No worker could begin: {error}") from error
                yield from put_back(worker.videos, waiting, deaths)


def more_videos(
    worker: Hired, workers: list[Hired], waiting: deque[Path], deaths: Counter[Path], streams: int
) -> list[Path]:
    """Take videos from the queue for a worker: at most its share, and what it encodes in one call and in the next."""
    unfinished = len(waiting) + sum(len(other.videos) for other in workers)
    room = min(2 * streams, math.ceil(unfinished / len(workers))) - len(worker.videos)
    videos: list[Path] = []
    while waiting and len(videos) < room:
        company = [*worker.videos, *videos]
        if company and any(deaths[video] == MOST_DEATHS - 1 for video in [*company, waiting[0]]):
            break
        videos.append(waiting.popleft())
    return videos


def answer(worker: Hired) -> Iterator[Event]:
    """What happened in a worker's call; raises what the call raised."""
    call, worker.call = worker.call, None
    try:
        answered = ray.get(call)
    except RayTaskError as error:
        raise error.cause from None
    if not worker.machine:
        worker.machine = answered
        return
    for event in answered:
        if isinstance(event, Ended):
            if event.missing and event.video.exists():
                raise FileNotFoundError(
                    f"The machine {worker.machine} does not see {event.video}; expected a folder that all share."
                )
            worker.videos.discard(event.video)
        yield event


def put_back(videos: set[Path], waiting: deque[Path], deaths: Counter[Path]) -> Iterator[Event]:
    """Put the videos of a worker that died back into the queue, those that are to be tried alone at its end."""
    for video in sorted(videos):
        deaths[video] += 1
        if deaths[video] == MOST_DEATHS:
            yield Ended(video, f"{MOST_DEATHS} workers died while they embedded {video}, the last with it alone", None)
            continue
        (waiting.append if deaths[video] == MOST_DEATHS - 1 else waiting.appendleft)(video)
        yield Reached(video, 0.0)
