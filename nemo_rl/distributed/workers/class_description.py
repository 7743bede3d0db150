"""What the driver knows about a worker class that it never imports.

`worker_host.describe_class` writes a description inside the worker's venv, as plain data; here it is checked, kept on
disk and turned into an actor class. A kept description is only a guess: the worker's process compares it with the real
class before it constructs one (`worker_host.WorkerHost`), reports a changed class with its new description, and the
start is repeated with that one. So an edit of a worker's source needs no bookkeeping here.
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

# Workers' venvs need not hold nemo_rl: the code that runs in them travels with the actor class.
ray.cloudpickle.register_pickle_by_value(worker_host)


@dataclass(frozen=True)
class ConfigureWorker:
    """A worker class's `configure_worker`.

    Attributes:
        fqn: of the class that defines it.
        is_static: static methods are evaluated on that class, so that only its module is imported for them.
    """

    fqn: str
    is_static: bool


@dataclass(frozen=True)
class ClassDescription:
    """A worker class as plain data.

    Attributes:
        fqn: `package.module.Class`.
        digest: of everything below.
        methods: names that can be called on a handle, sorted.
        ray_options: the class's `@ray.remote(...)` options; empty without one.
        configure_worker: None when the class has none.
        plain: the data that `worker_host.describe_class` wrote.
    """

    fqn: str
    digest: str
    methods: tuple[str, ...]
    ray_options: dict[str, Any]
    configure_worker: ConfigureWorker | None
    plain: dict[str, Any]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ClassDescription:
        """Check and read what `worker_host.describe_class` wrote. Raises `ValueError` when it is not that."""
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
        """A Ray actor class with the described methods and nothing of the worker's own code."""
        host: Any = worker_host.make_host_class(self.plain)
        # Concurrency groups cannot be given per actor, all other options are (worker_options).
        groups = self.ray_options.get("concurrency_groups")
        options: dict[str, Any] = {"concurrency_groups": groups}
        return ray.remote(**options)(host) if groups else ray.remote(host)

    def check_init_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_partial: bool = False) -> None:
        """Check constructor arguments before anything starts.

        Args:
            is_partial: further arguments may follow.

        Raises:
            WorkerStartError: they do not fit the class's `__init__`.
        """
        if self.plain["init"] is None:
            return
        signature = worker_host.signature_of(self.plain["init"])
        try:
            (signature.bind_partial if is_partial else signature.bind)(*args, **kwargs)
        except TypeError as error:
            raise WorkerStartError(f"{self.fqn}(...): {error}") from None


def cache_path(fqn: str, *identity: str | None) -> Path:
    """Where the description of `fqn` in the venv with this identity is kept."""
    key = hashlib.sha256(json.dumps([worker_host.SCHEMA, ray.__version__, fqn, *identity]).encode()).hexdigest()
    return settings.cache_dir() / "worker_classes" / f"{fqn.rpartition('.')[2]}-{key[:24]}.json"


def load_description(path: Path) -> ClassDescription | None:
    """The kept description, or None when there is none that can be read."""
    try:
        return ClassDescription.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_description(path: Path, description: ClassDescription) -> None:
    """Keep a description. A cache that cannot be written only costs the next start some time."""
    try:
        write_atomically(path, json.dumps(description.plain))
    except OSError as error:
        logger.warning("Cannot keep the description of %s in %s: %s", description.fqn, path, error)
