"""Workers on the machines of a Ray cluster, and what gives them videos and takes back those of workers that died."""

import contextlib
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from .job import EmbedJob, Ended, Event, Reached, Waiting, embed_waiting

SECONDS = 1.0  # between two reports of a worker
MOST_DEATHS = 3  # of workers with the same video, the last with it alone


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
