"""One archive with all that is needed to build venvs where no registry can be reached.

::

    write_bundle ─ build each venv with an empty uv cache ─ build each again, offline, from that cache ─► archive
    opened_bundle ─ check Python and platform ─ unpack safely beside the venvs ─ uv works offline, from there only

The archive holds uv's own cache (wheels, and what a local package's build needs) and `bundle.json`, which comes first
and says for which Python and platform it is and what it holds. It is proven before it is written: the second build has
no network. It holds neither the project's source nor bytecode.
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
from nemo_rl.venvs.storage.layout import UNPACKED_PREFIX, Store
from nemo_rl.venvs.uv import is_no_space, no_space_error

FORMAT = 1
_INDEX = "bundle.json"
_CACHE = "cache"
# Links are cheap where bytes are not: level 1 packs wheels' contents almost as small as level 9, many times faster.
_COMPRESSION = 1
# What uv keeps that no build needs: answers about interpreters of this machine, and environments of its own.
_LEFT_OUT = ("interpreter-", "environments-", "builds-")
_OFFLINE = {"UV_OFFLINE": "1"}


@dataclass(frozen=True)
class BundleIndex:
    """What a bundle is for and what it holds.

    Attributes:
        python: minor version, such as `3.11`; platform: such as `linux-x86_64`.
        venvs: name -> its packages (`name==version`; local packages are not in a bundle).
        num_bytes: of the unpacked cache.
    """

    python: str
    platform: str
    venvs: dict[str, list[str]]
    num_bytes: int
    format: int = FORMAT


def write_bundle(targets: Mapping[str, str], archive: Path) -> BundleIndex:
    """Write a bundle for `targets` (venv name -> py_executable) to `archive` (`.tar.gz`), and prove it offline.

    Raises what a build raises, and `BundleError` when the venvs cannot be built again without a network, when there is
    nothing to bundle, or no file can be put at `archive`.
    """
    archive = archive.absolute()
    if not targets:
        raise BundleError("There is nothing to bundle: these workers run in interpreters that are used as they are.")
    if archive.exists() and not archive.is_file():
        raise BundleError(f"{archive} is there and is no file: name the file that the bundle is written to.")
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
                raise BundleError(f"The bundle would not build offline: {error}") from error
        num_bytes = sum(
            path.stat().st_size for path in _cache_entries(cache) if path.is_file() and not path.is_symlink()
        )
        index = BundleIndex(_python(), _platform(), packages, num_bytes)
        _pack(cache, index, Path(folder) / "bundle.tar.gz")
        os.replace(Path(folder) / "bundle.tar.gz", archive)
    return index


@contextlib.contextmanager
def opened_bundle(archive: Path, targets: Mapping[str, str], store: Store | None = None) -> Iterator[BundleIndex]:
    """While the block runs, uv builds from the bundle alone; `targets` are what is going to be built.

    Raises `BundleError` for an archive that is not safe, not whole, for another machine, or for other packages.
    """
    store = store or Store.default()
    store.root.mkdir(parents=True, exist_ok=True)
    index = read_index(archive)
    if (index.python, index.platform) != (_python(), _platform()):
        raise BundleError(
            f"{archive} is for Python {index.python} on {index.platform}; this is {_python()} on {_platform()}. "
            "Make one on such a machine: nemo-rl venvs bundle"
        )
    # On the disk of the venvs, so that uv can link files instead of copying them.
    with tempfile.TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=store.root) as folder:
        _unpack(archive, Path(folder))
        with settings.exported({"UV_CACHE_DIR": str(Path(folder) / _CACHE), **_OFFLINE}):
            _check_packages(archive, index, targets, store)
            yield index


def read_index(archive: Path) -> BundleIndex:
    """What a bundle says of itself. Raises `BundleError`."""
    try:
        with tarfile.open(archive, "r:gz") as opened:
            first = opened.next()
            content = opened.extractfile(first) if first is not None and first.name == _INDEX else None
            if content is None:
                raise BundleError(f"{archive} is not a bundle of this project: it does not begin with {_INDEX}.")
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
    held = {line for lines in index.venvs.values() for line in lines}
    for name, text in targets.items():
        asked = set(_remote_packages(text, store))
        missing = asked - held
        if missing:
            changed = differences([line for line in held if _name(line) in set(map(_name, missing))], missing)
            raise BundleError(
                f"{archive} does not hold all packages of {name}: {'; '.join(changed[:20])}. "
                "Make a new one for this lock: nemo-rl venvs bundle"
            )


def _name(line: str) -> str:
    return line.partition("==")[0].partition(" @ ")[0]


def _cache_entries(cache: Path) -> Iterator[Path]:
    for entry in sorted(cache.iterdir()):
        if not entry.name.startswith(_LEFT_OUT):
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
        raise BundleError(f"{archive} is not whole: {error}") from None


def _safe(archive: Path, entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    if entry.name != _INDEX and entry.name.partition("/")[0] != _CACHE:
        raise BundleError(f"{archive} is not safe to unpack: its entry {entry.name!r} is not below {_CACHE}/.")
    # Refuses `..`, links that lead out, and devices; takes write bits from all but the owner.
    return tarfile.data_filter(entry, folder)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _platform() -> str:
    return f"{sys.platform}-{platform.machine()}"
