"""Bundles: archives for building venvs on machines that cannot reach a package index.

::

    write_bundle ─ build each venv with an empty uv cache ─ build each again, offline, from that cache ─► archive
    opened_bundle ─ check Python and platform ─ unpack safely beside the venvs ─ uv builds offline from there only

The archive starts with `bundle.json`, which names the Python version, the platform and the packages. Then comes uv's
cache: wheels, and what the builds of local packages need. A bundle is tested before it is written: the second build has
no network access. It contains neither the project's source nor bytecode.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import BundleError, VenvError
from nemo_rl.venvs.ensure import differences, ensure
from nemo_rl.venvs.planning.resolve import plan
from nemo_rl.venvs.storage.layout import UNPACKED_PREFIX, Store, make_generated_directory
from nemo_rl.venvs.uv import is_no_space, no_space_error

FORMAT = 1
_INDEX = "bundle.json"
_CACHE = "cache"
# Level 1 compresses wheels' contents almost as well as level 9, and many times faster.
_COMPRESSION = 1
# Parts of uv's cache that no build needs: facts about this machine's interpreters, and temporary environments.
_EXCLUDED = ("interpreter-", "environments-", "builds-")
_OFFLINE = {"UV_OFFLINE": "1"}


@dataclass(frozen=True)
class BundleIndex:
    """Describes the requirements and content of a bundle.

    Attributes:
        python: minor version, such as `3.11`.
        platform: such as `linux-x86_64`.
        venvs: venv name -> its packages (`name==version`), without local packages.
        num_bytes: size of the unpacked cache.
        format: version of the bundle's format.
    """

    python: str
    platform: str
    venvs: dict[str, list[str]]
    num_bytes: int
    format: int = FORMAT


def write_bundle(targets: Mapping[str, str], archive: Path) -> BundleIndex:
    """Write a bundle, after a test that the venvs can be built offline from it.

    Args:
        targets: venv name -> py_executable.
        archive: path of the `.tar.gz` file; an existing file is replaced.

    Raises:
        BundleError: the venvs cannot be built offline, `targets` is empty, or `archive` cannot be written.
        VenvError: a build with network access failed.
    """
    archive = archive.absolute()
    if not targets:
        raise BundleError("There is nothing to bundle: these workers run in existing interpreters.")
    if archive.exists() and not archive.is_file():
        raise BundleError(f"{archive} exists and is not a regular file. Give the path of a file for the bundle.")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BundleError(f"The bundle {archive} cannot be written: {error.strerror}.") from error
    with tempfile.TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=archive.parent) as folder:
        cache = Path(folder) / _CACHE
        with settings.exported({"UV_CACHE_DIR": str(cache), "NEMO_RL_COMPILE_BYTECODE": "0"}):
            packages = {
                name: _package_lines(name, text, Store(Path(folder) / "venvs")) for name, text in targets.items()
            }
            try:
                with settings.exported(_OFFLINE):
                    for name, text in targets.items():
                        ensure(text, name, store=Store(Path(folder) / "proof"))
            except VenvError as error:
                raise BundleError(f"The venvs cannot be built offline from the bundle: {error}") from error
        num_bytes = sum(
            path.stat().st_size for path in _cache_entries(cache) if path.is_file() and not path.is_symlink()
        )
        index = BundleIndex(_python(), _platform(), packages, num_bytes)
        _pack(cache, index, Path(folder) / "bundle.tar.gz")
        os.replace(Path(folder) / "bundle.tar.gz", archive)
    return index


@contextlib.contextmanager
def opened_bundle(archive: Path, targets: Mapping[str, str], store: Store | None = None) -> Iterator[BundleIndex]:
    """Make uv build from a bundle only, offline, while the block runs.

    Args:
        archive: a file that `write_bundle` wrote.
        targets: venv name -> py_executable of the venvs to build.
        store: default: the store in `settings.venv_dir()`.

    Raises:
        BundleError: the archive is unsafe, incomplete, for another platform, or lacks packages of `targets`.
    """
    store = store or Store.default()
    make_generated_directory(store.root)
    index = read_index(archive)
    if (index.python, index.platform) != (_python(), _platform()):
        raise BundleError(
            f"{archive} is for Python {index.python} on {index.platform}; this is {_python()} on {_platform()}. "
            "Create a bundle on such a machine with `nemo-rl venvs bundle`."
        )
    # On the same disk as the venvs, uv can link files instead of copying them.
    with tempfile.TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=store.root) as folder:
        _unpack(archive, Path(folder))
        with settings.exported({"UV_CACHE_DIR": str(Path(folder) / _CACHE), **_OFFLINE}):
            _check_packages(archive, index, targets, store)
            yield index


def read_index(archive: Path) -> BundleIndex:
    """Read the index of a bundle. Raises `BundleError` if the file is not a bundle."""
    try:
        with tarfile.open(archive, "r:gz") as opened:
            first = opened.next()
            content = opened.extractfile(first) if first is not None and first.name == _INDEX else None
            if content is None:
                raise BundleError(f"{archive} is not a bundle of nemo_rl: its first entry is not {_INDEX}.")
            raw = json.loads(content.read(2**26))
        if raw["format"] != FORMAT:
            raise BundleError(f"{archive} has format {raw['format']!r}; this version reads {FORMAT}.")
        return BundleIndex(**raw)
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{archive} cannot be read as a bundle: {error}") from None


def _package_lines(name: str, py_executable: str, store: Store) -> list[str]:
    ensure(py_executable, name, store=store)
    return sorted(_remote_packages(py_executable, store))


def _remote_packages(py_executable: str, store: Store) -> list[str]:
    venv_plan = plan(py_executable, store=store)
    layers = [venv_plan] if venv_plan.base is None else [venv_plan, venv_plan.base]
    return [str(package) for layer in layers for package in layer.packages if package.local is None]


def _check_packages(archive: Path, index: BundleIndex, targets: Mapping[str, str], store: Store) -> None:
    bundled = {line for lines in index.venvs.values() for line in lines}
    for name, text in targets.items():
        missing = set(_remote_packages(text, store)) - bundled
        if missing:
            changed = differences([line for line in bundled if _name(line) in set(map(_name, missing))], missing)
            raise BundleError(
                f"{archive} does not hold all packages of {name}: {'; '.join(changed[:20])}. "
                "Create a new bundle for this lock with `nemo-rl venvs bundle`."
            )


def _name(line: str) -> str:
    return line.partition("==")[0].partition(" @ ")[0]


def _cache_entries(cache: Path) -> Iterator[Path]:
    for entry in sorted(cache.iterdir()):
        if not entry.name.startswith(_EXCLUDED):
            yield entry
            if entry.is_dir():
                yield from sorted(entry.rglob("*"))


def _pack(cache: Path, index: BundleIndex, archive: Path) -> None:
    try:
        with tarfile.open(archive, "w:gz", compresslevel=_COMPRESSION) as opened:
            content = json.dumps(asdict(index), indent=1).encode()
            entry = tarfile.TarInfo(_INDEX)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
            for path in _cache_entries(cache):
                if not path.name.endswith(".lock"):
                    opened.add(path, arcname=f"{_CACHE}/{path.relative_to(cache)}", recursive=False, filter=_anonymous)
    except OSError as error:
        if is_no_space(error):
            raise no_space_error(f"Writing the bundle {archive.name}") from error
        raise


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, "r:gz") as opened:
            opened.extractall(folder, filter=functools.partial(_safe, archive))
    except tarfile.FilterError as error:
        raise BundleError(f"{archive} is not safe to unpack: {error}") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and is_no_space(error):
            raise no_space_error(f"Unpacking the bundle {archive.name}") from error
        raise BundleError(f"{archive} is incomplete or damaged: {error}") from None


def _safe(archive: Path, entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    if entry.name != _INDEX and entry.name.partition("/")[0] != _CACHE:
        raise BundleError(f"{archive} is not safe to unpack: its entry {entry.name!r} is not below {_CACHE}/.")
    # Rejects `..`, links that lead out, and devices; removes write permission for group and others.
    return tarfile.data_filter(entry, folder)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _platform() -> str:
    return f"{sys.platform}-{platform.machine()}"
