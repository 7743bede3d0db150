"""Descriptions of worker classes, from which the driver creates actor classes without importing the workers.

`host.describe_class` writes a description inside the worker's venv, as plain data. This module checks it, caches it on
disk and turns it into an actor class. A cached description may be outdated: before the worker's process constructs the
class (`host.WorkerHost`), it compares the two and reports the description of a changed class, with which the start is
repeated. So nothing has to be invalidated when a worker's source is edited.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from nemo_rl import settings
from nemo_rl.distributed.workers import host as worker_host
from nemo_rl.errors import WorkerStartError
from nemo_rl.utils.files import write_atomically

logger = logging.getLogger(__name__)

# Workers' venvs may lack nemo_rl, so the code that runs in them is pickled with the actor class.
ray.cloudpickle.register_pickle_by_value(worker_host)


@dataclass(frozen=True)
class ConfigureWorker:
    """The `configure_worker` of a worker class.

    Attributes:
        fqn: the class that defines it.
        is_static: whether it is a static method, which is evaluated on that class, so that only its module is imported.
    """

    fqn: str
    is_static: bool


@dataclass(frozen=True)
class ClassDescription:
    """A worker class as plain data.

    Attributes:
        fqn: `package.module.Class`.
        digest: of the fields below.
        methods: names of the methods of a handle, sorted.
        ray_options: the options of the class's `@ray.remote(...)`; empty without the decorator.
        configure_worker: None if the class does not define it.
        plain: the data that `host.describe_class` wrote.
    """

    fqn: str
    digest: str
    methods: tuple[str, ...]
    ray_options: dict[str, Any]
    configure_worker: ConfigureWorker | None
    plain: dict[str, Any]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ClassDescription:
        """Read what `host.describe_class` wrote. Raises `ValueError` if the data has another schema or was altered."""
        if plain.get("schema") != worker_host.SCHEMA or plain.get("digest") != worker_host.digest_of(plain):
            raise ValueError("not a description of this version, or altered")
        configure = plain["configure_worker"]
        return cls(
            fqn=plain["fqn"],
            digest=plain["digest"],
            methods=tuple(sorted(plain["methods"])),
            ray_options=plain["ray_options"],
            configure_worker=ConfigureWorker(**configure) if configure else None,
            plain=plain,
        )

    def actor_class(self) -> Any:
        """Create a Ray actor class with the described methods. It contains none of the worker's code."""
        host: Any = worker_host.make_host_class(self.plain)
        # Concurrency groups cannot be given per actor; all other options can (runtime_env.WorkerOptions).
        groups = dict(self.ray_options.get("concurrency_groups") or {})
        if worker_host.has_coroutines(self.plain):
            groups[worker_host.CANCEL_GROUP] = 64  # `resume` waits, and the driver may repeat both
        options: dict[str, Any] = {"concurrency_groups": groups}
        return ray.remote(**options)(host) if groups else ray.remote(host)

    def check_init_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_partial: bool = False) -> None:
        """Check constructor arguments before a process starts.

        Args:
            args, kwargs: the arguments.
            is_partial: whether more arguments may be added later.

        Raises:
            WorkerStartError: the arguments do not fit the class's `__init__`.
        """
        if self.plain["init"] is None:
            return
        signature = worker_host.signature_of(self.plain["init"])
        try:
            (signature.bind_partial if is_partial else signature.bind)(*args, **kwargs)
        except TypeError as error:
            raise WorkerStartError(f"{self.fqn}(...): {error}") from None


def cache_path(fqn: str, *identity: str | None) -> Path:
    """Return the cache file of the description of `fqn` in the venv with this identity."""
    key = hashlib.sha256(json.dumps([worker_host.SCHEMA, ray.__version__, fqn, *identity]).encode()).hexdigest()
    return settings.cache_dir() / "worker_classes" / f"{fqn.rpartition('.')[2]}-{key[:24]}.json"


def load_description(path: Path) -> ClassDescription | None:
    """Return the cached description, or None if there is no readable one."""
    try:
        return ClassDescription.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_description(path: Path, description: ClassDescription) -> None:
    """Cache a description. If the cache cannot be written, the next start describes the class again."""
    try:
        write_atomically(path, json.dumps(description.plain))
    except OSError as error:
        logger.warning("cannot cache the description of %s in %s: %s", description.fqn, path, error)
