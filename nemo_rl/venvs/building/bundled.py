"""Installs the packages of a venv from an unpacked bundle.

::

    <bundle>/files/<sha256>/<file name>   wheels and source archives, as their index serves them
    <bundle>/cache/                       uv's cache with what builds need: build back ends, Git repositories

uv trusts its cache: it installs an altered file of an unpacked wheel without comparing it with anything. So packages
with a hash in the lock never come from the bundle's cache. Their files are compared with the lock when the bundle is
opened, and again by uv, which unpacks them into an empty cache.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from nemo_rl.errors import BundleError
from nemo_rl.venvs.building.uv_config import uv_build_environment
from nemo_rl.venvs.planning.overlay import install_line
from nemo_rl.venvs.planning.plan import Package, VenvPlan
from nemo_rl.venvs.planning.relocation import located
from nemo_rl.venvs.planning.spec import VenvSpec
from nemo_rl.venvs.storage.verify import file_hash
from nemo_rl.venvs.uv import BuildLog, run_uv

FILES, CACHE = "files", "cache"
_OFFLINE = {"UV_OFFLINE": "1"}


@dataclass(frozen=True)
class UnpackedBundle:
    """Finds the files of packages in an unpacked bundle.

    Attributes:
        root: its directory.
    """

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / CACHE

    def files(self) -> list[Path]:
        """Return the wheels and source archives. The parent of each is named after its sha256."""
        return sorted(self.root.glob(f"{FILES}/*/*"))

    def find(self, package: Package) -> Path | None:
        """Return the file that a package is installed from; None if the bundle has none with a hash of the lock.

        A package without a hash in the lock is found by its name and version.
        """
        hashes = [value.partition(":") for value in package.hashes if not value.startswith("url:")]
        for algorithm, _, digest in hashes:
            if algorithm == "sha256":
                found: Iterator[Path] = iter(self.root.glob(f"{FILES}/{digest}/*"))
            else:
                named = (path for path in self.files() if names_package(path, package))
                found = (path for path in named if file_hash(str(path), algorithm) == digest)
            if (path := next(found, None)) is not None:
                return path
        return None if hashes else next((path for path in self.files() if names_package(path, package)), None)


def is_bundled(package: Package) -> bool:
    """Return whether a bundle holds a file of the package. Directories and Git repositories are built elsewhere."""
    return package.local is None and not (package.location or "").startswith("git+")


def wheel_version(path: Path) -> str | None:
    """Return the version in the name of a wheel; None for a source archive."""
    try:
        return str(parse_wheel_filename(path.name)[1])
    except InvalidWheelFilename:
        return None


def names_package(path: Path, package: Package) -> bool:
    """Return whether the name of a file is that of a package in its version."""
    name = path.name.partition("-")[0] if path.suffix == ".whl" else path.name.rpartition("-")[0]
    return canonicalize_name(name) == package.name and (package.version or "") in path.name


def install_from_bundle(
    venv_plan: VenvPlan, root: Path, bundle: UnpackedBundle, log: BuildLog, what: str, on_line: Callable[[str], None]
) -> None:
    """Install the packages of a plan into the empty venv at `root`.

    Raises:
        BundleError: the bundle holds no file of a package with a hash of the lock.
        VenvBuildError: uv failed.
    """
    python = str(root / "bin" / "python")
    wheels: list[tuple[str, Path, str]] = []
    archives: list[Path] = []
    others = [package for package in venv_plan.packages if not is_bundled(package)]
    for package in venv_plan.packages:
        if is_bundled(package):
            path = bundle.find(package)
            if path is None:
                raise BundleError(f"{what}: the bundle holds no file of {package} that the lock allows.")
            if wheel_version(path) is None:
                archives.append(path)
            else:
                wheels.append((package.name, path, path.parent.name))
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bundle_", dir=bundle.root) as folder:
        installer = _Installer(python, Path(folder), log, what, on_line)
        installer.install(wheels)
        spec = venv_plan.spec
        project = located(spec.project) if isinstance(spec, VenvSpec) else root
        names = [package.name for package in venv_plan.packages]
        with uv_build_environment(dict(venv_plan.build_variables), names) as variables:
            environment = {"UV_CACHE_DIR": str(bundle.cache), **variables}
            built = Path(folder, "built")
            for path in archives:
                arguments = ["build", "--wheel", "--python", python, "--out-dir", str(built), str(path)]
                run_uv(arguments, what=what, cwd=project, extra_env=environment, log=log, on_line=on_line)
            products = sorted(built.glob("*.whl"))
            installer.install([(path.name.partition("-")[0], path, file_hash(str(path))) for path in products])
            if others:
                listing = Path(folder, "others.txt")
                listing.write_text("\n".join(install_line(package, spec) for package in others) + "\n")
                arguments = ["pip", "install", "--python", python, "--no-deps", "--no-compile-bytecode"]
                for package in others:
                    if package.local is not None:  # uv's cache does not detect changed code
                        arguments += ["--reinstall-package", package.name]
                arguments += ["-r", str(listing)]
                run_uv(arguments, what=what, cwd=project, extra_env=environment, log=log, on_line=on_line)


@dataclass(frozen=True)
class _Installer:
    """Installs wheels and nothing else. uv unpacks them into an empty cache.

    Attributes:
        python: the venv's interpreter.
        folder: an empty directory on the disk of the venv, so that uv can link files.
        log, what, on_line: see `run_uv`.
    """

    python: str
    folder: Path
    log: BuildLog
    what: str
    on_line: Callable[[str], None]

    def install(self, wheels: Sequence[tuple[str, Path, str]]) -> None:
        """Install wheels, each with the name of its package and its sha256, which uv compares."""
        if not wheels:
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as step:
            links = Path(step, "wheels")
            links.mkdir()
            lines = []
            for name, path, sha256 in wheels:
                os.link(path, links / path.name)
                lines.append(f"{name}=={wheel_version(path)} --hash=sha256:{sha256}")
            listing = Path(step, "wheels.txt")
            listing.write_text("\n".join(lines) + "\n")
            # The names of the packages are complete, so neither an index nor the project's settings are needed.
            arguments = ["pip", "install", "--python", self.python, "--no-deps", "--no-compile-bytecode", "--no-config"]
            arguments += ["--no-index", "--find-links", str(links), "--require-hashes", "-r", str(listing)]
            environment = {**_OFFLINE, "UV_CACHE_DIR": str(Path(step, "cache"))}
            run_uv(arguments, what=self.what, cwd=step, extra_env=environment, log=self.log, on_line=self.on_line)
