"""Processes that play the ranks of a process group, kept alive over many short scenarios (importing torch is slow)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any


class RankProcesses:
    """`run(scenario, ...)` calls `scenario(rank, ...)` in all ranks at once and returns their results in rank order.

    Each run is a process group of its own. A failure in any rank is raised here with that rank's traceback.
    """

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, rank, world_size), daemon=True)
            process.start()
            self._pipes.append(own)
            self._processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def run(self, scenario: Callable[..., Any], *args: Any) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for pipe in self._pipes:
            pipe.send((scenario, args, port))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(120), f"rank {rank} did not answer"
            answers.append(pipe.recv())
        for rank, (succeeded, value) in enumerate(answers):
            assert succeeded, f"rank {rank}:\n{value}"
        return [value for _, value in answers]


def _serve(pipe: Connection, rank: int, world_size: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
    while True:
        scenario, args, port = pipe.recv()
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send((True, scenario(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
