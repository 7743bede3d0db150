"""Worker classes that run in separate venvs. No test imports this file; some tests check that."""

from __future__ import annotations

import asyncio
import atexit
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

LOADED_WITH_RANK = os.environ.get("RANK")


class Probe:
    """Reports on its process and returns its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.count = 0

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, self.kwargs

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def rank_at_import(self) -> str | None:
        return LOADED_WITH_RANK

    def pid(self) -> int:
        return os.getpid()

    def executable(self) -> str:
        return sys.executable

    def version(self, distribution: str) -> str:
        return importlib.metadata.version(distribution)

    def echo(self, x: Any = None, y: Any = None) -> tuple[str, Any, Any]:
        return os.environ.get("RANK", ""), x, y

    def address_of_array(self, x: np.ndarray) -> tuple[int, bool]:
        return x.__array_interface__["data"][0], x.flags.writeable

    def in_subprocess(self) -> list[str]:
        code = "import os, sys; print(sys.prefix); print(os.environ['VIRTUAL_ENV']); print(os.environ['RANK'])"
        return subprocess.run(["python", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    def in_nested_actors(self, distribution: str) -> list[tuple[str, str, str, str | None]]:
        @ray.remote(num_cpus=0)
        class Child:
            def look(self) -> tuple[str, str, str, str | None]:
                version = importlib.metadata.version(distribution)
                return sys.executable, os.environ["VIRTUAL_ENV"], version, os.environ.get("CHILD")

        with_variable = Child.options(runtime_env={"env_vars": {"CHILD": "yes"}})
        return ray.get([Child.remote().look.remote(), with_variable.remote().look.remote()])

    def placement_group_id(self) -> str | None:
        group = ray.util.get_current_placement_group()
        return group.id.hex() if group else None

    def numbers(self, n: int) -> Iterator[int]:
        yield from range(n)

    def write_at_exit(self, path: str) -> None:
        atexit.register(Path(path).write_text, "exited")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self, rank: int) -> None:
        if os.environ["RANK"] == str(rank):
            os._exit(7)
        time.sleep(300)

    def die_connected(self, path: str) -> None:
        """Rank 1 dies while rank 0 has a connection to it, as in a collective operation. Rank 0 fails first."""
        with socket.socket(socket.AF_UNIX) as connection:
            if os.environ["RANK"] == "1":
                connection.bind(path)
                connection.listen()
                connection.accept()
                os._exit(7)
            while connection.connect_ex(path):
                time.sleep(0.01)
            if not connection.recv(1):
                raise ConnectionError("the connection was closed by the peer")

    def fail(self) -> None:
        raise KeyError("a bug of the worker")

    def mark(self, directory: str) -> None:
        with open(os.path.join(directory, os.environ["RANK"]), "w"):
            pass

    def refuse(self) -> None:
        raise RuntimeError("cannot clean up")


@ray.remote(num_cpus=0.25, max_concurrency=2, runtime_env={"env_vars": {"FROM_CLASS": "class", "FROM_BOTH": "class"}})
class Decorated:
    """An async actor with every kind of method."""

    def __init__(self, base: int, *, factor: int = 1) -> None:
        self.base = base
        self.factor = factor

    async def add(self, x: int) -> int:
        await asyncio.sleep(0)
        return (self.base + x) * self.factor

    async def count_to(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def numbers(self, n: int) -> Iterator[int]:
        yield from range(n)

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @classmethod
    def name(cls) -> str:
        return cls.__name__

    @ray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.base, self.factor

    def variables(self) -> dict[str, str]:
        return dict(os.environ)

    def resources(self) -> dict[str, float]:
        return ray.get_runtime_context().get_assigned_resources()


class Configured(Probe):
    """Configures its resources, variables and arguments."""

    @staticmethod
    def configure_worker(
        num_gpus: float, bundle_indices: tuple[int, list[int]] | None = None, num_gpus_per_node: int | None = None
    ) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], dict[str, Any]]:
        resources = {"num_cpus": 0.125, "max_concurrency": 3}
        env_vars = {"CONFIGURED": "yes", "SHARED": "class"}
        init_kwargs = {"bundle_indices": bundle_indices, "given": (num_gpus, num_gpus_per_node)}
        return resources, env_vars, init_kwargs, {"env_vars": {"LD_TEST": "early"}}

    def resources(self) -> dict[str, float]:
        return ray.get_runtime_context().get_assigned_resources()


class DiesInConstructor:
    """The last rank dies (`how` is "raise" or "exit") or sleeps ("late"); the others never return."""

    def __init__(self, how: str) -> None:
        if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            if how == "exit":
                print("exiting without an exception", file=sys.stderr, flush=True)
                os._exit(3)
            if how == "late":
                time.sleep(300)
            raise ArithmeticError(f"no convergence: {os.environ.get('DEMO_TOKEN')}")
        time.sleep(300)

    def ping(self) -> None:
        pass
