"""Resolve a spec to a plan: the exact packages of a venv and their digest.

`uv export` decides which packages a selection of extras and groups contains. Its output is cached in the store under a
hash of everything that it depends on, so a warm call does not run uv.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import socket
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from glob import glob
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from nemo_rl.errors import (
    IncompatibleVenvError,
    InvalidPyExecutableError,
    LockMismatchError,
    UnknownExtraError,
    VenvBuildError,
    VenvError,
)
from nemo_rl.venvs.interpreter import (
    DriverVersions,
    PythonInfo,
    query_python_cached,
    this_environment,
    this_python,
)
from nemo_rl.venvs.planning.build_variables import build_variables
from nemo_rl.venvs.planning.local_packages import file_digest
from nemo_rl.venvs.planning.lock_graph import LockGraph, local_directories
from nemo_rl.venvs.planning.markers import parse_marker
from nemo_rl.venvs.planning.overlay import installed_distributions, plan_overlay
from nemo_rl.venvs.planning.plan import (
    Package,
    Resolution,
    VenvPlan,
    load_resolution,
    package_from_lock,
    save_resolution,
)
from nemo_rl.venvs.planning.relocation import located, original
from nemo_rl.venvs.planning.scripts import index_options_of, script_metadata
from nemo_rl.venvs.planning.spec import InterpreterSpec, Spec, VenvSpec, parse_py_executable
from nemo_rl.venvs.stacks import how_to_add
from nemo_rl.venvs.storage.layout import Store, make_generated_directory, not_writable_by_others
from nemo_rl.venvs.storage.manifest import FORMAT
from nemo_rl.venvs.uv import BuildLog, run_uv

# What uv says about names of `--extra`, `--group` and `--package`.
_UNKNOWN_NAME = re.compile(r"(Extra|Group) `([^`]*)` is not defined|does not have a member ([^\s:]+)")
_CONFLICT = re.compile(r"error: (.* are incompatible with the declared conflicts.*)")
# Settings of uv that decide what a build of a package contains.
_BUILD_SETTINGS = (
    "build-constraint-dependencies",
    "config-settings",
    "config-settings-package",
    "extra-build-dependencies",
    "extra-build-variables",
    "no-binary",
    "no-binary-package",
    "no-build-isolation",
    "no-build-isolation-package",
)
_PROJECT_FILES = ("uv.lock", "pyproject.toml", "uv.toml")


@not_writable_by_others()
def plan(
    py_executable: str | Spec | VenvPlan,
    *,
    store: Store | None = None,
    expected: DriverVersions | None = None,
    variables: Mapping[str, str] | None = None,
) -> VenvPlan:
    """Resolve a py_executable for the platform of this node, without building anything.

    A cached resolution takes milliseconds and no call of uv.

    Args:
        py_executable: a string or a spec; a plan is returned unchanged.
        store: where resolutions are cached; default: the store in `settings.venv_dir()`.
        expected: the driver's versions; default: those of this process.
        variables: what builds receive; default: the variables of this process that the project and the settings name.

    Raises:
        ConfigError: the project or the settings name variables in a way that is not valid.
        InvalidPyExecutableError: the string is not accepted.
        UnknownExtraError: the project has no such extra, group or member.
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
    if variables is None:
        variables = build_variables(_projects(spec))
    if isinstance(spec, InterpreterSpec):
        base = _plan_interpreter(spec.base, expected)
    else:
        base = _plan_project(spec.base, store, expected, variables)
    if not spec.requirements:
        return base
    return plan_overlay(spec, base, store, variables)


def _projects(spec: Spec) -> list[Path]:
    """Return the directories on this node whose `pyproject.toml` may name variables of builds.

    uv decides which directory around the project is its workspace, so all of them count.
    """
    if isinstance(spec, InterpreterSpec):
        return []
    return [located(spec.project), *located(spec.project).parents]


def _plan_interpreter(spec: InterpreterSpec, expected: DriverVersions) -> VenvPlan:
    """Plan an interpreter with the packages that are installed in it now."""
    queried = query_python_cached(spec.path)
    installed: dict[str, str] = {}
    for directory in reversed(queried.site_paths):  # the first directory on sys.path takes precedence
        installed.update(installed_distributions(Path(directory)))
    packages = tuple(Package(name, version) for name, version in sorted(installed.items()))
    return VenvPlan(spec, queried.info, packages, expected, base_paths=queried.site_paths)


def _plan_project(spec: VenvSpec, store: Store, expected: DriverVersions, variables: Mapping[str, str]) -> VenvPlan:
    if not located(spec.project).is_dir():
        raise VenvError(f"The project directory {spec.project} does not exist.")
    python, markers = python_of(spec)
    index_options = _check_script(spec, python) if spec.script is not None else ()
    inputs = spec_inputs(spec)
    identity = [FORMAT, inputs, str(spec), asdict(python), _stable(markers), dict(variables)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    resolution = load_resolution(store, key)
    if resolution is None:
        resolution, directories = _resolve(spec, python, markers, store, variables)
        save_resolution(store, key, resolution, directories)
    return VenvPlan(
        spec,
        python,
        resolution.packages,
        expected,
        lock_root=resolution.lock_root,
        inputs=inputs,
        index_options=index_options,
        build_variables=tuple(variables.items()),
        build_settings=_build_settings(spec.project, inputs) if spec.script is None else "",
    )


def _resolve(
    spec: VenvSpec, python: PythonInfo, markers: Mapping[str, str], store: Store, variables: Mapping[str, str]
) -> tuple[Resolution, list[Path]]:
    """Let uv resolve; return also the local packages of the lock."""
    if spec.script is not None:
        return Resolution(tuple(_export(spec, python, markers, store, variables))), []
    with ThreadPoolExecutor(1) as thread:  # two calls of uv at the same time
        lock = thread.submit(_lock, spec.project)
        packages = _export(spec, python, markers, store, variables)
        root, directories = lock.result()
    return Resolution(tuple(packages), str(original(root))), directories


def _lock(project: str) -> tuple[Path, list[Path]]:
    """Return the directory of the lock that uv uses for `project`, and those of the local packages in it."""
    root = lock_root(project)
    return root, local_directories(root)


def _check_script(spec: VenvSpec, python: PythonInfo) -> tuple[str, ...]:
    """Check that a script accepts this Python; return the index options of its inline metadata."""
    assert spec.script is not None
    metadata = script_metadata(located(spec.script)) or {}
    requires = metadata.get("requires-python", "")
    try:
        is_accepted = SpecifierSet(requires).contains(python.version, prereleases=True)
    except InvalidSpecifier:
        raise InvalidPyExecutableError(f"{spec.script} has an invalid `requires-python`: {requires!r}.") from None
    if not is_accepted:
        raise IncompatibleVenvError(
            f"{spec.script} requires Python {requires}, but the driver runs Python {python.version}. Change its "
            "`requires-python`, or start the driver with such a Python."
        )
    return index_options_of(metadata.get("tool", {}).get("uv", {}), spec.project)


def lock_root(project: str) -> Path:
    """Return the directory on this node of the lock that uv uses for `project`: that of its workspace, or its own.

    Runs uv. A plan has it as `lock_root`.
    """
    arguments = ["workspace", "dir", "--project", str(located(project))]
    return Path(run_uv(arguments, what=f"Finding the uv project {project}").strip())


def spec_inputs(spec: VenvSpec) -> str:
    """Return a digest of the files of the project, or of the script, that a resolution depends on."""
    if spec.script is None:
        return project_inputs(spec.project)
    files = [file_digest(located(spec.script)), file_digest(located(f"{spec.script}.lock"))]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def project_inputs(project: str) -> str:
    """Return a digest of the project files that a resolution depends on.

    uv decides which of the directories around a project is its workspace, so the files of all of them count.
    """
    directory = located(project)
    paths = [around / name for around in (directory, *directory.parents) for name in _PROJECT_FILES]
    inputs = [(str(original(path)), digest) for path in paths if (digest := file_digest(path)) is not None]
    inputs += [(member, "") for path in paths for member in _possible_members(path)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _possible_members(pyproject: Path) -> list[str]:
    """Return the projects that a workspace's patterns match now; a new one makes its lock outdated."""
    try:
        text = pyproject.read_text(encoding="utf-8")
        if "workspace" not in text or pyproject.name != "pyproject.toml":
            return []
        patterns = tomllib.loads(text)["tool"]["uv"]["workspace"]["members"]
        found = {path for pattern in patterns for path in glob(f"{pattern}/pyproject.toml", root_dir=pyproject.parent)}
    except (OSError, ValueError, KeyError, TypeError):
        return []  # there is no workspace, or uv will report what is wrong with it
    return [str(original(pyproject.parent / path)) for path in sorted(found)]


@functools.lru_cache(maxsize=64)
def _build_settings(project: str, _inputs: str) -> str:
    """Return a digest of uv's settings around a project that decide how packages are built; empty without any."""
    directory, settings_by_file = located(project), {}
    for path in (around / name for around in (directory, *directory.parents) for name in _PROJECT_FILES[1:]):
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        table = content if path.name == "uv.toml" else content.get("tool", {}).get("uv", {})
        build_settings = {key: table[key] for key in _BUILD_SETTINGS if key in table}
        if build_settings:
            settings_by_file[str(original(path))] = build_settings
    if not settings_by_file:
        return ""
    return hashlib.sha256(json.dumps(settings_by_file, sort_keys=True, default=str).encode()).hexdigest()


def python_of(spec: VenvSpec) -> tuple[PythonInfo, Mapping[str, str]]:
    """Return the interpreter on this node that a venv is created from, and its marker values."""
    if spec.python is None:
        return this_python(), this_environment()
    if os.sep in spec.python:
        path = os.path.abspath(os.path.expanduser(spec.python))
    elif f"{this_python().version}.".startswith(f"{spec.python}."):
        return this_python(), this_environment()  # uv might find another interpreter of the same minor version
    else:
        arguments = ["python", "find", "--no-project", "--no-python-downloads", "--system", spec.python]
        try:
            path = run_uv(arguments, what=f"Finding the interpreter of --python {spec.python}").strip()
        except VenvBuildError as error:
            raise IncompatibleVenvError(
                f"uv finds no Python {spec.python} on {socket.gethostname()}; the driver is {this_python().version}. "
                "Omit --python to use the driver's Python, or install the other one, give its path after --python and "
                "start the driver with it."
            ) from error
    queried = query_python_cached(path)
    return queried.info, queried.markers


def _stable(markers: Mapping[str, str]) -> dict[str, str]:
    # The kernel's release and version differ between nodes, but packages do not depend on them in practice.
    return {key: value for key, value in markers.items() if key not in ("platform_release", "platform_version")}


def check_extras(spec: Spec) -> None:
    """Check that the project of a spec has its extras, as far as `pyproject.toml` says so, without a call of uv.

    Raises:
        UnknownExtraError: one is missing. The message says how to add an extra of this package.
    """
    if not isinstance(spec, VenvSpec) or spec.script is not None or spec.package or spec.all_packages:
        return
    try:
        content = tomllib.loads((located(spec.project) / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # planning reports it
    project = content.get("project", {})
    known = sorted(canonicalize_name(name) for name in project.get("optional-dependencies", {}))
    unknown = [name for name in spec.extras if name not in known]
    if unknown and "optional-dependencies" not in project.get("dynamic", ()):
        raise _unknown_name(spec, "extra", unknown[0], known)


def _run_export(spec: VenvSpec, python: PythonInfo, store: Store, variables: Mapping[str, str]) -> str:
    directory, mode = located(spec.project), ["--frozen" if spec.frozen else "--locked"]
    target = ["--project", str(directory), *spec.selection()]
    if spec.script is not None:
        # Without a lock, uv takes the newest versions. The cached resolution keeps them until the script changes.
        script = located(spec.script)
        target, mode = ["--script", str(script)], mode if Path(f"{script}.lock").exists() else []
    arguments = ["export", *mode, *target, "--python", python.executable]
    arguments += ["--format", "pylock.toml", "--no-header", "--quiet"]
    with contextlib.suppress(OSError):  # a read-only store gets no log
        make_generated_directory(store.root)
    with BuildLog(store.new_log("resolve"), only_on_failure=True) as log:
        return run_uv(arguments, what=f"Resolving `{spec}`", cwd=directory, extra_env=variables, log=log)


def _export(
    spec: VenvSpec, python: PythonInfo, markers: Mapping[str, str], store: Store, variables: Mapping[str, str]
) -> list[Package]:
    try:
        text = _run_export(spec, python, store, variables)
    except LockMismatchError as error:
        if spec.script is not None:
            raise LockMismatchError(
                f"{spec.script}.lock does not match {spec.script}. Run `uv lock --script {shlex.quote(spec.script)}`."
            ) from error
        if "Unable to find lockfile" in str(error):
            raise LockMismatchError(
                f"The project {lock_root(spec.project)} has no uv.lock. Run `uv lock` there."
            ) from error
        raise
    except VenvBuildError as error:
        _raise_error_of_user(spec, error)
        if spec.frozen or spec.script is not None:
            raise
        try:
            _run_export(replace(spec, frozen=True), python, store, variables)
        except VenvBuildError:
            raise error from None
        # uv can read the lock. It tried to resolve again, which it does only if the lock does not match.
        raise LockMismatchError(
            f"uv.lock in {lock_root(spec.project)} does not match pyproject.toml, and uv cannot resolve pyproject.toml "
            f"either. Correct the requirements and run `uv lock`.\n{error}"
        ) from error
    directory = located(spec.project).resolve()  # paths in uv's output start at its working directory, without links
    return [
        package_from_lock(entry, directory)
        for entry in tomllib.loads(text).get("packages", [])
        if "marker" not in entry or parse_marker(entry["marker"]).evaluate(dict(markers))
    ]


def _raise_error_of_user(spec: VenvSpec, error: VenvBuildError) -> None:
    """Raise a clearer error if uv refuses the spec, and did not just fail."""
    if "No `pyproject.toml` found" in error.output_tail:
        raise VenvError(f"{spec.project} is not a uv project: it has no pyproject.toml.") from error
    if (conflict := _CONFLICT.search(error.output_tail)) is not None:
        raise VenvError(f"`{spec}` selects too much: {conflict[1]}. Give each a venv of its own.") from error
    match = _UNKNOWN_NAME.search(error.output_tail)
    if match is None:
        return
    kind, name = (match[1].lower(), match[2]) if match[1] else ("package", match[3])
    known = LockGraph.read(lock_root(spec.project), located(spec.project), all_packages=True).known_names(kind)
    raise _unknown_name(spec, kind, name, known) from error


def _unknown_name(spec: VenvSpec, kind: str, name: str, known: Sequence[str]) -> UnknownExtraError:
    fix = how_to_add(name) if kind == "extra" else ""
    return UnknownExtraError(
        f"The project {spec.project} has no {kind} {name!r}. {fix}Known {kind}s: {', '.join(known) or 'none'}."
    )
