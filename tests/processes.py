"""
Functions called in other processes. These are forked from one that has imported what tests need: a new Python takes
nine seconds for torch and transformers. It has done nothing else, so there are no threads that a fork would lose.
"""

import io
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from neuroflow_hf.cli.main import app

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.conftest", "tests.processes", "accelerate.utils"])


def neuroflow(*arguments):
    """The command line."""
    app([str(argument) for argument in arguments])


@record
def call_and_print(function: Callable, arguments: tuple) -> str:
    """What one of several processes does; returns what it printed."""
    torch.set_num_threads(1)
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            function(*arguments)
        except SystemExit as end:  # a command ends so
            if end.code:
                raise RuntimeError(f"The exit code is {end.code}.") from end
    return printed.getvalue()


def call_in_two(function: Callable, *arguments) -> list[str]:
    """Call a function of a module in two processes of one job, as torchrun launches them. What each printed."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="tests",
        max_restarts=0,
        start_method="forkserver",
    )
    printed = elastic_launch(config, call_and_print)(function, arguments)
    return [printed[rank] for rank in range(2)]


def call_and_send(connection, function: Callable, arguments: tuple):
    """What a process does that `start` starts."""
    torch.set_num_threads(1)
    printed, errors, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            function(*arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    connection.send((code, printed.getvalue(), errors.getvalue()))


def start(function: Callable, *arguments):
    """Start a function of a module. Returns the process, and a connection to receive code, stdout and stderr from."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=call_and_send, args=(there, function, arguments), daemon=True)
    process.start()
    return process, here
