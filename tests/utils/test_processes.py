"""How processes of one job, as torchrun launches them, share work and find each other."""

import json
from types import SimpleNamespace

import pytest

from neuroflow_hf.utils.processes import Processes
from tests.processes import call_in_two


def share_gather_and_broadcast():
    processes = Processes()
    gathered = processes.gather([("from", processes.index)])
    print(json.dumps([processes.index, processes.share(5), gathered, processes.broadcast(10 + processes.index)]))


def test_two_processes_share_gather_and_broadcast():
    gathered = [["from", 0], ["from", 1]]
    first, second = map(json.loads, call_in_two(share_gather_and_broadcast))
    assert first == [0, [0, 2, 4], gathered, 10]
    assert second == [1, [1, 3], gathered, 10]


def test_a_process_alone_does_all_of_it(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes()
    assert (alone.index, alone.count, alone.is_main, alone.device) == (0, 1, True, None)
    assert alone.share(3) == [0, 1, 2] and alone.gather([1]) == [1] and alone.broadcast(7) == 7


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "accelerate.PartialState", lambda cpu: SimpleNamespace(process_index=0, num_processes=1, device="cpu")
    )
    with pytest.raises(RuntimeError, match="2 processes were started, and accelerate sees 1"):
        Processes()
