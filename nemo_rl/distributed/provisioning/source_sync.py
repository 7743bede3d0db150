"""Send the driver's source to nodes that lack it: this package, and everything else that the driver's script imports.

::

    driver ── list of files with hashes ────────► every node: the same files at the same path? Then nothing to do
           ── one zip, through Ray's objects ───► nodes without them: <venv dir>/.source/<digest>, each file checked
    There, tasks, workers and their children import them first (PYTHONPATH); builds find pyproject.toml and uv.lock.

A source directory is the directory with a `pyproject.toml`, else the repository, around each directory of `sys.path`
that is not part of the driver's Python or venv, around the working directory, and around each project of a venv. From a
repository, tracked files and new Python files are sent with their content on disk. A project outside a repository, as
in an image, is sent without caches, without the output of jobs, and without files that its `.gitignore` excludes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from nemo_rl import settings
from nemo_rl.distributed.cluster.node_calls import call_on_nodes, collect_answers
from nemo_rl.distributed.cluster.placement import NodeResources
from nemo_rl.distributed.cluster.session import can_grow, job_name
from nemo_rl.distributed.provisioning import source_receiver
from nemo_rl.distributed.provisioning.source_receiver import HOOK_DIRECTORY, FileEntry, SourceListing
from nemo_rl.errors import BroadcastError, ConfigError
from nemo_rl.observability.activities import activity
from nemo_rl.utils.interactive import is_interactive
from nemo_rl.utils.names import abbreviated
from nemo_rl.utils.source_archive import SourceTree, collect, write_zip
from nemo_rl.venvs import InterpreterSpec, VenvPlan
from nemo_rl.venvs.planning.relocation import located, original, relocated_roots

logger = logging.getLogger(__name__)

ray.cloudpickle.register_pickle_by_value(source_receiver)

_TIMEOUT_S = 120.0
_NUM_LISTED = 5
_DIGEST_PREFIX = 16
# Output of jobs in a project outside a repository, as in an image.
_JOB_OUTPUT = ("results/", "outputs/", "logs/", "*.safetensors")
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class _Source:
    """One source directory.

    Attributes:
        tree: its files.
        listing: the files with hashes, for comparison on the nodes.
        archive: a zip with the contents of the listing, read before the files can change; empty if they exceed
            `NEMO_RL_SOURCE_MAX_MB`.
    """

    tree: SourceTree
    listing: SourceListing
    archive: bytes


class _Node(NamedTuple):
    """Ray's id of a node, and its address for messages."""

    node_id: str
    address: str


@dataclass
class _State:
    """What this process knows about the nodes of one job.

    Attributes:
        sources: root -> source; None for a directory that cannot be sent.
        checked: (node id, root) of sources that the node has at either path.
        received: node id -> sources that the node has only because the driver sent them.
        without_package: nodes that have the driver's files, but whose Python does not find this package.
    """

    job: str = ""
    sources: dict[str, _Source | None] = field(default_factory=dict)
    checked: set[tuple[str, str]] = field(default_factory=set)
    received: dict[str, list[_Source]] = field(default_factory=dict)
    without_package: set[str] = field(default_factory=set)


_state = _State()
_lock = threading.RLock()


def distribute_source(nodes: Iterable[NodeResources], plans: Iterable[VenvPlan] = ()) -> None:
    """Send the driver's source and the projects of `plans` to those of `nodes` that do not have the same files.

    Each node is checked once per job, so that all workers of a job run the same code. In an interactive session, files
    that were edited are sent again. A local cluster, which has one node, is not checked.

    Raises:
        BroadcastError: a node cannot store the source, or the source exceeds `NEMO_RL_SOURCE_MAX_MB`.
    """
    global _state
    if settings.SOURCE_SPREAD.get() == "off" or not can_grow():
        return
    nodes = list(nodes)
    if not nodes:
        return
    with _lock:
        if _state.job != job_name():
            _state = _State(job_name())
        if is_interactive():
            _forget_edited_sources()
        sources = _read_sources(_roots(plans))
        unchecked: dict[_Node, list[_Source]] = {}
        for node in nodes:
            missing = [source for source in sources if (node.node_id, source.listing.root) not in _state.checked]
            if missing:
                unchecked[_Node(node.node_id, node.address)] = missing
        _check_and_send(unchecked)


def search_path() -> list[str]:
    """Return the directories to put first on the PYTHONPATH of workers; empty if every node has the driver's files."""
    with _lock:
        sources = {source.listing.root: source for received in _state.received.values() for source in received}
        if not sources or _state.job != job_name():
            return []
    directories = [os.path.dirname(next(iter(sources.values())).listing.target) + f"/{HOOK_DIRECTORY}"]
    for entry in _driver_directories():
        root = _innermost(entry, sources)
        if root is not None:
            target = sources[root].listing.target
            directories.append(os.path.normpath(os.path.join(target, os.path.relpath(entry, root))))
    return list(dict.fromkeys(directories))


def task_options(node_id: str) -> dict[str, Any]:
    """Return options for a Ray task or actor that runs code of this package on a node; empty if it needs none.

    With them the task can import the package, and the venv engine finds projects, which plans name by the driver's
    paths.
    """
    with _lock:
        if _state.job != job_name():
            return {}
        received = list(_state.received.get(node_id, ()))
        is_without_package = node_id in _state.without_package
    variables = {}
    # The driver's own project may be at another path than the venvs name, as in a submitted job.
    moved = dict(relocated_roots())
    if received:
        variables["PYTHONPATH"] = os.pathsep.join(search_path())
        moved |= {str(original(source.listing.root)): source.listing.target for source in received}
    elif is_without_package:
        variables["PYTHONPATH"] = os.pathsep.join(_driver_directories())
    if moved:
        variables[settings.PROJECT_ROOT.name] = str(settings.project_root())
        variables[settings.SOURCES.name] = json.dumps(moved)
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def _roots(plans: Iterable[VenvPlan]) -> list[str]:
    directories, workspaces = [Path(entry) for entry in _driver_directories()], set()
    for venv_plan in (layer for top in plans for layer in (top, top.base) if layer is not None):
        if not isinstance(venv_plan.spec, InterpreterSpec):
            directories.append(Path(venv_plan.spec.project))
        if venv_plan.lock_root is not None:
            workspaces.add(located(venv_plan.lock_root))
        directories += [located(package.local.path) for package in venv_plan.packages if package.local is not None]
    roots = {str(root) for directory in directories if (root := _source_root(directory, workspaces)) is not None}
    return sorted(roots)


def _driver_directories() -> list[str]:
    """Return the driver's import directories outside its Python and venv, and those that Ray adds for workers."""
    package_directory = Path(settings.__file__).resolve().parent.parent
    return outside_python([*sys.path, str(package_directory), os.getcwd()])


def outside_python(entries: Iterable[str]) -> list[str]:
    """Return the directories of a search path that are outside the driver's Python and venv, without duplicates."""
    prefixes = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    paths = [Path(entry or ".").resolve() for entry in entries]
    return list(
        dict.fromkeys(
            str(path) for path in paths if path.is_dir() and not any(path.is_relative_to(prefix) for prefix in prefixes)
        )
    )


def _source_root(directory: Path, workspaces: Set[Path] = frozenset()) -> Path | None:
    """Return the source directory around `directory`: its workspace, project or repository; None if there is none.

    Args:
        workspaces: directories whose locks uv uses. Their members may have locks too, which uv ignores.
    """
    candidates = [directory, *directory.parents]
    for marker in (None, "uv.lock", "pyproject.toml", ".git"):
        for candidate in candidates:
            if candidate in workspaces if marker is None else (candidate / marker).exists():
                return candidate
            if (candidate / ".git").exists():
                break  # a directory around a repository belongs to another project
    return None


def _innermost(directory: str, roots: Iterable[str]) -> str | None:
    """Return the innermost of `roots` that contains a directory."""
    return max((root for root in roots if Path(directory).is_relative_to(root)), key=len, default=None)


def _read_sources(roots: Sequence[str]) -> list[_Source]:
    """Return the sources in `roots`. Each is read once per job, so that all workers run the same code."""
    for root in roots:
        if root not in _state.sources:
            _state.sources[root] = _read(root)
    return [source for root in roots if (source := _state.sources[root]) is not None]


def _forget_edited_sources() -> None:
    """Forget the sources whose files have changed since they were read, on this node and on all others."""
    for root, source in list(_state.sources.items()):
        if source is None or not _is_edited(source):
            continue
        del _state.sources[root]
        _state.checked = {pair for pair in _state.checked if pair[1] != root}
        for node_id, received in _state.received.items():
            _state.received[node_id] = [other for other in received if other.listing.root != root]


def _is_edited(source: _Source) -> bool:
    before = {file.path: file.stamp for file in source.listing.files}
    try:
        tree = _collect(source.listing.root)
        return before != {file.path: _stamp((tree.root / file.path).stat()) for file in tree.files}
    except (ConfigError, OSError):
        return True


def _collect(root: str) -> SourceTree:
    excludes = () if _is_in_repository(Path(root)) else _JOB_OUTPUT
    return collect(Path(root), excludes, skip_links=True)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


def _read(root: str) -> _Source | None:
    try:
        tree = _collect(root)
        statuses = [(tree.root / file.path).stat() for file in tree.files]  # before the contents are read
        # Reading gigabytes that exceed the limit would only take time.
        archive = _zip(tree) if tree.num_bytes <= settings.SOURCE_MAX_MB.get() * 10**6 else b""
        files = tuple(_entries(tree, statuses, archive))
    except (ConfigError, OSError) as error:
        logger.warning("the source in %s is not sent to nodes that lack it: %s", root, error)
        return None
    content = json.dumps([[root], *(file[:-1] for file in files)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_PREFIX]
    return _Source(tree, SourceListing(root, str(settings.venv_dir() / ".source" / digest), files), archive)


def _is_in_repository(directory: Path) -> bool:
    return any((candidate / ".git").exists() for candidate in (directory, *directory.parents))


def _zip(tree: SourceTree) -> bytes:
    with tempfile.TemporaryDirectory(prefix="nemo_rl-source-") as folder:
        path = Path(folder) / "source.zip"
        write_zip(tree, path)
        return path.read_bytes()


def _entries(tree: SourceTree, statuses: Sequence[os.stat_result], archive: bytes) -> Iterator[FileEntry]:
    """Yield the files with sizes and hashes of their content in the archive; without an archive, with sizes only."""
    with zipfile.ZipFile(io.BytesIO(archive)) if archive else contextlib.nullcontext() as opened:
        for file, status in zip(tree.files, statuses, strict=True):
            num_bytes, sha256 = status.st_size, ""
            if opened is not None:
                content = opened.read(file.path)
                num_bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
            yield FileEntry(file.path, num_bytes, sha256, os.access(tree.root / file.path, os.X_OK), _stamp(status))


def _check_and_send(unchecked: Mapping[_Node, list[_Source]]) -> None:
    """Check which of these sources each node has, and send those that it lacks."""
    listings: dict[tuple[str, ...], Any] = {}
    arguments: dict[_Node, tuple[Any, ...]] = {}
    for node, sources in unchecked.items():
        key = tuple(source.listing.root for source in sources)
        if key not in listings:
            listings[key] = ray.put([source.listing for source in sources])
        arguments[node] = (listings[key], _PACKAGE)
    absent: dict[str, list[tuple[_Node, _Source]]] = {}
    for node, answer in _call(source_receiver.check_sources, arguments).items():
        if isinstance(answer, RayError):
            logger.info("cannot check whether node %s has the source: %s", node.address, answer)
            continue
        if not answer.can_import:
            _state.without_package.add(node.node_id)
        for source, is_not_at_root, is_absent in zip(unchecked[node], answer.not_at_root, answer.absent, strict=True):
            if is_absent:
                absent.setdefault(source.listing.root, []).append((node, source))
                continue
            if is_not_at_root:
                _state.received.setdefault(node.node_id, []).append(source)
            _state.checked.add((node.node_id, source.listing.root))
    for receivers in absent.values():
        _send(receivers[0][1], [node for node, _ in receivers])


def _send(source: _Source, nodes: list[_Node]) -> None:
    listing = ray.put(source.listing)
    archive = ray.put(_archive(source))
    size = f"{len(source.tree.files)} files, {source.tree.num_bytes / 1e6:.1f} MB"
    with activity(f"source in {source.listing.root}") as sending:
        sending.phase(f"sending {size} to {len(nodes)} nodes")
        answers = _call(source_receiver.unpack_source, dict.fromkeys(nodes, (listing, archive)))
        num_received = sum(not isinstance(answer, RayError) for answer in answers.values())
        sending.result = f"{num_received} of {len(nodes)} nodes received {size}"
    for node, answer in answers.items():
        if isinstance(answer, RayTaskError):
            reason = str(getattr(answer, "cause", answer))
            raise BroadcastError(
                f"the source in {source.listing.root} did not reach node {node.address} "
                f"({source.listing.target} on the node): {reason}. Set NEMO_RL_VENV_DIR to a directory that every "
                "node can write, or copy the source to every node yourself and set NEMO_RL_SOURCE_SPREAD=off."
            )
        if isinstance(answer, RayError):
            logger.info("node %s did not receive the source: %s", node.address, answer)
            continue
        _state.received.setdefault(node.node_id, []).append(source)
        _state.checked.add((node.node_id, source.listing.root))
    if source.tree.untracked:
        logger.warning(
            "new files of %s are not sent, because they are not Python files and git does not track them: %s",
            source.listing.root,
            abbreviated(source.tree.untracked, _NUM_LISTED),
        )


def _archive(source: _Source) -> bytes:
    """Return the archive of a source. Raises `BroadcastError` if the source exceeds the limit."""
    if not source.archive:
        largest = ", ".join(f"{file.path} {file.num_bytes / 1e6:.1f} MB" for file in source.tree.largest(_NUM_LISTED))
        raise BroadcastError(
            f"the source in {source.listing.root} has {source.tree.num_bytes / 1e6:.1f} MB in "
            f"{len(source.tree.files)} files, more than NEMO_RL_SOURCE_MAX_MB={settings.SOURCE_MAX_MB.get()} allows to "
            f"send to nodes that lack it. The largest files: {largest}. Add other files to .gitignore, or "
            "raise the limit."
        )
    return source.archive


def _call(function: Callable[..., Any], arguments: Mapping[_Node, tuple[Any, ...]]) -> dict[_Node, Any]:
    """Call a function of `source_receiver` on each node, in parallel; return the results or errors."""
    by_id = {node.node_id: values for node, values in arguments.items()}
    calls = call_on_nodes(function, by_id, lambda _: {"name": "source"})
    answers = collect_answers(calls, _TIMEOUT_S)
    return {node: answers[node.node_id] for node in arguments}
