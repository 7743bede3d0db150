"""Make a venv ready: find the sealed venv, or build it once.

::

    ensure ── plan ── sealed? ── yes ──────────────────────────────► name ► path      (no lock, no write)
                        │ no, or forced
                        ▼
          drift from an earlier venv? ── policy ignore ────────────► the earlier venv's path; refuse: VenvDriftError
                        │ no, or policy rebuild, or forced
                        ▼
                    build lock ── sealed by now? ── yes ───────────► name ► path
                        │ no
                        ▼
          new directory ─ fetch ─ link ─ compile ─ check ─ manifest ─ publish (rename of a link) ► name ► path
                        │ on failure: remove the new directory; the published venv stays

A venv drifts when the name or spec that it was built for now resolves to another digest. A change of code without a
change of packages is no drift: the digest is the same. `NEMO_RL_VENV_DRIFT` decides what happens: `rebuild` builds the
new venv, `refuse` raises `VenvDriftError`, `ignore` uses the earlier venv.
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
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.utils import canonicalize_name

from nemo_rl import settings
from nemo_rl.errors import VenvDriftError, VenvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.building.build import BuildRequest, Receive, build, site_packages_of
from nemo_rl.venvs.interpreter import DriverVersions
from nemo_rl.venvs.planning.build_variables import shown_variables
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.planning.resolve import plan, python_of
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec
from nemo_rl.venvs.progress import PhaseClock, ProgressCallback
from nemo_rl.venvs.storage.layout import (
    DIGEST_PREFIX,
    Store,
    not_writable_by_others,
    point,
    remove_tree,
)
from nemo_rl.venvs.storage.locks import build_lock, hand_out, removable
from nemo_rl.venvs.storage.manifest import BrokenManifestError, Manifest, read_manifest
from nemo_rl.venvs.uv import is_no_space, no_space_error

logger = logging.getLogger(__name__)

_MAX_LISTED = 40  # packages in a `VenvDriftError`


@dataclass(frozen=True)
class SealedVenv:
    """Describes a venv that is ready to run. Picklable.

    Attributes:
        python: path of the interpreter to start: `<venv dir>/<name>/bin/python`, or the bare interpreter's own path.
        path: the directory that holds the venv now; a rebuild creates another directory.
        stable_path: `<venv dir>/.store/<digest16>`, the same on every node and after every rebuild.
        digest: identity of the content, 64 hexadecimal digits.
        manifest: None for a bare interpreter, which `nemo_rl.venvs` did not build.
        built: whether this call built the venv.
    """

    python: str
    path: Path
    stable_path: Path
    digest: str
    manifest: Manifest | None
    built: bool = False


def create_local_venv(py_executable: str, venv_name: str, force_rebuild: bool = False) -> str:
    """Make the venv of `py_executable` ready under the name `venv_name`; return the path of its interpreter.

    If the venv is sealed, this takes milliseconds; otherwise it builds, checks and seals the venv.

    Args:
        py_executable: a `uv run ...` string, or the path of an interpreter.
        venv_name: name of the venv in `<venv dir>`, such as a worker's FQN.
        force_rebuild: build even if a sealed venv exists. `NRL_FORCE_REBUILD_VENVS` does so once per process.

    Returns:
        `<venv dir>/<venv_name>/bin/python`; for the path of an interpreter, that path.

    Raises:
        VenvError: a subclass says what failed.

    Example::

        python = create_local_venv("uv run --locked --extra vllm", "my_package.MyWorker")
        subprocess.run([python, "-c", "import vllm"])
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
    """Make a venv ready on this node: find the sealed venv, or build, check and seal it.

    A venv that was ready before a failed rebuild is still ready after it. No other process removes the returned venv or
    its base before this process ends. From then on only the interpreters that run in it protect it.

    Args:
        py_executable: a string, a spec, or a plan that was made on another node.
        venv_name: name in `<venv dir>` that will point to the venv.
        force_rebuild: build even if a sealed venv exists; with `job_id`, once per job. `NRL_FORCE_REBUILD_VENVS` does
            the same; without a `job_id` this process counts as the job.
        job_id: unique among the jobs that share a venv directory.
        progress: called with every event, in this thread.
        store: default: the store in `settings.venv_dir()`.
        expected: the driver's versions; default: those in the plan, else those of this process.
        receive: fills in the venv and its base from another node instead of building them here.

    Raises:
        VenvError: a subclass says what failed.
    """
    store = store or Store.default()
    name_path = store.name_path(venv_name)
    clock = PhaseClock(venv_name, progress)
    venv_plan = _resolve(py_executable, store, expected, clock)
    venv_plan.check_compatible()
    if venv_plan.is_interpreter:
        assert isinstance(venv_plan.spec, InterpreterSpec)
        path = Path(venv_plan.spec.path)
        return SealedVenv(str(path), path.parent.parent, path.parent.parent, venv_plan.digest, None)
    force = _force_policy(force_rebuild, job_id)
    venv = _find_or_build(BuildRequest(venv_plan, venv_name, store, clock, force.job_id, receive), force)
    if venv.manifest is not None:  # the venv may have been sealed for a driver with other versions
        venv_plan.expected.check(f"The venv {venv_name!r}", venv.manifest.python, venv.manifest.ray)
    # The name points to a venv with exactly the requested packages. A venv with drift that is used anyway has another
    # digest, so it gets no name.
    is_requested = venv.digest == venv_plan.digest
    path = _point_name(store, name_path, venv.digest) if is_requested else venv.stable_path
    return replace(venv, python=str(path / "bin" / "python"))


@dataclass(frozen=True)
class _ForcePolicy:
    """Decides whether a sealed venv is recent enough.

    Without `enabled` every venv is. Otherwise `job_id` must have built it, or its build must have begun after `since`.
    """

    enabled: bool
    job_id: str | None
    since: float

    def accepts(self, manifest: Manifest) -> bool:
        if not self.enabled or manifest.started_at >= self.since:
            return True
        return self.job_id is not None and manifest.job_id == self.job_id


def _force_policy(force_rebuild: bool, job_id: str | None) -> _ForcePolicy:
    if force_rebuild:
        return _ForcePolicy(True, job_id, time.time())
    # The variable means "once per job". A process without a job id counts as a job.
    return _ForcePolicy(settings.FORCE_REBUILD_VENVS.get(), job_id or _process_id(os.getpid()), time.time())


@functools.cache
def _process_id(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}:{time.time():.3f}"


def _resolve(
    py_executable: str | Spec | VenvPlan, store: Store, expected: DriverVersions | None, clock: PhaseClock
) -> VenvPlan:
    clock.start("resolve")
    try:
        venv_plan = plan(py_executable, store=store, expected=expected)
        if isinstance(py_executable, VenvPlan) and isinstance(venv_plan.spec, VenvSpec):
            python, _ = python_of(venv_plan.spec)
            if python.identity() != venv_plan.python.identity():  # the planning node has another platform or Python
                variables = dict(venv_plan.build_variables)
                venv_plan = plan(venv_plan.spec, store=store, expected=venv_plan.expected, variables=variables)
            elif python != venv_plan.python:
                venv_plan = venv_plan.with_python(python)
        clock.digest = venv_plan.digest
    except BaseException as error:
        clock.end("failed", str(error).partition("\n")[0])
        raise
    clock.end()
    return venv_plan


def find_sealed(digest: str, store: Store | None = None) -> SealedVenv | None:
    """Return the sealed venv with this digest (or its first 16 digits); None if it is missing or cannot run.

    Checks the manifest, the interpreter and, for an additive venv, the base. Takes no lock and writes nothing.
    """
    store = store or Store.default()
    link = store.link(digest)
    path = Path(os.path.realpath(link))
    try:
        manifest = read_manifest(path)
    except BrokenManifestError:
        return None
    # `access` follows links: it fails if the base interpreter of the venv has been removed.
    if not manifest.digest.startswith(digest) or not os.access(path / "bin" / "python", os.X_OK):
        return None
    if not (path / "lib").is_dir() or not (path / "pyvenv.cfg").is_file():
        return None
    if manifest.base_digest is not None and find_sealed(manifest.base_digest, store) is None:
        return None
    return SealedVenv(str(link / "bin" / "python"), path, link, manifest.digest, manifest)


def _find_or_build(request: BuildRequest, force: _ForcePolicy) -> SealedVenv:
    venv_plan, store, clock = request.plan, request.store, request.clock
    base_plan = venv_plan.base if venv_plan.base is not None and not venv_plan.base.is_interpreter else None
    sealed = _find_accepted(venv_plan, store, force)
    if sealed is not None:
        if base_plan is not None and force.enabled:
            _find_or_build(replace(request, plan=base_plan), force)
        return sealed
    previous = None if force.enabled else _check_drift(venv_plan, request.name, store)
    if previous is not None:
        return previous
    with contextlib.ExitStack() as stack:
        if base_plan is not None:
            seconds = dict(clock.seconds)  # the base's manifest holds the seconds of its own phases
            clock.digest = base_plan.digest
            _find_or_build(replace(request, plan=base_plan), force)
            clock.digest, clock.seconds = venv_plan.digest, seconds
        stack.enter_context(_hold_build_lock(venv_plan, request.name, store, clock))
        sealed = _find_accepted(venv_plan, store, force)
        if sealed is not None:
            return sealed  # another process built it while this process waited
        _remove_leftovers(store, venv_plan.digest)
        path = build(request, _donors(store) if request.receive is None else [])
        _remove_leftovers(store, venv_plan.digest)
        hand_out(store.handed_out(venv_plan.digest))
    link = store.link(venv_plan.digest)
    return SealedVenv(str(link / "bin" / "python"), path, link, venv_plan.digest, read_manifest(path), built=True)


def _find_accepted(venv_plan: VenvPlan, store: Store, force: _ForcePolicy) -> SealedVenv | None:
    """Return the sealed venv of a plan, handed out, if it is recent enough."""
    base = venv_plan.base
    sealed = _hand_out(venv_plan.digest, None if base is None or base.is_interpreter else base.digest, store)
    if sealed is None or sealed.manifest is None or not force.accepts(sealed.manifest):
        return None
    return sealed


def _hand_out(digest: str, base_digest: str | None, store: Store) -> SealedVenv | None:
    """Return the sealed venv with this digest, after it and its base are protected from removal; see `hand_out`."""
    for needed in (base_digest, digest):
        if needed is not None and not (store.link(needed).is_symlink() and hand_out(store.handed_out(needed))):
            return None
    return find_sealed(digest, store)


def _check_drift(venv_plan: VenvPlan, venv_name: str, store: Store) -> SealedVenv | None:
    """Apply the drift policy: return the venv to use in spite of its drift, or None to build the planned venv.

    Raises `VenvDriftError` if the policy is `refuse`.
    """
    policy = settings.venv_drift()
    previous = _previous_venv(venv_plan, venv_name, store) if policy != "rebuild" else None
    if previous is None or previous.manifest is None:
        return None
    if policy == "ignore":
        logger.warning("using the existing venv %s although the code asks for other packages", venv_name)
        return _hand_out(previous.digest, previous.manifest.base_digest, store)
    packages: list[str] = []
    layer: SealedVenv | None = previous
    while layer is not None and layer.manifest is not None:  # packages of an additive venv override the base's
        packages = [*layer.manifest.packages, *packages]
        layer = find_sealed(layer.manifest.base_digest, store) if layer.manifest.base_digest else None
    raise _drift_error(venv_plan, venv_name, previous.manifest, packages)


def _previous_venv(venv_plan: VenvPlan, venv_name: str, store: Store) -> SealedVenv | None:
    """Return the sealed venv that this name points to; else the newest that was built for this spec."""
    digest_of_name = store.names().get(venv_name)
    if digest_of_name is not None and (sealed := find_sealed(digest_of_name, store)) is not None:
        return sealed
    spec = mask_secrets(str(venv_plan.spec))
    venvs = [sealed for digest in store.digests() if (sealed := find_sealed(digest, store)) is not None]
    same_spec = [sealed for sealed in venvs if sealed.manifest is not None and sealed.manifest.spec == spec]
    return max(same_spec, key=lambda sealed: sealed.manifest.started_at if sealed.manifest else 0.0, default=None)


def differences(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Return `name old -> new` for every package that differs between two lists.

    Args:
        old, new: packages as `name==version` or `name @ location`.

    Example:
        >>> differences(["a==1", "b==1"], ["a==2", "b==1", "c==1"])
        ['a 1 -> 2', 'c absent -> 1']
    """
    before, after = _versions(old), _versions(new)
    return [
        f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _drift_error(venv_plan: VenvPlan, venv_name: str, held: Manifest, held_packages: Iterable[str]) -> VenvDriftError:
    """Return the error of the policy `refuse`: the packages that differ, and the two commands that resolve it."""
    changed = differences(held_packages, map(mask_secrets, venv_plan.requirements))
    old = (held.python, held.implementation, held.platform)
    new = (venv_plan.python.version, venv_plan.python.implementation, venv_plan.python.platform)
    if old != new:
        changed.insert(0, f"Python {' '.join(old)} -> {' '.join(new)}")
    before, after = held.build_variables, shown_variables(venv_plan.build_variables)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changed.append(f"build variable {name} {before.get(name, 'unset')} -> {after.get(name, 'unset')}")
    if not changed:
        changed = ["the versions are the same, but the files differ (other hashes)"]
    shown = changed[:_MAX_LISTED]
    if len(changed) > len(shown):
        shown.append(f"and {len(changed) - len(shown)} more")
    listing = "\n  ".join(shown)
    return VenvDriftError(
        f"The venv {venv_name!r} on {socket.gethostname()} is not what the code asks for (digest "
        f"{held.digest[:DIGEST_PREFIX]} -> {venv_plan.digest[:DIGEST_PREFIX]}):\n  {listing}\n"
        f"Either set `export {settings.VENV_DRIFT.name}=rebuild` and run the command again to build the venv here; "
        "or build an image of this code: "
        "`docker buildx build --target release -f docker/Dockerfile --tag nemo-rl:latest .` "
        f"({settings.VENV_DRIFT.name}=ignore uses the existing packages.)"
    )


def _versions(lines: Iterable[str]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for line in lines:
        name, version = line, "(any version)"
        for separator in ("==", " @ "):
            if separator in line:
                name, _, version = line.partition(separator)
                break
        versions[canonicalize_name(name)] = version
    return versions


@contextlib.contextmanager
def _hold_build_lock(venv_plan: VenvPlan, venv_name: str, store: Store, clock: PhaseClock) -> Iterator[None]:
    def on_wait(holder: str) -> None:
        clock.start("wait", holder)

    with contextlib.ExitStack() as stack:
        try:
            store.create()
            stack.enter_context(build_lock(store.lock(venv_plan.digest), venv_name, on_wait=on_wait))
        except OSError as error:
            clock.end("failed", str(error))
            if isinstance(error, VenvError):  # waiting for the lock timed out
                raise
            if is_no_space(error):
                raise no_space_error(f"Building the venv {venv_name!r} in {store.root}") from error
            raise VenvError(
                f"The venv {venv_name!r} is not ready, and {store.root} cannot be written on {socket.gethostname()}: "
                f"{error.strerror}. Build it on a node where the directory is writable, or set "
                f"{settings.VENV_DIR.name} to a writable directory. Its spec is `{mask_secrets(str(venv_plan.spec))}`."
            ) from error
        if clock.phase == "wait":
            clock.end()
        yield


def _remove_leftovers(store: Store, digest: str) -> None:
    """Remove directories of dead builders and replaced, unused venvs. The caller holds the build lock.

    A replaced venv stays while another process that was handed it may start an interpreter there.
    """
    current = os.path.realpath(store.link(digest))
    for path in store.builds(digest):
        if os.path.realpath(path) != current:
            with removable(path, store.handed_out(digest)) as is_removable:
                if is_removable:
                    remove_tree(path)


def _donors(store: Store) -> list[Path]:
    """Return the site-packages that bytecode may be reused from: this process's, then those of sealed venvs."""
    driver = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    donors = [driver] if driver.is_dir() else []
    for digest in store.digests():
        link = store.link(digest)
        with contextlib.suppress(VenvError):
            read_manifest(link)
            donors.append(site_packages_of(Path(os.path.realpath(link))))
    return donors


def _point_name(store: Store, name_path: Path, digest: str) -> Path:
    """Point the name to the venv and return it; if the disk is not writable, return the path in the store."""
    try:
        point(name_path, os.path.join(".store", digest[:DIGEST_PREFIX]))
    except OSError:
        return store.link(digest)
    return name_path


def current_venv_digest() -> str | None:
    """Return the digest of the venv that this process runs in; None if the engine did not build it."""
    try:
        return read_manifest(Path(os.path.realpath(sys.prefix))).digest
    except BrokenManifestError:
        return None
