"""The driver's own source, for nodes that do not have it: this package, and what else the driver's script imports.

::

    driver ── its files with their hashes ──────► every node: the same files at the same path? nothing to do
           ── one zip, by Ray's object plane ───► those that lack them: <venv dir>/.source/<digest>, each file checked
    tasks, workers and their children there find them first, by PYTHONPATH; builds find pyproject.toml and uv.lock

What is a source: the directory with a `pyproject.toml`, else the repository, around each directory of `sys.path` that
is not the driver's Python or venv, around the working directory, and around each project that a venv is made of. Of a
repository tracked files and new Python files travel as they are on disk; a project that is in no repository, as in an
image, travels without its caches, without what jobs write, and without what its `.gitignore` names.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from nemo_rl.utils.names import abbreviated
from nemo_rl.utils.source_archive import SourceTree, collect, write_zip
from nemo_rl.venvs import InterpreterSpec, VenvPlan

logger = logging.getLogger(__name__)

ray.cloudpickle.register_pickle_by_value(source_receiver)

_TIMEOUT_S = 120.0
_NUM_NAMED = 5
_DIGEST_PREFIX = 16
# Where no .gitignore says so: what jobs write into a project, as in an image.
_WRITTEN = ("results/", "outputs/", "logs/", "*.safetensors")
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class _Source:
    """One source directory: its files as git lists them, as nodes compare them, and as they are sent.

    Attributes:
        archive: a zip of exactly the contents that the listing names, whatever is edited meanwhile; empty where they
            are more than may be sent.
    """

    tree: SourceTree
    listing: SourceListing
    archive: bytes


class _Node(NamedTuple):
    """Ray's id of a node, and its address for people."""

    node_id: str
    address: str


@dataclass
class _State:
    """What is known in one job.

    Attributes:
        sources: by root; None for what cannot be sent.
        asked: (node id, root) of what needs no further question.
        lacking: node id -> sources that the node had to be given.
        strangers: nodes that have the driver's files, and whose own Python does not find them.
    """

    job: str = ""
    sources: dict[str, _Source | None] = field(default_factory=dict)
    asked: set[tuple[str, str]] = field(default_factory=set)
    lacking: dict[str, list[_Source]] = field(default_factory=dict)
    strangers: set[str] = field(default_factory=set)


_state = _State()
_lock = threading.RLock()


def bring_source(nodes: Iterable[NodeResources], plans: Iterable[VenvPlan] = ()) -> None:
    """Give the driver's source, and the projects of `plans`, to those of `nodes` that do not have the same files.

    What a node was asked in this job it is not asked again; a local cluster is not asked at all.

    Raises:
        BroadcastError: a node cannot store it, or it is larger than `NEMO_RL_SOURCE_MAX_MB`.
    """
    global _state
    if settings.SOURCE_SPREAD.get() == "off" or not can_grow():
        return
    asked = [_Node(node.node_id, node.address) for node in nodes]
    with _lock:
        if _state.job != job_name():
            _state = _State(job_name())
        if asked:
            sources = _known(_roots(plans))
            wanted = {
                node: own
                for node in asked
                if (own := [source for source in sources if (node.node_id, source.listing.root) not in _state.asked])
            }
            _give(wanted)


def search_path() -> list[str]:
    """What goes first on workers' PYTHONPATH, on all nodes: empty as long as every node has the driver's files."""
    with _lock:
        sources = {source.listing.root: source for own in _state.lacking.values() for source in own}
        if not sources or _state.job != job_name():
            return []
    found = [os.path.dirname(next(iter(sources.values())).listing.target) + f"/{HOOK_DIRECTORY}"]
    for entry in _driver_directories():
        owner = _owner(entry, sources)
        if owner is not None:
            found.append(os.path.normpath(os.path.join(sources[owner].listing.target, os.path.relpath(entry, owner))))
    return list(dict.fromkeys(found))


def task_options(node_id: str) -> dict[str, Any]:
    """Options of a Ray task or actor that runs code of this package on a node; empty where the node has it.

    The task finds the package, and the venv engine in it the projects, which plans name by the driver's paths.
    """
    with _lock:
        if _state.job != job_name():
            return {}
        own = list(_state.lacking.get(node_id, ()))
        is_stranger = node_id in _state.strangers
    if not own:
        directories = os.pathsep.join(_driver_directories())
        return {"runtime_env": {"env_vars": {"PYTHONPATH": directories}}} if is_stranger else {}
    variables = {
        "PYTHONPATH": os.pathsep.join(search_path()),
        settings.PROJECT_ROOT.name: str(settings.project_root()),
        settings.SOURCES.name: json.dumps({source.listing.root: source.listing.target for source in own}),
    }
    return {"runtime_env": {"env_vars": variables}}


# --- which files ------------------------------------------------------------------------------------------------------


def _roots(plans: Iterable[VenvPlan]) -> list[str]:
    directories = [Path(entry) for entry in _driver_directories()]
    for venv_plan in (layer for top in plans for layer in (top, top.base) if layer is not None):
        if not isinstance(venv_plan.spec, InterpreterSpec):
            directories.append(Path(venv_plan.spec.project))
        directories += [Path(package.local.path) for package in venv_plan.packages if package.local is not None]
    roots = {str(root) for directory in directories if (root := _source_root(directory)) is not None}
    return sorted(roots)


def _driver_directories() -> list[str]:
    """Directories of the driver's `sys.path` that are not its Python's or its venv's, and what Ray adds to them."""
    of_package = Path(settings.__file__).resolve().parent.parent
    return outside_python([*sys.path, str(of_package), os.getcwd()])


def outside_python(entries: Iterable[str]) -> list[str]:
    """Those entries of a search path that are directories and not the driver's Python's or its venv's, each once."""
    own = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)]
    found = [Path(entry or ".").resolve() for entry in entries]
    return list(
        dict.fromkeys(
            str(path) for path in found if path.is_dir() and not any(path.is_relative_to(prefix) for prefix in own)
        )
    )


def _source_root(directory: Path) -> Path | None:
    """The project around a directory: with the lock that governs it, else its own; None where there is none."""
    candidates = [directory, *directory.parents]
    for marker in ("uv.lock", "pyproject.toml", ".git"):
        for candidate in candidates:
            if (candidate / marker).exists():
                return candidate
            if (candidate / ".git").exists():
                break  # what is around a repository is another project
    return None


def _owner(directory: str, roots: Iterable[str]) -> str | None:
    """The innermost of `roots` that holds a directory."""
    holding = [root for root in roots if Path(directory).is_relative_to(root)]
    return max(holding, key=len, default=None)


def _known(roots: Sequence[str]) -> list[_Source]:
    """The sources of a job are read once, so that all its workers run the same code."""
    for root in roots:
        if root not in _state.sources:
            _state.sources[root] = _read(root)
    return [source for root in roots if (source := _state.sources[root]) is not None]


def _read(root: str) -> _Source | None:
    try:
        excludes = () if _in_repository(Path(root)) else _WRITTEN
        tree = collect(Path(root), excludes, skip_links=True)
        statuses = [(tree.root / file.path).stat() for file in tree.files]  # before the contents are read
        # Nobody waits until gigabytes are read that may not travel.
        archive = _zip(tree) if tree.num_bytes <= _limit_bytes() else b""
        files = tuple(_entries(tree, statuses, archive))
    except (ConfigError, OSError) as error:
        logger.warning("nodes that lack the source in %s are not given it: %s", root, error)
        return None
    content = json.dumps([[root], *(file[:-1] for file in files)])
    digest = hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_PREFIX]
    return _Source(tree, SourceListing(root, str(settings.venv_dir() / ".source" / digest), files), archive)


def _in_repository(directory: Path) -> bool:
    return any((candidate / ".git").exists() for candidate in (directory, *directory.parents))


def _zip(tree: SourceTree) -> bytes:
    with tempfile.TemporaryDirectory(prefix="nemo_rl-source-") as folder:
        path = Path(folder) / "source.zip"
        write_zip(tree, path)
        return path.read_bytes()


def _entries(tree: SourceTree, statuses: Sequence[os.stat_result], archive: bytes) -> Iterator[FileEntry]:
    """The files as the archive has them; without one by their sizes alone."""
    with zipfile.ZipFile(io.BytesIO(archive)) if archive else contextlib.nullcontext() as opened:
        for file, status in zip(tree.files, statuses, strict=True):
            stamp = (status.st_ino, status.st_mtime_ns)
            num_bytes, sha256 = status.st_size, ""
            if opened is not None:
                content = opened.read(file.path)
                num_bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
            yield FileEntry(file.path, num_bytes, sha256, os.access(tree.root / file.path, os.X_OK), stamp)


def _limit_bytes() -> int:
    return settings.SOURCE_MAX_MB.get() * 10**6


# --- to the nodes -----------------------------------------------------------------------------------------------------


def _give(wanted: Mapping[_Node, list[_Source]]) -> None:
    listings = {
        key: ray.put([source.listing for source in own])
        for own in wanted.values()
        if (key := tuple(source.listing.root for source in own))
    }
    asked = {node: (listings[tuple(source.listing.root for source in own)], _PACKAGE) for node, own in wanted.items()}
    absent: dict[str, list[tuple[_Node, _Source]]] = {}
    for node, answer in _ask(source_receiver.missing_here, asked).items():
        if isinstance(answer, RayError):
            logger.info("node %s does not say whether it has the source: %s", node.address, answer)
            continue
        if not answer.can_import:
            _state.strangers.add(node.node_id)
        for source, is_lacking, is_absent in zip(wanted[node], answer.lacking, answer.absent, strict=True):
            if is_absent:
                absent.setdefault(source.listing.root, []).append((node, source))
            if is_lacking and not is_absent:
                _state.lacking.setdefault(node.node_id, []).append(source)
            if not is_absent:
                _state.asked.add((node.node_id, source.listing.root))
    for receivers in absent.values():
        _send(receivers[0][1], [node for node, _ in receivers])


def _send(source: _Source, nodes: list[_Node]) -> None:
    listing = ray.put(source.listing)
    archive = ray.put(_archive(source))
    answers = _ask(source_receiver.unpack_here, dict.fromkeys(nodes, (listing, archive)))
    for node, answer in answers.items():
        if isinstance(answer, RayTaskError):
            reason = str(getattr(answer, "cause", answer))
            raise BroadcastError(
                f"the source in {source.listing.root} did not reach node {node.address} "
                f"({source.listing.target} there): {reason}. Set NEMO_RL_VENV_DIR to a directory that every node can "
                "write, or bring the source to every node yourself and set NEMO_RL_SOURCE_SPREAD=off."
            )
        if isinstance(answer, RayError):
            logger.info("node %s did not receive the source: %s", node.address, answer)
            continue
        _state.lacking.setdefault(node.node_id, []).append(source)
        _state.asked.add((node.node_id, source.listing.root))
    logger.info(
        "%d nodes received the source in %s: %d files, %.1f MB",
        len(nodes),
        source.listing.root,
        len(source.tree.files),
        source.tree.num_bytes / 1e6,
    )
    if source.tree.untracked:
        logger.warning(
            "new files of %s that are no Python stay behind, because git does not track them: %s",
            source.listing.root,
            abbreviated(source.tree.untracked, _NUM_NAMED),
        )


def _archive(source: _Source) -> bytes:
    if not source.archive:
        largest = ", ".join(f"{file.path} {file.num_bytes / 1e6:.1f} MB" for file in source.tree.largest(_NUM_NAMED))
        raise BroadcastError(
            f"the source in {source.listing.root} has {source.tree.num_bytes / 1e6:.1f} MB in "
            f"{len(source.tree.files)} files, more than "
            f"NEMO_RL_SOURCE_MAX_MB={settings.SOURCE_MAX_MB.get()} allows to be sent to nodes that lack it. Its "
            f"largest: {largest}. Let git ignore what is no source, or raise the limit."
        )
    return source.archive


def _ask(function: Callable[..., Any], arguments: Mapping[_Node, tuple[Any, ...]]) -> dict[_Node, Any]:
    """Call a function of `source_receiver` on each node, all at once; what it returned, or why it did not."""
    calls = call_on_nodes(
        function, {node.node_id: own for node, own in arguments.items()}, lambda _: {"name": "source"}
    )
    answers = collect_answers(calls, _TIMEOUT_S)
    return {node: answers[node.node_id] for node in arguments}
