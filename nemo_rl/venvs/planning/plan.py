"""The plan of a venv: its resolved packages and their digest. Resolutions are cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.interpreter import DriverVersions, PythonInfo
from nemo_rl.venvs.planning.local_packages import LocalPackage, metadata_digest
from nemo_rl.venvs.planning.relocation import located, original
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX, Store
from nemo_rl.venvs.storage.manifest import FORMAT, write_atomically


@dataclass(frozen=True)
class Package:
    """Describes one resolved distribution.

    Attributes:
        name: normalised name.
        version: None for a local directory whose build decides the version.
        location: URL or path of a package that is not from an index; credentials are masked.
        hashes: `sha256:...` of every file that the lock allows (`url:...` of a file without a hash).
        artifacts: paths of local wheels and archives that the package may be installed from.
        sources: URLs (credentials are masked) and paths of all files that the package may be installed from.
        local: set for a package that is built or linked from a directory.
    """

    name: str
    version: str | None = None
    location: str | None = None
    hashes: tuple[str, ...] = ()
    artifacts: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    local: LocalPackage | None = None

    def __str__(self) -> str:
        if self.location is not None:
            return f"{self.name} @ {self.location}"
        return f"{self.name}=={self.version}" if self.version else self.name


@dataclass(frozen=True)
class Resolution:
    """Holds what uv resolved: the packages, and the directory of the lock that they come from, if there is one."""

    packages: tuple[Package, ...]
    lock_root: str | None = None


@dataclass(frozen=True)
class VenvPlan:
    """Holds a resolved spec. Picklable; valid on every node with the same Python version and platform.

    Attributes:
        spec: the spec that was resolved.
        python: the interpreter that the venv is created from, on the node that planned.
        packages: packages of the venv; of an additive venv, only those that the base does not provide.
        expected: the driver's versions, which the venv must have.
        base: plan of the base venv of an additive venv.
        base_paths: site-packages of the interpreter itself.
        inputs: digest of the project files that were read, to detect a change before or during a build.
        index_options: index options of the requirements list; used for installation and never stored.
        build_settings: digest of uv's settings that decide how packages of the project are built.
        lock_root: directory of the lock of the project: that of its workspace, or its own.
        build_variables: what builds of source packages receive, sorted by name. They may be secrets.

    Example::

        venv_plan = nemo_rl.venvs.plan("uv run --locked --extra vllm")
        print(venv_plan.digest, venv_plan.requirements)
    """

    spec: Spec
    python: PythonInfo
    packages: tuple[Package, ...]
    expected: DriverVersions
    base: VenvPlan | None = None
    base_paths: tuple[str, ...] = ()
    inputs: str = ""
    index_options: tuple[str, ...] = ()
    build_settings: str = ""
    lock_root: str | None = None
    build_variables: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def is_interpreter(self) -> bool:
        """Whether the spec is the path of an interpreter, so that there is nothing to build."""
        return isinstance(self.spec, InterpreterSpec) and not self.spec.requirements

    @property
    def is_project(self) -> bool:
        """Whether `uv sync` installs the venv. Otherwise its packages are installed from a list."""
        return isinstance(self.spec, VenvSpec) and self.spec.script is None and self.base is None

    @property
    def requirements(self) -> tuple[str, ...]:
        """All importable packages as `name==version` or `name @ location`; those of an additive venv override the base.

        Sorted by name.
        """
        merged = {canonicalize_name(package.name): str(package) for package in self.packages}
        for line in self.base.requirements if self.base is not None else ():
            merged.setdefault(canonicalize_name(line.partition("==")[0].partition(" @ ")[0]), line)
        return tuple(merged[name] for name in sorted(merged))

    @cached_property
    def digest(self) -> str:
        """Identity of the venv's content, 64 hexadecimal digits."""
        content = {
            "format": FORMAT,
            "python": self.python.identity(),
            "packages": sorted(_identity(package) for package in self.packages),
            "base": self.base.digest if self.base is not None else None,
            "base_paths": self.base_paths,
        }
        if self.build_settings:
            content["build_settings"] = self.build_settings
        if self.build_variables and not self.is_interpreter:
            content["build_variables"] = self.build_variables
        if self.is_interpreter:
            content["prefix"] = self.python.executable
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def ray(self) -> str | None:
        """The planned version of ray; None if no package is ray or the build decides its version."""
        for package in self.packages:
            if package.name == "ray":
                return package.version
        return self.base.ray if self.base is not None else None

    def check_compatible(self) -> None:
        """Raise `IncompatibleVenvError` if the planned Python or ray version differs from the driver's."""
        what, remedy = f"The venv of `{self.spec}`", ""
        if isinstance(self.spec, InterpreterSpec):
            what, remedy = f"The interpreter {self.spec}", f"give the path of a Python {self.expected.python}"
        elif self.spec.python is not None:
            remedy = "omit --python to use the driver's"
        self.expected.check(what, self.python.version, self.ray, remedy=remedy)

    def with_python(self, python: PythonInfo) -> VenvPlan:
        """Return this plan with an equal interpreter at another path."""
        base = self.base.with_python(python) if self.base is not None else None
        return replace(self, python=python, base=base)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "digest"}


def _identity(package: Package) -> str:
    local = package.local.identity() if package.local is not None else None
    location = None if package.hashes or local else package.location
    return json.dumps([package.name, package.version, location, sorted(package.hashes), local])


def package_from_lock(entry: Mapping[str, Any], root: Path) -> Package:
    """Convert a `[[packages]]` table of a pylock.toml whose relative paths start at `root`."""
    name, version = canonicalize_name(entry["name"]), entry.get("version")
    if "directory" in entry:
        directory = str(original(os.path.normpath(root / entry["directory"]["path"])))
        local = LocalPackage.read(directory, editable=bool(entry["directory"].get("editable")))
        return Package(name, version, directory, local=local)
    if "vcs" in entry:
        vcs = entry["vcs"]
        where = f"{vcs['type']}+{vcs.get('url') or vcs.get('path')}@{vcs['commit-id']}"
        if vcs.get("subdirectory"):
            where += f"#subdirectory={vcs['subdirectory']}"
        return Package(name, version, mask_secrets(where))
    location = None
    files = [*entry.get("wheels", []), *([entry["sdist"]] if "sdist" in entry else [])]
    if "archive" in entry:
        files.append(entry["archive"])
        location = mask_secrets(str(entry["archive"].get("url") or root / entry["archive"]["path"]))
    hashes = {f"{kind}:{value}" for file in files for kind, value in file.get("hashes", {}).items()}
    # Some indexes give no hashes. The URL then identifies the file.
    hashes |= {
        f"url:{mask_secrets(str(file.get('url')))}" for file in files if not file.get("hashes") and "url" in file
    }
    artifacts = [path for file in files if (path := _local_path(file, root)) is not None]
    urls = mask_secrets([str(file.get("url")) for file in files])
    sources = [_local_path(file, root) or url for file, url in zip(files, urls, strict=True)]
    return Package(name, version, location, tuple(sorted(hashes)), tuple(artifacts), tuple(sources))


def _local_path(file: Mapping[str, Any], root: Path) -> str | None:
    if "path" in file:
        return os.path.normpath(root / file["path"])
    url = urllib.parse.urlsplit(file.get("url", ""))
    return urllib.parse.unquote(url.path) if url.scheme == "file" else None


def save_resolution(store: Store, key: str, resolution: Resolution, directories: Iterable[Path] = ()) -> None:
    """Cache a resolution with the state of the local files that it depends on.

    Does nothing if the store is not writable.

    Args:
        directories: further local packages whose metadata count: those of the lock that are not selected.
    """
    packages = resolution.packages
    local = {located(package.local.path) for package in packages if package.local is not None}
    data = {
        "packages": [asdict(package) for package in packages],
        "lock_root": resolution.lock_root,
        "metadata": [[str(path), metadata_digest(path)] for path in sorted(local.union(directories))],
        "artifacts": [[path, _stamp(path)] for package in packages for path in package.artifacts],
    }
    with contextlib.suppress(OSError):
        store.create()
        store.resolved.mkdir(exist_ok=True)
        write_atomically(_resolution_path(store, key), json.dumps(data).encode())


def _resolution_path(store: Store, key: str) -> Path:
    return store.resolved / f"{key[: 2 * DIGEST_PREFIX]}.json"


def load_resolution(store: Store, key: str) -> Resolution | None:
    """Load a cached resolution; None if there is none, or if a file that it depends on has changed."""
    try:
        data = json.loads(_resolution_path(store, key).read_bytes())
        if any(metadata_digest(Path(path)) != digest for path, digest in data["metadata"]):
            return None
        # A venv that was built from a wheel stays valid after the wheel is removed.
        if any(_stamp(path) not in (stamp, None) for path, stamp in data["artifacts"]):
            return None
        return Resolution(tuple(_package(raw) for raw in data["packages"]), data["lock_root"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamp(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_mtime_ns}:{status.st_size}"


def _package(raw: dict[str, Any]) -> Package:
    local = raw.pop("local")
    lists = {key: tuple(raw.get(key, ())) for key in ("hashes", "artifacts", "sources")}
    package = Package(**{**raw, **lists})
    if local is None:
        return package
    # Its files may have changed since the resolution was cached.
    return replace(package, local=LocalPackage.read(local["path"], editable=local["editable"]))
