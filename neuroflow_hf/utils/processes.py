"""Several processes on one job, as `accelerate launch` and `torchrun` start them; or one, started as usual."""

import os
from collections.abc import Sequence
from typing import Any

import torch


class Processes:
    """This process among those of one job. A single process does not load accelerate, and gathers its own items."""

    def __init__(self):
        self.index, self.count = 0, 1  # the number of this process, from 0, and of all processes
        self.device: torch.device | None = None  # that accelerate assigns, if there are several
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1:
            from accelerate import PartialState

            # by default, accelerate expects one process on CPUs
            state = PartialState(cpu=not torch.accelerator.is_available())
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device
            if self.count != started:  # each would do the whole job and overwrite the others' files
                raise RuntimeError(
                    f"{started} processes were started, and accelerate sees {self.count}; start them with torchrun, "
                    "or with `accelerate launch`."
                )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.index == 0

    def device_for(self, name: str) -> str:
        """The device of that name; `"auto"` is this process's own, if there are several."""
        return str(self.device) if name == "auto" and self.device is not None else name

    def share(self, count: int) -> list[int]:
        """This process's part of `count` places: every `self.count`-th."""
        return list(range(self.index, count, self.count))

    def gather(self, items: Sequence[Any]) -> list[Any]:
        """The items of all processes, on all of them."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import gather_object

        return gather_object(list(items))

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
