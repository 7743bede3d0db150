"""List, verify and prune the venvs of a directory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_rl.errors import VenvError, VenvLockTimeoutError
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX, UNPACKED_PREFIX, Store, remove_tree
from nemo_rl.venvs.storage.locks import LEASE_FILE, build_lock, removable, unused
from nemo_rl.venvs.storage.manifest import BrokenManifestError, Manifest, read_manifest
from nemo_rl.venvs.storage.verify import verify_venv

_DAY_S = 86400.0
_KEPT_RESOLUTIONS_S = 30 * _DAY_S


@dataclass(frozen=True)
class VenvInfo:
    """Describes one digest in a venv directory.

    Attributes:
        digest: the first 16 digits.
        names: the names that point to the digest.
        path: the directory that holds the venv now; None if there is none.
        manifest: None if the venv is not sealed or its manifest is broken.
        in_use: whether a process holds a lease on one of its directories.
        last_used: seconds since the epoch; less exact on a read-only disk.
    """

    digest: str
    names: tuple[str, ...]
    path: Path | None
    manifest: Manifest | None
    in_use: bool
    last_used: float

    @property
    def sealed(self) -> bool:
        """Whether the venv has a manifest and thus is ready."""
        return self.manifest is not None


def list_venvs(store: Store | None = None) -> list[VenvInfo]:
    """List every venv of a directory, sealed or not. Takes no build lock.

    Args:
        store: default: the store in `settings.venv_dir()`.
    """
    store = store or Store.default()
    names: dict[str, list[str]] = {}
    for name, digest in store.names().items():
        names.setdefault(digest, []).append(name)
    return [_info(store, digest, tuple(names.get(digest, ()))) for digest in store.digests()]


def _info(store: Store, digest: str, names: tuple[str, ...]) -> VenvInfo:
    link = store.link(digest)
    path = Path(os.path.realpath(link)) if link.is_symlink() and link.exists() else None
    manifest = None
    if path is not None:
        with contextlib.suppress(BrokenManifestError):
            manifest = read_manifest(path)
    builds = store.builds(digest)
    in_use = any(not _is_free(build) for build in builds)
    return VenvInfo(digest, names, path, manifest, in_use, _last_used(builds))


def _is_free(path: Path) -> bool:
    for may_write in (True, False):  # without write permission for the disk or for another user's venv
        with contextlib.suppress(OSError), unused(path, may_write=may_write) as free:
            return free
    return False  # unknown; such a venv cannot be removed either


def _last_used(builds: list[Path]) -> float:
    times = [0.0]
    for build in builds:
        for path in (build / LEASE_FILE, build):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
                break
    return max(times)


@dataclass(frozen=True)
class Finding:
    """Describes one problem of a venv: the venv's name or digest, a path in the venv, the problem, and the package."""

    venv: str
    path: str
    problem: str
    package: str = ""

    def __str__(self) -> str:
        return f"{self.venv}: {self.path}: {self.problem}"


def verify(venv: str | None = None, *, store: Store | None = None) -> list[Finding]:
    """Compare every installed file with the hash that was recorded at installation; return the differences.

    Reads every file, so it takes seconds per gigabyte. `nemo_rl/venvs/storage/verify.py` does the same for any venv and
    needs nothing but a Python.

    Args:
        venv: name or digest of a venv; default: every venv of the directory.
        store: default: the store in `settings.venv_dir()`.

    Raises:
        VenvError: there is no venv with that name or digest.

    Example::

        for finding in verify("my_package.MyWorker"):
            print(finding)
    """
    store = store or Store.default()
    infos = list_venvs(store)
    if venv is not None:
        infos = [info for info in infos if venv in info.names or info.digest == venv[:DIGEST_PREFIX]]
        if not infos:
            raise VenvError(f"There is no venv {venv!r} in {store.root}.")
    return [finding for info in infos for finding in _verify(info)]


def _verify(info: VenvInfo) -> Iterator[Finding]:
    label = info.names[0] if info.names else info.digest
    if info.path is None or info.manifest is None:
        yield Finding(label, str(info.path or info.digest), "not sealed, or its manifest is broken")
        return
    for damage in verify_venv(str(info.path)):
        yield Finding(label, os.path.relpath(damage.path, info.path), damage.problem, damage.package)


def prune(
    *,
    keep_names: Collection[str] | None = None,
    older_than_s: float = 0.0,
    dry_run: bool = False,
    store: Store | None = None,
) -> PruneReport:
    """Remove unused venvs, leftovers of killed builders, old logs and old resolutions.

    It never removes a venv on which a process holds a lease, that is being built, that `ensure` returned to another
    live process, or that is the base of a venv that stays.

    Args:
        keep_names: keep venvs with one of these names; default: keep every venv that has a name.
        older_than_s: also keep venvs that were used within the last `older_than_s` seconds.
        dry_run: report what would be removed, and remove nothing.
        store: default: the store in `settings.venv_dir()`.

    Raises:
        VenvError: the directory cannot be read or written.

    Example::

        report = prune(older_than_s=7 * 86400, dry_run=True)
        print(report.removed, report.freed_bytes)
    """
    store = store or Store.default()
    infos = list_venvs(store)
    rule = _KeepRule(keep_names, older_than_s)
    report = PruneReport(dry_run)
    try:
        # An additive venv is removed before its base, so that a process cannot start in it without the base.
        for info in sorted(infos, key=lambda info: info.manifest is None or info.manifest.base_digest is None):
            _prune_digest(store, info.digest, rule, report)
        _prune_files(store, report)
    except OSError as error:
        raise VenvError(f"{store.root} cannot be pruned: {error}") from error
    return report


@dataclass
class PruneReport:
    """Lists what `prune` removed or, in a dry run, would remove.

    Attributes:
        dry_run: whether nothing was removed.
        freed_bytes: freed disk space; files with other hard links (uv's cache, another venv) do not count.
        removed: digests of the removed venvs.
        skipped: digests of venvs that are in use or being built.
    """

    dry_run: bool
    freed_bytes: int = 0
    removed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _KeepRule:
    """The arguments of `prune` that decide which venvs stay."""

    names: Collection[str] | None
    older_than_s: float

    def kept(self, infos: Sequence[VenvInfo]) -> set[str]:
        """Return the digests of the venvs that stay by this rule, and of the bases of those and of venvs in use."""
        kept = {info.digest for info in infos if self._keeps(info)}
        bases = {info.digest: info.manifest.base_digest for info in infos if info.manifest is not None}
        for digest in kept | {info.digest for info in infos if info.in_use}:
            base = bases.get(digest)
            while base is not None:
                kept.add(base[:DIGEST_PREFIX])
                base = bases.get(base[:DIGEST_PREFIX])
        return kept

    def _keeps(self, info: VenvInfo) -> bool:
        named = bool(info.names) if self.names is None else any(name in self.names for name in info.names)
        return info.sealed and (named or time.time() - info.last_used < self.older_than_s)


def _prune_digest(store: Store, digest: str, rule: _KeepRule, report: PruneReport) -> None:
    try:
        with build_lock(store.lock(digest), "prune", timeout_s=0.0):
            # Read again: while larger venvs were deleted, a process may have named this one, used it, or built on it.
            infos = list_venvs(store)
            for info in infos:
                if info.digest == digest:
                    _remove_unused(store, info, digest in rule.kept(infos), report)
    except VenvLockTimeoutError:  # a process builds it
        report.skipped.append(digest)


def _remove_unused(store: Store, info: VenvInfo, keep: bool, report: PruneReport) -> None:
    current = os.path.realpath(store.link(info.digest))
    for path in store.builds(info.digest):
        is_current = os.path.realpath(path) == current
        if is_current and keep:
            continue
        with removable(path, store.handed_out(info.digest)) as is_removable:
            if not is_removable:
                report.skipped.append(info.digest)
                continue
            report.freed_bytes += _disk_use(path)
            if is_current:
                report.removed.append(info.digest)
            if report.dry_run:
                continue
            if is_current:
                store.link(info.digest).unlink()
                for name in info.names:
                    (store.root / name).unlink(missing_ok=True)
            remove_tree(path)


def _disk_use(root: Path) -> int:
    """Return the bytes that removing `root` frees. Files with hard links elsewhere do not count."""
    total = 0
    for directory, _, files in os.walk(root):
        for name in files:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(directory, name))
                total += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return total


def _prune_files(store: Store, report: PruneReport) -> None:
    """Remove old logs and resolutions, and temporary files of killed processes."""
    candidates = [
        *store.resolved.glob("*"),
        *store.logs.glob("*"),
        *store.root.glob(".*.tmp"),
        *store.directory.glob(".*.tmp"),
    ]
    for path in candidates:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if time.time() - status.st_mtime > (_DAY_S if path.suffix == ".tmp" else _KEPT_RESOLUTIONS_S):
                report.freed_bytes += status.st_size
                if not report.dry_run:
                    path.unlink()
    for path in store.root.glob(f"{UNPACKED_PREFIX}*"):  # of a process that was killed during a build from a bundle
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > _DAY_S:
                report.freed_bytes += _disk_use(path)
                if not report.dry_run:
                    remove_tree(path)
