"""Bundles: archives for building venvs on machines that cannot reach a package index.

::

    write_bundle ─ download the files of all packages ─ build each venv from them ─ pack ─ build each again, offline,
                   from the archive ─► archive
    opened_bundle ─ check Python and platform ─ unpack safely beside the venvs ─ compare the files with the lock ─ uv
                    builds offline from there only

The archive starts with `bundle.json`, which names the Python version, the platform and the packages. Then come the
original wheels and source archives of the packages, whose hashes are in the lock, and uv's cache with what builds need
and no lock contains: build back ends, and Git repositories. See `bundled`. A bundle contains neither the project's
source nor bytecode.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import BundleError, VenvError
from nemo_rl.venvs.building.bundled import CACHE, FILES, UnpackedBundle, is_bundled, names_package
from nemo_rl.venvs.ensure import differences, ensure
from nemo_rl.venvs.planning.plan import Package
from nemo_rl.venvs.planning.resolve import plan
from nemo_rl.venvs.storage.layout import UNPACKED_PREFIX, Store, make_generated_directory
from nemo_rl.venvs.storage.verify import file_hash
from nemo_rl.venvs.transfer.downloads import choose_source, download
from nemo_rl.venvs.uv import is_no_space, no_space_error

FORMAT = 1
_INDEX = "bundle.json"
# Level 1 compresses wheels' contents almost as well as level 9, and many times faster.
_COMPRESSION = 1
# Parts of uv's cache that no build needs: facts about this machine's interpreters, temporary environments, and what uv
# makes from a Git repository, which it checks out and builds again.
_EXCLUDED = re.compile(r"(interpreter-|environments-|builds-)|git-v\d+/checkouts(/|$)|sdists-v\d+/git(/|$)")
_OFFLINE = {"UV_OFFLINE": "1"}
_NUM_DOWNLOADS = 8


@dataclass(frozen=True)
class BundleIndex:
    """Describes the requirements and content of a bundle.

    Attributes:
        python: minor version, such as `3.11`.
        platform: such as `linux-x86_64`.
        venvs: venv name -> its packages (`name==version`), without local packages.
        num_bytes: size of the unpacked files and cache.
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
        bundle, store = UnpackedBundle(Path(folder) / "bundle"), Store(Path(folder) / "venvs")
        bundle.cache.mkdir(parents=True)
        packed = Path(folder) / archive.name
        with settings.exported({**_variables(bundle), "NEMO_RL_COMPILE_BYTECODE": "0"}):
            packages = {name: _remote_packages(text, store) for name, text in targets.items()}
            _download(itertools.chain(*packages.values()), bundle)
            for name, text in targets.items():
                ensure(text, name, store=store)
            lines = {name: sorted(map(str, group)) for name, group in packages.items()}
            index = BundleIndex(_python(), _platform(), lines, _num_bytes(bundle))
            _pack(bundle, index, packed)
            try:
                proof = Store(Path(folder) / "proof")
                with opened_bundle(packed, targets, proof):
                    for name, text in targets.items():
                        ensure(text, name, store=proof)
            except VenvError as error:
                raise BundleError(f"The venvs cannot be built offline from the bundle: {error}") from error
        os.replace(packed, archive)
    return index


@contextlib.contextmanager
def opened_bundle(archive: Path, targets: Mapping[str, str], store: Store | None = None) -> Iterator[BundleIndex]:
    """Make uv build from a bundle only, offline, while the block runs.

    Args:
        archive: a file that `write_bundle` wrote.
        targets: venv name -> py_executable of the venvs to build.
        store: default: the store in `settings.venv_dir()`.

    Raises:
        BundleError: the archive is unsafe, incomplete, altered, for another platform, or holds other files than those
            in the lock of `targets`.
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
        bundle = UnpackedBundle(Path(folder))
        _check_files(archive, bundle)
        with settings.exported({**_variables(bundle), **_OFFLINE}):
            _check_packages(archive, index, bundle, targets, store)
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
    except (EOFError, zlib.error) as error:
        raise BundleError(f"{archive} is incomplete or damaged: {error}") from None
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{archive} cannot be read as a bundle: {error}") from None


def _variables(bundle: UnpackedBundle) -> dict[str, str]:
    return {settings.BUNDLE.name: str(bundle.root), "UV_CACHE_DIR": str(bundle.cache)}


def _remote_packages(py_executable: str, store: Store) -> list[Package]:
    venv_plan = plan(py_executable, store=store)
    layers = [venv_plan] if venv_plan.base is None or venv_plan.base.is_interpreter else [venv_plan, venv_plan.base]
    return [package for layer in layers for package in layer.packages if package.local is None]


def _download(packages: Iterable[Package], bundle: UnpackedBundle) -> None:
    """Store the file of each package in the bundle. Raises `BundleError` if its hash is not in the lock."""
    directory = bundle.root / FILES
    directory.mkdir()
    needed = {choose_source(package): package for package in packages if is_bundled(package)}
    with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
        paths = list(pool.map(lambda source: download(source, directory), needed))
    for package, path in zip(needed.values(), paths):
        if bundle.find(package) is None:
            raise BundleError(_foreign_file(package, [path]))


def _foreign_file(package: Package, paths: Iterable[Path]) -> str:
    found = "; ".join(f"{path.name} has sha256 {path.parent.name}" for path in paths) or "there is no file of it"
    return f"No file of {package} has a hash of the lock: {found}."


def _check_files(archive: Path, bundle: UnpackedBundle) -> None:
    """Raise `BundleError` if a file is not the one that was downloaded."""
    for path in bundle.files():
        sha256 = file_hash(str(path))
        if sha256 != path.parent.name:
            raise BundleError(
                f"{archive} has been altered: {path.name} has sha256 {sha256} instead of {path.parent.name}. Create a "
                "new bundle with `nemo-rl venvs bundle`."
            )


def _check_packages(
    archive: Path, index: BundleIndex, bundle: UnpackedBundle, targets: Mapping[str, str], store: Store
) -> None:
    """Raise `BundleError` unless the bundle holds a file for each package that the lock allows."""
    bundled = {line for lines in index.venvs.values() for line in lines}
    for name, text in targets.items():
        packages = _remote_packages(text, store)
        missing = set(map(str, packages)) - bundled
        if missing:
            changed = differences([line for line in bundled if _name(line) in set(map(_name, missing))], missing)
            raise BundleError(
                f"{archive} does not hold all packages of {name}: {'; '.join(changed[:20])}. "
                "Create a new bundle for this lock with `nemo-rl venvs bundle`."
            )
        for package in packages:
            if is_bundled(package) and bundle.find(package) is None:
                found = [path for path in bundle.files() if names_package(path, package)]
                raise BundleError(
                    f"{archive} does not fit {name}: {_foreign_file(package, found)} It was made for another lock or "
                    "by an older version, or it has been altered. Create a new bundle with `nemo-rl venvs bundle`."
                )


def _name(line: str) -> str:
    return line.partition("==")[0].partition(" @ ")[0]


def _entries(bundle: UnpackedBundle) -> Iterator[Path]:
    for path in sorted(bundle.root.rglob("*")):
        is_lock = path.name.endswith(".lock") and path.is_relative_to(bundle.cache)
        if not is_lock and not _is_excluded(path.relative_to(bundle.root).as_posix()):
            yield path


def _is_excluded(name: str) -> bool:
    top, _, rest = name.partition("/")
    return top == CACHE and _EXCLUDED.match(rest) is not None


def _num_bytes(bundle: UnpackedBundle) -> int:
    return sum(path.stat().st_size for path in _entries(bundle) if path.is_file() and not path.is_symlink())


def _pack(bundle: UnpackedBundle, index: BundleIndex, archive: Path) -> None:
    try:
        with tarfile.open(archive, "w:gz", compresslevel=_COMPRESSION) as opened:
            content = json.dumps(asdict(index), indent=1).encode()
            entry = tarfile.TarInfo(_INDEX)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
            for path in _entries(bundle):
                opened.add(path, arcname=str(path.relative_to(bundle.root)), recursive=False, filter=_anonymous)
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
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if isinstance(error, OSError) and is_no_space(error):
            raise no_space_error(f"Unpacking the bundle {archive.name}") from error
        raise BundleError(f"{archive} is incomplete or damaged: {error}") from None


def _safe(archive: Path, entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    top = entry.name.partition("/")[0]
    if entry.name != _INDEX and top not in (CACHE, FILES):
        raise BundleError(
            f"{archive} is not safe to unpack: its entry {entry.name!r} is not below {CACHE}/ or {FILES}/."
        )
    if top == FILES and not (entry.isreg() or entry.isdir()):
        raise BundleError(f"{archive} is not safe to unpack: its entry {entry.name!r} is not a regular file.")
    if _is_excluded(entry.name):
        return None
    # Rejects `..`, links that lead out, and devices; removes write permission for group and others.
    return tarfile.data_filter(entry, folder)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _platform() -> str:
    return f"{sys.platform}-{platform.machine()}"
