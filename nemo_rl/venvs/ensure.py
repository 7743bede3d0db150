"""Make venvs ready: find the sealed one, or build it once.

::

    ensure ── plan ── sealed? ── yes ──────────────────────────────► name ► path      (no lock, nothing written)
                        │ no, or forced
                        ▼
          drifted from an earlier venv? ── policy ignore ──────────► that one's path; refuse: VenvDriftError
                        │ no, or policy rebuild, or forced
                        ▼
                    build lock ── sealed meanwhile? ── yes ────────► name ► path
                        │ no
                        ▼
          new directory ─ fetch ─ link ─ compile ─ check ─ manifest ─ publish (rename of a link) ► name ► path
                        │ any failure: the new directory is removed; what was published stays
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import VenvDriftError, VenvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.building.build import Receive, build, site_packages_of
from nemo_rl.venvs.interpreter import DriverVersions
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.planning.requirements import normalized_name
from nemo_rl.venvs.planning.resolve import plan, python_of
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec
from nemo_rl.venvs.progress import PhaseClock, ProgressCallback
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX, Store, not_writable_by_others, point, remove_tree
from nemo_rl.venvs.storage.locks import build_lock, hold_lease, unused
from nemo_rl.venvs.storage.manifest import BrokenManifestError, Manifest, read_manifest
from nemo_rl.venvs.uv import is_no_space, no_space_error

logger = logging.getLogger(__name__)

_MAX_LISTED = 40  # packages in a `VenvDriftError`


@dataclass(frozen=True)
class SealedVenv:
    """A venv that may be run. Picklable.

    Attributes:
        python: the interpreter to start: `<venv dir>/<name>/bin/python`.
        path: the directory that holds the venv now; a rebuild makes another.
        stable_path: `.store/<digest16>`, equal on every node and after every rebuild.
        digest: identity, 64 hexadecimal digits.
        manifest: None for a bare interpreter, which the engine did not build.
        built: whether this very call built it.
    """

    python: str
    path: Path
    stable_path: Path
    digest: str
    manifest: Manifest | None
    built: bool = False


def create_local_venv(py_executable: str, venv_name: str, force_rebuild: bool = False) -> str:
    """Make the venv of `py_executable` ready under the name `venv_name`; return its interpreter's path.

    The path is `<venv dir>/<venv_name>/bin/python` (for an interpreter's path: that path). A sealed venv costs
    milliseconds. `NRL_FORCE_REBUILD_VENVS` rebuilds once per process. Raises subclasses of `VenvError`.
    """
    return ensure(py_executable, venv_name, force_rebuild=force_rebuild).python


@not_writable_by_others()
def ensure(
    py_executable: str | Spec | VenvPlan,
    venv_name: str,
    *,
    force_rebuild: bool = False,
    job_id: str | None = None,
    progress: ProgressCallback | None = None,
    store: Store | None = None,
    expected: DriverVersions | None = None,
    receive: Receive | None = None,
) -> SealedVenv:
    """Make a venv ready on this node: find it sealed, or build, check and seal it.

    Args:
        py_executable: a string, a spec, or a plan that was made on another node.
        venv_name: the name under `<venv dir>`; it will point to the venv.
        force_rebuild: build even if there is a sealed one; with `job_id`, once per job. `NRL_FORCE_REBUILD_VENVS` does
            the same, with this process as the job when no `job_id` is given.
        job_id: unique among jobs that share a venv directory.
        progress: called with every event, from this thread.
        expected: the driver's versions; default: those of this process (or those in the plan).
        receive: where to get the venv, and the one that it is laid over, instead of building them here.

    Raises subclasses of `VenvError`. A venv that was ready before a failed rebuild is still ready after it.
    """
    store = store or Store.default()
    name_path = store.name_path(venv_name)
    clock = PhaseClock(venv_name, progress)
    venv_plan = _planned(py_executable, store, expected, clock)
    venv_plan.check_compatible()
    if venv_plan.is_interpreter:
        assert isinstance(venv_plan.spec, InterpreterSpec)
        path = Path(venv_plan.spec.path)
        return SealedVenv(str(path), path.parent.parent, path.parent.parent, venv_plan.digest, None)
    force = _force(force_rebuild, job_id)
    venv = _ready(venv_plan, venv_name, store, clock, force, receive)
    if venv.manifest is not None:  # a sealed venv may have been checked against another driver's versions
        venv_plan.expected.check(f"The venv {venv_name!r}", venv.manifest.python, venv.manifest.ray)
    # A venv that has drifted, and is used all the same, gets no name: the name says what was asked for.
    is_asked = venv.digest == venv_plan.digest
    named = _named(store, name_path, venv.digest) if is_asked else venv.stable_path
    return SealedVenv(
        str(named / "bin" / "python"), venv.path, venv.stable_path, venv.digest, venv.manifest, venv.built
    )


@dataclass(frozen=True)
class _Force:
    """Which sealed venvs are too old: none; all that were not built by `job_id`; all from before `since`."""

    wanted: bool
    job_id: str | None
    since: float

    def accepts(self, manifest: Manifest) -> bool:
        if not self.wanted or manifest.started_at >= self.since:
            return True
        return self.job_id is not None and manifest.job_id == self.job_id


def _force(force_rebuild: bool, job_id: str | None) -> _Force:
    if force_rebuild:
        return _Force(True, job_id, time.time())
    # By the variable alone: a process that has no job's name is its own job.
    return _Force(settings.FORCE_REBUILD_VENVS.get(), job_id or _process_id(os.getpid()), time.time())


@functools.cache
def _process_id(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}:{time.time():.3f}"


def _planned(
    py_executable: str | Spec | VenvPlan, store: Store, expected: DriverVersions | None, clock: PhaseClock
) -> VenvPlan:
    clock.start("resolve")
    try:
        venv_plan = plan(py_executable, store=store, expected=expected)
        if isinstance(py_executable, VenvPlan) and isinstance(venv_plan.spec, VenvSpec):
            python, _ = python_of(venv_plan.spec)
            if python.identity() != venv_plan.python.identity():  # another platform or Python than the planning node's
                venv_plan = plan(venv_plan.spec, store=store, expected=venv_plan.expected)
            elif python != venv_plan.python:
                venv_plan = venv_plan.made_with(python)
        clock.digest = venv_plan.digest
    except BaseException as error:
        clock.end("failed", str(error).partition("\n")[0])
        raise
    clock.end()
    return venv_plan


def find_sealed(digest: str, store: Store | None = None) -> SealedVenv | None:
    """The sealed venv with this digest (or its first 16 digits), if it is there and whole enough to run.

    Looks at the manifest, the interpreter and, of an additive venv, the base. Takes no lock and writes nothing.
    """
    store = store or Store.default()
    link = store.link(digest)
    path = Path(os.path.realpath(link))
    try:
        manifest = read_manifest(path)
    except BrokenManifestError:
        return None
    # `access` follows links: it fails when the Python that the venv was made from is gone.
    if not manifest.digest.startswith(digest) or not os.access(path / "bin" / "python", os.X_OK):
        return None
    if not (path / "lib").is_dir() or not (path / "pyvenv.cfg").is_file():
        return None
    if manifest.base_digest is not None and find_sealed(manifest.base_digest, store) is None:
        return None
    return SealedVenv(str(link / "bin" / "python"), path, link, manifest.digest, manifest)


def _ready(
    venv_plan: VenvPlan, venv_name: str, store: Store, clock: PhaseClock, force: _Force, receive: Receive | None
) -> SealedVenv:
    sealed = find_sealed(venv_plan.digest, store)
    if sealed is not None and sealed.manifest is not None and force.accepts(sealed.manifest):
        if venv_plan.base is not None and force.wanted and not venv_plan.base.is_interpreter:
            _ready(venv_plan.base, venv_name, store, clock, force, receive)
        return sealed
    earlier = None if force.wanted or sealed is not None else _drifted_from(venv_plan, venv_name, store)
    if earlier is not None:
        return earlier
    with contextlib.ExitStack() as stack:
        if venv_plan.base is not None and not venv_plan.base.is_interpreter:
            resolving = dict(clock.seconds)
            clock.digest = venv_plan.base.digest
            base = _ready(venv_plan.base, venv_name, store, clock, force, receive)
            stack.enter_context(hold_lease(base.path))
            clock.digest, clock.seconds = venv_plan.digest, resolving
        stack.enter_context(_locked(venv_plan, venv_name, store, clock))
        sealed = find_sealed(venv_plan.digest, store)
        if sealed is not None and sealed.manifest is not None and force.accepts(sealed.manifest):
            return sealed  # another process built it while this one waited
        _remove_leftovers(store, venv_plan.digest)
        donors = _donors(store) if receive is None else []
        path = build(venv_plan, venv_name, store, clock, job_id=force.job_id, donors=donors, receive=receive)
        _remove_leftovers(store, venv_plan.digest)
    return SealedVenv(
        str(store.link(venv_plan.digest) / "bin" / "python"),
        path,
        store.link(venv_plan.digest),
        venv_plan.digest,
        read_manifest(path),
        built=True,
    )


def _drifted_from(venv_plan: VenvPlan, venv_name: str, store: Store) -> SealedVenv | None:
    """The venv to use although it is not what was asked for; None to build. Raises `VenvDriftError` by policy."""
    policy = settings.venv_drift()
    earlier = _earlier(venv_plan, venv_name, store) if policy != "rebuild" else None
    if earlier is None or earlier.manifest is None:
        return None
    if policy == "ignore":
        logger.warning("the venv %s is used although the code asks for other packages", venv_name)
        return earlier
    packages: list[str] = []
    layer: SealedVenv | None = earlier
    while layer is not None and layer.manifest is not None:  # an additive venv's own packages win
        packages = [*layer.manifest.packages, *packages]
        layer = find_sealed(layer.manifest.base_digest, store) if layer.manifest.base_digest else None
    raise _drift_error(venv_plan, venv_name, earlier.manifest, packages)


def _earlier(venv_plan: VenvPlan, venv_name: str, store: Store) -> SealedVenv | None:
    """The sealed venv that this name, or else the newest that this very spec, used to mean."""
    named = store.names().get(venv_name)
    if named is not None and (sealed := find_sealed(named, store)) is not None:
        return sealed
    spec = mask_secrets(str(venv_plan.spec))
    found = [sealed for digest in store.digests() if (sealed := find_sealed(digest, store)) is not None]
    same = [sealed for sealed in found if sealed.manifest is not None and sealed.manifest.spec == spec]
    return max(same, key=lambda sealed: sealed.manifest.started_at if sealed.manifest else 0.0, default=None)


def differences(held: Iterable[str], asked: Iterable[str]) -> list[str]:
    """`name old -> new` for every package that differs; a side lists `name==version` or `name @ location`."""
    old, new = _by_name(held), _by_name(asked)
    return [
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _drift_error(venv_plan: VenvPlan, venv_name: str, held: Manifest, held_packages: Iterable[str]) -> VenvDriftError:
    """The error of the policy `refuse`: every package that differs, and the two commands that resolve it."""
    changed = differences(held_packages, map(mask_secrets, venv_plan.requirements))
    python = (held.python, held.implementation, held.platform)
    asked = (venv_plan.python.version, venv_plan.python.implementation, venv_plan.python.platform)
    if python != asked:
        changed.insert(0, f"Python {' '.join(python)} -> {' '.join(asked)}")
    if not changed:
        changed = ["the same versions, from other files (hashes differ)"]
    shown = changed[:_MAX_LISTED]
    if len(changed) > len(shown):
        shown.append(f"and {len(changed) - len(shown)} more")
    listing = "\n  ".join(shown)
    return VenvDriftError(
        f"The venv {venv_name!r} on {socket.gethostname()} is not what the code asks for (digest "
        f"{held.digest[:DIGEST_PREFIX]} -> {venv_plan.digest[:DIGEST_PREFIX]}):\n  {listing}\n"
        f"Either build it here, and then run the same command: `export {settings.VENV_DRIFT.name}=rebuild`; or make an "
        "image of this code: `docker buildx build --target release -f docker/Dockerfile --tag nemo-rl:latest .` "
        f"({settings.VENV_DRIFT.name}=ignore goes on with the packages that are there.)"
    )


def _by_name(lines: Iterable[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        name, version = line, "(any version)"
        for separator in ("==", " @ "):
            if separator in line:
                name, _, version = line.partition(separator)
                break
        found[normalized_name(name)] = version
    return found


@contextlib.contextmanager
def _locked(venv_plan: VenvPlan, venv_name: str, store: Store, clock: PhaseClock) -> Iterator[None]:
    def on_wait(holder: str) -> None:
        clock.start("wait", holder)

    with contextlib.ExitStack() as stack:
        try:
            store.directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(build_lock(store.lock(venv_plan.digest), venv_name, on_wait=on_wait))
        except OSError as error:
            clock.end("failed", str(error))
            if isinstance(error, VenvError):  # the lock's time-out
                raise
            if is_no_space(error):
                raise no_space_error(f"Building the venv {venv_name!r} in {store.root}") from error
            raise VenvError(
                f"The venv {venv_name!r} is not ready and {store.root} cannot be written on {socket.gethostname()}: "
                f"{error.strerror}. Build it where the directory can be written, or set "
                f"{settings.VENV_DIR.name} to one that can. It was asked for as `{mask_secrets(str(venv_plan.spec))}`."
            ) from error
        if clock.phase == "wait":
            clock.end()
        yield


def _remove_leftovers(store: Store, digest: str) -> None:
    """Remove directories of dead builders and replaced ones that nobody uses. The caller holds the build lock."""
    current = os.path.realpath(store.link(digest))
    for path in store.builds(digest):
        if os.path.realpath(path) != current:
            with unused(path) as free:
                if free:
                    remove_tree(path)


def _donors(store: Store) -> list[Path]:
    """Where bytecode may come from: the driver's own venv, then the sealed ones of the store."""
    driver = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    donors = [driver] if driver.is_dir() else []
    for digest in store.digests():
        link = store.link(digest)
        with contextlib.suppress(VenvError):
            read_manifest(link)
            donors.append(site_packages_of(Path(os.path.realpath(link))))
    return donors


def _named(store: Store, name_path: Path, digest: str) -> Path:
    """Point the name to the venv; on a disk that cannot be written, use the store's own path instead."""
    try:
        point(name_path, os.path.join(".store", digest[:DIGEST_PREFIX]))
    except OSError:
        return store.link(digest)
    return name_path


def current_venv_digest() -> str | None:
    """Digest of the venv of the store that this very interpreter runs in; None when it runs in none."""
    try:
        return read_manifest(Path(os.path.realpath(sys.prefix))).digest
    except BrokenManifestError:
        return None
