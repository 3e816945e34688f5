"""
Embedding on the machines of a Ray cluster, which share the folders of the videos and of the dataset.

    with cluster_work("auto") as work:
        result = embed_videos(videos, model, preprocess, "dataset", work=work)
"""

import contextlib
import functools
import math
import socket
from collections import Counter
from collections.abc import Iterator

from .job import Work

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .workers import embed_on_workers
except ImportError as error:
    raise ImportError('A Ray cluster needs the extra `cluster`: pip install "neuroflow-hf[cluster]".') from error

CONNECT_SECONDS = 10


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
