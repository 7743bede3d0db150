"""Resolve a spec to a plan: the exact packages of a venv and their digest.

`uv export` decides which packages a selection of extras and groups contains. Its output is cached in the store under a
hash of everything that it depends on, so a warm call does not run uv.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from nemo_rl.errors import LockMismatchError, UnknownExtraError, VenvBuildError, VenvError
from nemo_rl.venvs.interpreter import (
    DriverVersions,
    PythonInfo,
    query_python_cached,
    this_environment,
    this_python,
)
from nemo_rl.venvs.planning.local_packages import file_digest
from nemo_rl.venvs.planning.overlay import installed_distributions, plan_overlay
from nemo_rl.venvs.planning.plan import Package, VenvPlan, load_resolution, package_from_lock, save_resolution
from nemo_rl.venvs.planning.relocation import located, original
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec, parse_py_executable
from nemo_rl.venvs.stacks import how_to_add
from nemo_rl.venvs.storage.layout import Store, make_generated_directory, not_writable_by_others
from nemo_rl.venvs.storage.manifest import FORMAT
from nemo_rl.venvs.uv import BuildLog, run_uv

_PROJECT_FILES = ("uv.lock", "pyproject.toml", "uv.toml")


@not_writable_by_others()
def plan(
    py_executable: str | Spec | VenvPlan, *, store: Store | None = None, expected: DriverVersions | None = None
) -> VenvPlan:
    """Resolve a py_executable for the platform of this node, without building anything.

    A cached resolution takes milliseconds and no call of uv.

    Args:
        py_executable: a string or a spec; a plan is returned unchanged.
        store: where resolutions are cached; default: the store in `settings.venv_dir()`.
        expected: the driver's versions; default: those of this process.

    Raises:
        InvalidPyExecutableError: the string is not accepted.
        UnknownExtraError: the project has no such extra or group.
        LockMismatchError: `uv.lock` is missing or does not match `pyproject.toml`.
        VenvBuildError: uv failed, for example because the index does not answer.
        VenvError: the project or interpreter does not exist or cannot be read.

    Example::

        venv_plan = plan("uv run --locked --extra vllm")
        print("\\n".join(venv_plan.requirements))
    """
    if isinstance(py_executable, VenvPlan):
        return py_executable
    spec = parse_py_executable(py_executable) if isinstance(py_executable, str) else py_executable
    store = store or Store.default()
    expected = expected or DriverVersions.of_this_process()
    if isinstance(spec, InterpreterSpec):
        base = _plan_interpreter(spec.base, expected)
    else:
        base = _plan_project(spec.base, store, expected)
    if not spec.requirements:
        return base
    return plan_overlay(spec, base, store)


def _plan_interpreter(spec: InterpreterSpec, expected: DriverVersions) -> VenvPlan:
    """Plan an interpreter with the packages that are installed in it now."""
    queried = query_python_cached(spec.path)
    installed: dict[str, str] = {}
    for directory in reversed(queried.site_paths):  # the first directory on sys.path takes precedence
        installed.update(installed_distributions(Path(directory)))
    packages = tuple(Package(name, version) for name, version in sorted(installed.items()))
    return VenvPlan(spec, queried.info, packages, expected, base_paths=queried.site_paths)


def _plan_project(spec: VenvSpec, store: Store, expected: DriverVersions) -> VenvPlan:
    root = lock_root(spec.project)
    python, markers = python_of(spec)
    inputs = project_inputs(spec, root)
    key = hashlib.sha256(json.dumps([FORMAT, inputs, str(spec), asdict(python), _stable(markers)]).encode()).hexdigest()
    packages = load_resolution(store, key)
    if packages is None:
        check_selection(spec)
        packages = _export(spec, root, python, markers, store)
        save_resolution(store, key, packages)
    return VenvPlan(spec, python, tuple(packages), expected, inputs=inputs)


def lock_root(project: str) -> Path:
    """Return the directory on this node of the lock of `project`: the project itself or the workspace around it."""
    directory = located(project)
    if not directory.is_dir():
        raise VenvError(f"The project directory {project} does not exist.")
    for candidate in (directory, *directory.parents):
        if (candidate / "uv.lock").is_file():
            return candidate
    if not (directory / "pyproject.toml").is_file():
        raise VenvError(f"{project} is not a uv project: it has no pyproject.toml.")
    raise LockMismatchError(f"The project {project} has no uv.lock. Run `uv lock` there.")


def project_inputs(spec: VenvSpec, root: Path) -> str:
    """Return a digest of the project files that a resolution depends on."""
    paths = {root / name for name in _PROJECT_FILES} | {located(spec.project) / name for name in _PROJECT_FILES[1:]}
    inputs = sorted((str(original(path)), file_digest(path)) for path in paths)
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def python_of(spec: VenvSpec) -> tuple[PythonInfo, Mapping[str, str]]:
    """Return the interpreter on this node that a venv is created from, and its marker values."""
    if spec.python is None:
        return this_python(), this_environment()
    if os.sep in spec.python:
        path = os.path.abspath(os.path.expanduser(spec.python))
    else:
        arguments = ["python", "find", "--no-project", "--no-python-downloads", "--system", spec.python]
        path = run_uv(arguments, what=f"Finding the interpreter of --python {spec.python}").strip()
    queried = query_python_cached(path)
    return queried.info, queried.markers


def _stable(markers: Mapping[str, str]) -> dict[str, str]:
    # The kernel's release and version differ between nodes, but packages do not depend on them in practice.
    return {key: value for key, value in markers.items() if key not in ("platform_release", "platform_version")}


def check_selection(spec: Spec) -> None:
    """Check that the project of a spec has its extras and groups, without a call of uv.

    Raises:
        UnknownExtraError: one is missing. The message lists the known ones, and says how to add an extra of this
            package.
        VenvError: the project does not exist or cannot be read.
    """
    if isinstance(spec, InterpreterSpec):
        return
    path = located(spec.project) / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VenvError(f"{spec.project} is not a uv project: it has no pyproject.toml.") from None
    except (OSError, ValueError) as error:
        raise VenvError(f"{path} cannot be read: {error}") from None
    known_extras = {canonicalize_name(name) for name in project.get("project", {}).get("optional-dependencies", {})}
    known_groups: set[str] = {canonicalize_name(name) for name in project.get("dependency-groups", {})}
    if "dev-dependencies" in project.get("tool", {}).get("uv", {}):
        known_groups.add("dev")
    for kind, selected, known in (("extra", spec.extras, known_extras), ("group", spec.groups, known_groups)):
        unknown = [name for name in selected if name not in known]
        if unknown:
            fix = "".join(how_to_add(name) for name in unknown) if kind == "extra" else ""
            raise UnknownExtraError(
                f"{path} has no {kind} {', '.join(map(repr, unknown))}. {fix}Known {kind}s: "
                f"{', '.join(sorted(known)) or 'none'}."
            )


def _run_export(spec: VenvSpec, root: Path, python: PythonInfo, store: Store) -> str:
    mode = "--frozen" if spec.frozen else "--locked"
    arguments = ["export", mode, "--project", str(located(spec.project)), "--python", python.executable]
    arguments += ["--format", "pylock.toml", "--no-header", "--quiet", *spec.selection()]
    with contextlib.suppress(OSError):  # a read-only store gets no log
        make_generated_directory(store.root)
    with BuildLog(store.new_log("resolve"), only_on_failure=True) as log:
        return run_uv(arguments, what=f"Resolving `{spec}`", cwd=root, log=log)


def _export(spec: VenvSpec, root: Path, python: PythonInfo, markers: Mapping[str, str], store: Store) -> list[Package]:
    try:
        text = _run_export(spec, root, python, store)
    except VenvBuildError as error:
        if spec.frozen:
            raise
        try:
            _run_export(replace(spec, frozen=True), root, python, store)
        except VenvBuildError:
            raise error from None
        # uv can read the lock. It tried to resolve again, which it does only if the lock does not match.
        raise LockMismatchError(
            f"uv.lock in {root} does not match pyproject.toml, and uv cannot resolve pyproject.toml either. Correct "
            f"the requirements and run `uv lock`.\n{error}"
        ) from error
    return [
        package_from_lock(entry, root)
        for entry in tomllib.loads(text).get("packages", [])
        if "marker" not in entry or Marker(entry["marker"]).evaluate(dict(markers))
    ]
