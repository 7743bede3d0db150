"""The record of this user's local Ray cluster, by which drivers find it. Importing this module does not import Ray.

The record is a file in the temporary directory, one per user, machine, interpreter and set of GPUs. It names the GCS
process; a record whose process has ended is ignored. So a driver joins only the cluster of a running driver of this
project that sees the same GPUs, or that of a warm session (see `warm_session`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import resource
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_rl import settings
from nemo_rl.distributed.cluster.template_client import relevant_variables
from nemo_rl.errors import ClusterError
from nemo_rl.utils.files import private_temp_dir, write_atomically
from nemo_rl.utils.processes import ProcessIdentity


@dataclass(frozen=True)
class WarmSession:
    """What the record of a cluster says about the warm session that has started it.

    Attributes:
        templates: directory of the session's templates.
        surroundings: see `process_surroundings`, of the session.
        variables: digests of the variables that workers inherit from the session, by name.
    """

    templates: str
    surroundings: dict[str, str]
    variables: dict[str, str]

    @staticmethod
    def of_this_process(templates: Path) -> WarmSession:
        return WarmSession(str(templates), process_surroundings(), _inherited_variables())

    def difference(self) -> str | None:
        """Return how processes started by the session differ from those started by this process; None: not at all."""
        for name, value in process_surroundings().items():
            if self.surroundings.get(name) != value:
                return f"it has another {name}"
        variables = _inherited_variables()
        names = sorted(
            name for name in variables.keys() | self.variables.keys() if variables.get(name) != self.variables.get(name)
        )
        return f"it has other values of {', '.join(names)}" if names else None


@dataclass(frozen=True)
class LocalCluster:
    """The record of a local cluster, as its owner published it.

    Attributes:
        address: host and port of the GCS.
        owner: the process that started it; the cluster ends with it.
        gcs: the GCS server, the cluster's central process.
        auth_mode: Ray's authentication mode; None for Ray's default.
        ray_version: the owner's version of Ray; Ray refuses to mix versions.
        session: the warm session that has started it; None if a driver has.
    """

    address: str
    owner: ProcessIdentity
    gcs: ProcessIdentity
    auth_mode: str | None
    ray_version: str
    session: WarmSession | None = None

    @staticmethod
    def from_json(text: str) -> LocalCluster:
        fields: dict[str, Any] = json.loads(text)
        session = fields.pop("session", None)
        owner, gcs = (ProcessIdentity(**fields.pop(name)) for name in ("owner", "gcs"))
        return LocalCluster(**fields, owner=owner, gcs=gcs, session=None if session is None else WarmSession(**session))

    def can_be_joined(self) -> bool:
        # Check both: the GCS outlives its owner by a moment, and a driver may continue after it has shut its cluster
        # down. Ray ends a driver that connects to a dying GCS, without an exception.
        same_ray = self.ray_version == importlib.metadata.version("ray")
        return same_ray and self.owner.is_running() and self.gcs.is_running()


def record_path() -> Path:
    """Return the path of the record for this user, machine, interpreter and set of GPUs."""
    try:
        directory = private_temp_dir()
    except PermissionError as error:
        raise ClusterError(f"the records of running Ray clusters cannot be used: {error} Or set RAY_ADDRESS.") from None
    visible = settings.CUDA_VISIBLE_DEVICES.get()
    gpus = "all" if visible is None else ",".join(sorted(part.strip() for part in visible.split(",")))
    identity = json.dumps([socket.gethostname(), sys.executable, gpus])
    return directory / f"ray-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


@contextlib.contextmanager
def locked_record() -> Iterator[Path]:
    """Lock the record, so that two drivers started together share one cluster. Yields its path."""
    path = record_path()
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def read_record(path: Path) -> LocalCluster | None:
    """Return the recorded cluster if it can be joined."""
    try:
        cluster = LocalCluster.from_json(path.read_text())
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # no record, or one of another version of this project
    return cluster if cluster.can_be_joined() else None


def write_record(path: Path, cluster: LocalCluster) -> None:
    """Publish a cluster of this process."""
    write_atomically(path, json.dumps(asdict(cluster)))


def remove_record(path: Path, cluster: LocalCluster) -> None:
    """Remove the record of a cluster of this process, unless another cluster has replaced it."""
    if os.getpid() == cluster.owner.pid and read_record(path) == cluster:
        path.unlink(missing_ok=True)


def process_surroundings() -> dict[str, str]:
    """Return what a process inherits from its parent beside variables, in the words of an error message."""
    limits = {
        name: resource.getrlimit(getattr(resource, name))
        for name in sorted(dir(resource))
        if name.startswith("RLIMIT_")
    }
    return {
        "working directory": os.getcwd(),
        "set of CPUs": str(sorted(os.sched_getaffinity(0))),
        "control group": Path("/proc/self/cgroup").read_text(),
        "priority": str(os.getpriority(os.PRIO_PROCESS, 0)),
        "resource limit (ulimit)": str(limits),
    }


def _inherited_variables() -> dict[str, str]:
    """Return digests of the variables that workers inherit from their cluster and that may change what they do."""
    with settings.only_inheritable():
        inherited = relevant_variables(settings.snapshot())
    return {
        name: hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in inherited.items()
        # Each worker group receives the forwarded variables of its own driver. Ray's are those of the cluster.
        if name not in settings.forwarded() and not name.startswith("RAY_")
    }
