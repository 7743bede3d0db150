"""Build one venv in a new directory and seal it. A build that fails leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from nemo_rl import settings
from nemo_rl.errors import DamagedCacheError, LockMismatchError, VenvBuildError, VenvError
from nemo_rl.secrets import mask_secrets
from nemo_rl.venvs.building.bundled import UnpackedBundle, install_from_bundle
from nemo_rl.venvs.building.bytecode import add_bytecode
from nemo_rl.venvs.building.site_hook import MODULE, PTH_FILE, write_site_hook
from nemo_rl.venvs.building.uv_config import uv_build_environment
from nemo_rl.venvs.interpreter import start_python
from nemo_rl.venvs.planning.build_variables import shown_variables
from nemo_rl.venvs.planning.local_packages import LocalPackage
from nemo_rl.venvs.planning.overlay import add_base_scripts, install_lines, installed_distributions
from nemo_rl.venvs.planning.plan import VenvPlan
from nemo_rl.venvs.planning.relocation import located, restore_original_paths
from nemo_rl.venvs.planning.resolve import plan, spec_inputs
from nemo_rl.venvs.planning.spec import InterpreterSpec, VenvSpec
from nemo_rl.venvs.progress import PhaseClock
from nemo_rl.venvs.storage.layout import DIGEST_PREFIX, Store, point, remove_tree
from nemo_rl.venvs.storage.locks import LEASE_FILE
from nemo_rl.venvs.storage.manifest import Manifest, write_manifest
from nemo_rl.venvs.storage.verify import RecordedFile, damaged_files, file_hash, records_of, remedy
from nemo_rl.venvs.uv import BuildLog, is_no_space, no_space_error, run_uv

_MAX_DAMAGES = 5  # files in a `DamagedCacheError`
_DURATION = re.compile(r"(?:(\d+)m )?(\d+(?:\.\d+)?)(ms|s)\b")

# Fills the new directory with packages, bytecode and site hook that another node built.
Receive = Callable[[VenvPlan, Path, PhaseClock, BuildLog], None]


@dataclass(frozen=True)
class BuildRequest:
    """Describes one build.

    Attributes:
        plan: plan of the venv.
        name: name of the venv, for messages.
        store: where the venv is built.
        clock: reports and times the phases.
        job_id: noted in the manifest.
        receive: fills in the venv from another node. The result is checked and sealed like an installed venv.
    """

    plan: VenvPlan
    name: str
    store: Store
    clock: PhaseClock
    job_id: str | None = None
    receive: Receive | None = None


def build(request: BuildRequest, donors: Sequence[Path]) -> Path:
    """Build, check, seal and publish a venv; return its directory. The caller holds the build lock.

    After an error the venv that was published before stays published.

    Args:
        donors: site-packages directories that bytecode may be reused from.

    Raises:
        VenvBuildError: uv failed, or the installed packages are not those that were planned.
        DamagedCacheError: the size of an installed file differs from the RECORD of its package.
        NoSpaceError: a disk is full.
        LockMismatchError: the project's files changed since the plan was made.
        IncompatibleVenvError: the Python or ray version differs from the driver's.
    """
    venv_plan, store, clock, receive = request.plan, request.store, request.clock, request.receive
    started_at = time.time()
    root = store.new_directory(venv_plan.digest)
    log = BuildLog(store.new_log(venv_plan.digest[:DIGEST_PREFIX]))
    with _remove_on_failure(root, request.name, log, clock):
        what = mask_secrets(f"Building the venv {request.name!r} (`{venv_plan.spec}`)")
        if receive is not None:
            receive(venv_plan, root, clock, log)
        else:
            _check_inputs(venv_plan, store)
            _check_copied_packages(venv_plan)
            bundle = settings.BUNDLE.get()
            if bundle is not None:
                _install_bundled(venv_plan, root, clock, log, what, UnpackedBundle(bundle))
            else:
                (_sync_project if venv_plan.is_project else _install_listed)(venv_plan, root, clock, log, what)
            restore_original_paths(site_packages_of(root))
        site_packages = site_packages_of(root)
        if venv_plan.base is not None:
            add_base_scripts(root / "bin", _base_scripts(venv_plan.base, store))
        (root / LEASE_FILE).touch()
        if receive is None:
            clock.start("compile")
            if settings.COMPILE_BYTECODE.get():
                clock.report(str(add_bytecode(site_packages, root / "bin" / "python", donors, log=log)))
        clock.start("check")
        with ThreadPoolExecutor(1) as thread:  # the interpreter starts while this thread reads
            started = thread.submit(start_python, str(root / "bin" / "python"))
            listings = _check_sizes(site_packages, what)
            ray = _check(venv_plan, root, site_packages, what, *started.result())
        if receive is None:
            _check_inputs(venv_plan, store)  # the lock may have changed while uv read it
        clock.start("seal")
        write_manifest(root, _manifest(request, root, started_at, ray, log, listings))
        point(store.link(venv_plan.digest), root.name)
        clock.end()
    return root


def site_packages_of(root: Path) -> Path:
    """Return the site-packages directory of a venv. Raises `VenvError` if there is none."""
    directories = sorted(root.glob("lib/python*/site-packages"))
    if not directories:
        raise VenvError(f"{root} has no site-packages directory.")
    return directories[0]


@contextlib.contextmanager
def _remove_on_failure(root: Path, venv_name: str, log: BuildLog, clock: PhaseClock) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        remove_tree(root)
        clock.end("failed", str(error).partition("\n")[0])
        if isinstance(error, OSError) and is_no_space(error):
            raise no_space_error(f"Building the venv {venv_name!r}", log_path=str(log.path)) from error
        raise
    finally:
        log.close()


def _check_inputs(venv_plan: VenvPlan, store: Store) -> None:
    """Raise `LockMismatchError` if the project on this node does not resolve to the planned digest."""
    spec = venv_plan.spec
    if venv_plan.base is not None or not isinstance(spec, VenvSpec):
        return
    if spec_inputs(spec) == venv_plan.inputs:
        return
    here = plan(spec, store=store, expected=venv_plan.expected, variables=dict(venv_plan.build_variables))
    if here.digest != venv_plan.digest:
        raise LockMismatchError(
            f"The project {spec.project} on {socket.gethostname()} is not the one that was planned: the packages of "
            f"`{spec}` have digest {here.digest[:DIGEST_PREFIX]} here and {venv_plan.digest[:DIGEST_PREFIX]} in the "
            "plan. Copy the same pyproject.toml and uv.lock to every node; if they changed while the job was starting, "
            "start it again."
        )


def _check_copied_packages(venv_plan: VenvPlan) -> None:
    """Raise `LockMismatchError` if a directory that a package is copied from has other files than were planned."""
    for package in venv_plan.packages:
        local = package.local
        if local is not None and not local.editable and LocalPackage.read(local.path, editable=False) != local:
            raise LockMismatchError(
                f"The files of {package} on {socket.gethostname()} are not those that were planned. Copy the same "
                "files to every node; if they changed while the job was starting, start it again."
            )


def _sync_project(venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog, what: str) -> None:
    spec = venv_plan.spec
    assert isinstance(spec, VenvSpec)
    # Planning has checked these contents of the lock against pyproject.toml, so --frozen is safe here.
    project = str(located(spec.project))
    arguments = ["sync", "--frozen", "--project", project, "--python", venv_plan.python.executable]
    arguments += ["--no-compile-bytecode", "--no-python-downloads", *spec.selection()]
    for package in venv_plan.packages:
        if package.local is not None and not package.local.editable:
            arguments += ["--reinstall-package", package.name]  # uv's cache does not detect changed code
    clock.start("fetch")
    with _build_environment(venv_plan) as variables:
        run_uv(
            arguments,
            what=what,
            cwd=project,
            extra_env={**variables, "UV_PROJECT_ENVIRONMENT": str(root)},
            log=log,
            on_line=lambda line: _report_line(line, clock),
        )
    _write_hook(venv_plan, site_packages_of(root))


def _create_empty(venv_plan: VenvPlan, root: Path, log: BuildLog, what: str) -> None:
    python = ["--python", venv_plan.python.executable, "--no-python-downloads"]
    run_uv(["venv", "--no-project", "--quiet", *python, str(root)], what=what, cwd=root.parent, log=log)
    _write_hook(venv_plan, site_packages_of(root))  # packages that are built without isolation import the base's


def _install_bundled(
    venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog, what: str, bundle: UnpackedBundle
) -> None:
    clock.start("fetch")
    _create_empty(venv_plan, root, log, what)
    install_from_bundle(venv_plan, root, bundle, log, what, lambda line: _report_line(line, clock))


def _install_listed(venv_plan: VenvPlan, root: Path, clock: PhaseClock, log: BuildLog, what: str) -> None:
    clock.start("fetch")
    project = ["--project", str(located(venv_plan.spec.project))] if isinstance(venv_plan.spec, VenvSpec) else []
    _create_empty(venv_plan, root, log, what)
    if not venv_plan.packages:
        return  # the base provides all requirements, or there are none
    listing = root / ".nemo_rl_requirements"
    listing.write_text("\n".join(install_lines(venv_plan)) + "\n")
    hashed = all(any(value.startswith("sha") for value in package.hashes) for package in venv_plan.packages)
    arguments = [
        "pip",
        "install",
        "--python",
        str(root / "bin" / "python"),
        "--no-deps",
        "--no-compile-bytecode",
        *project,
    ]
    arguments += ["--require-hashes"] if hashed else []
    arguments += [
        word
        for package in venv_plan.packages
        if package.local is not None
        for word in ("--reinstall-package", package.name)
    ]
    arguments += ["-r", str(listing)]
    with _build_environment(venv_plan) as variables:
        run_uv(
            arguments,
            what=what,
            cwd=root,
            extra_env=variables,
            log=log,
            on_line=lambda line: _report_line(line, clock),
        )
    listing.unlink()


def _build_environment(venv_plan: VenvPlan) -> AbstractContextManager[dict[str, str]]:
    packages = [package.name for package in venv_plan.packages]
    return uv_build_environment(dict(venv_plan.build_variables), packages)


def _report_line(line: str, clock: PhaseClock) -> None:
    """Derive phases from a line of uv's output: "Prepared" ends fetching and building, "Installed" ends linking."""
    if line.startswith("Prepared ") and clock.phase == "fetch":
        clock.start("link")
    elif line.startswith("Installed "):
        if clock.phase == "fetch":  # all packages were cached; the line holds the duration of linking
            clock.start("link")
            match = _DURATION.search(line)
            seconds = (int(match[1] or 0) * 60 + float(match[2]) / (1000 if match[3] == "ms" else 1)) if match else 0.0
            clock.shift("fetch", "link", seconds)
        clock.report(line)
    elif line and not line.startswith((" +", " -", " ~")):
        clock.report(line.strip())


def _write_hook(venv_plan: VenvPlan, site_packages: Path) -> None:
    base = venv_plan.base
    if base is None:
        write_site_hook(site_packages)
    elif base.is_interpreter:
        write_site_hook(site_packages, base_paths=base.base_paths)
    else:
        write_site_hook(site_packages, base=f"../{base.digest[:DIGEST_PREFIX]}")


def _base_scripts(base: VenvPlan, store: Store) -> Path:
    if isinstance(base.spec, InterpreterSpec):
        return Path(base.spec.path).parent
    return store.link(base.digest) / "bin"


def _check_sizes(site_packages: Path, what: str) -> dict[str, list[RecordedFile]]:
    """Check the sizes of the installed files; return the files that each RECORD lists, by its path.

    uv does not compare the files of its cache with anything. Sizes reveal what a full disk, a power failure or a
    program that wrote into a linked file leaves; comparing hashes would take seconds per gigabyte, see `verify`.

    Raises:
        DamagedCacheError: a size differs from the RECORD of its package.
    """
    listings: dict[str, list[RecordedFile]] = {}
    damages = list(damaged_files(records_of(str(site_packages)), compare_hashes=False, listings=listings))
    if not damages:
        return listings
    shown = [
        f"{os.path.relpath(damage.path, site_packages)} of the package {damage.package} ({damage.problem})"
        for damage in damages[:_MAX_DAMAGES]
    ]
    if len(damages) > len(shown):
        shown.append(f"and {len(damages) - len(shown)} more files")
    raise DamagedCacheError(
        f"{what} on {socket.gethostname()}: uv's cache is damaged: {'; '.join(shown)}. "
        f"{remedy([damage.package for damage in damages], 'build again')} A program that writes into an installed file "
        "also changes uv's cache, because venvs link to it; UV_LINK_MODE=copy prevents that.",
        node=socket.gethostname(),
    )


def _check(venv_plan: VenvPlan, root: Path, site_packages: Path, what: str, version: str, prefix: str) -> str | None:
    """Check that the interpreter starts in `root` and that the installed versions are as planned; return ray's.

    Args:
        version, prefix: what the interpreter says.
    """
    if prefix != str(root.resolve()):
        raise VenvBuildError(f"{what}: its interpreter runs in {prefix} instead of {root}.")
    planned = {package.name: package.version for package in venv_plan.packages}
    installed = installed_distributions(site_packages)
    wrong = [
        f"{name} is {installed.get(name, 'missing')} instead of {planned.get(name) or 'absent'}"
        for name in sorted(planned.keys() | installed.keys())
        if name not in installed or name not in planned or planned[name] not in (None, installed[name])
    ]
    if wrong:
        raise VenvBuildError(
            f"{what}: the installed packages are not the planned ones: {'; '.join(wrong[:5])}. The project may have "
            "changed meanwhile: run it again. If it fails again, remove the cached resolutions in "
            f"{root.parent / '.resolved'}."
        )
    ray = installed.get("ray") or (venv_plan.base.ray if venv_plan.base is not None else None)
    venv_plan.expected.check(what, version, ray)
    return ray


def _manifest(
    request: BuildRequest,
    root: Path,
    started_at: float,
    ray: str | None,
    log: BuildLog,
    listings: Mapping[str, list[RecordedFile]],
) -> Manifest:
    records, num_files, num_bytes = _read_records(site_packages_of(root), listings)
    venv_plan, base = request.plan, request.plan.base
    return Manifest(
        digest=venv_plan.digest,
        spec=mask_secrets(str(venv_plan.spec)),
        packages=tuple(mask_secrets(str(package)) for package in venv_plan.packages),
        python=venv_plan.python.version,
        implementation=venv_plan.python.implementation,
        platform=venv_plan.python.platform,
        base_python=venv_plan.python.executable,
        uv=_pyvenv_value(root, "uv"),
        host=socket.gethostname(),
        built_at=time.strftime("%FT%T%z"),
        started_at=started_at,
        base_digest=base.digest if base is not None and not base.is_interpreter else None,
        base_paths=base.base_paths if base is not None else (),
        ray=ray,
        records=records,
        num_files=num_files,
        num_bytes=num_bytes,
        seconds={**request.clock.seconds},
        job_id=request.job_id,
        build_variables=shown_variables(venv_plan.build_variables),
        log_path=str(log.path),
    )


def _read_records(site_packages: Path, listings: Mapping[str, list[RecordedFile]]) -> tuple[dict[str, str], int, int]:
    """Read the RECORD of every installed distribution.

    Args:
        site_packages: where they are installed.
        listings: the files that each RECORD lists, by its path.

    Returns:
        A mapping of metadata directories to the sha256 of their RECORD, with the files of the site hook; the number of
        installed files; their total size in bytes.
    """
    records: dict[str, str] = {}
    num_files = num_bytes = 0
    for record in records_of(str(site_packages)):
        records[os.path.basename(os.path.dirname(record))] = file_hash(record)
        for file in listings[record]:
            num_files += 1
            num_bytes += file.size or 0
    for name in (f"{MODULE}.py", PTH_FILE):
        records[name] = file_hash(str(site_packages / name))
    return records, num_files, num_bytes


def _pyvenv_value(root: Path, key: str) -> str:
    match = re.search(rf"^{key} = (.*)$", (root / "pyvenv.cfg").read_text(), flags=re.MULTILINE)
    return match[1] if match else ""
