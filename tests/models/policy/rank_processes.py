"""Processes that are the ranks of process groups. They run many short scenarios, because importing torch is slow."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent


class RankProcesses:
    """`run(scenario, ...)` calls `scenario(rank, ...)` in all ranks at once and returns their results in rank order.

    Each run is a new process group. A failure in any rank fails the test with that rank's traceback. The scenario must
    be a function of a module that the ranks' Python can import.
    """

    def __init__(self, world_size: int, python: str = sys.executable) -> None:
        key = os.urandom(16)
        # Ranks with the same Python inherit its PYTHONPATH.
        inherited = [os.environ["PYTHONPATH"]] if python == sys.executable and os.environ.get("PYTHONPATH") else []
        path = os.pathsep.join([str(HERE), str(HERE.parents[2]), *inherited])
        self._processes = []
        self._pipes: list[Connection] = []
        with Listener(authkey=key) as listener:
            for rank in range(world_size):
                process = subprocess.Popen(
                    [python, __file__, str(listener.address), str(rank)],
                    stdin=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": path},
                )
                assert process.stdin is not None
                process.stdin.write(key)
                process.stdin.close()
                self._processes.append(process)
                self._pipes.append(listener.accept())

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def run(
        self, scenario: Callable[..., Any] | str, *args: Any, num_ranks: int | None = None, **kwargs: Any
    ) -> list[Any]:
        """Run a function, or "module.function" of this directory if this Python cannot import it.

        `num_ranks` are the first of the processes; None: all of them.
        """
        if isinstance(scenario, str):
            module, _, name = scenario.partition(".")
            file = str(HERE / f"{module}.py")
        else:
            file, name = inspect.getfile(scenario), scenario.__name__
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pipes = self._pipes[:num_ranks]
        for pipe in pipes:
            _send(pipe, (file, name, args, kwargs, port, len(pipes)))
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(200), f"rank {rank} did not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"rank {rank}:\n{value}" for rank, (succeeded, value) in enumerate(answers) if not succeeded]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]


def megatron_python() -> str:
    """Return a Python with megatron-core: this one if it has it, else the MCORE venv's, which is built if needed."""
    from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
    from nemo_rl.venvs import create_local_venv

    if importlib.util.find_spec("megatron") is not None:
        return sys.executable
    return create_local_venv(PY_EXECUTABLES.MCORE, "nemo_rl.models.policy.megatron_policy_worker.MegatronPolicyWorker")


def _send(pipe: Connection, value: Any) -> None:
    # Plain pickle copies tensors. `Connection.send` would share their memory, which requires that both processes live.
    pipe.send_bytes(pickle.dumps(value))


def _serve(pipe: Connection, rank: int) -> None:
    import torch

    torch.set_num_threads(1)
    # Workers freeze what exists, their model included, and to free it all modules would have to be unfrozen and
    # traversed after each scenario (0.4 s each time). Here only what outlives a scenario is frozen.
    freeze = gc.freeze
    gc.freeze = lambda: None
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    while True:
        try:
            file, name, args, kwargs, port, world_size = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE=str(world_size))
        if str(Path(file).parent) not in sys.path:
            sys.path.append(str(Path(file).parent))
        try:
            _send(pipe, (True, getattr(importlib.import_module(Path(file).stem), name)(rank, *args, **kwargs)))
        except BaseException:
            _send(pipe, (False, traceback.format_exc()))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            gc.collect()  # the next scenario needs the memory and threads of this one's workers
            freeze()


if __name__ == "__main__":
    _serve(Client(sys.argv[1], authkey=sys.stdin.buffer.read()), int(sys.argv[2]))
