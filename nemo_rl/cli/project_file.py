"""Edits a user's `pyproject.toml`: adds this package, its extras, and the settings that uv needs to lock them.

uv adds requirements itself (`uv add`). It has no command for conflicts, overrides and environments, which are edited
here with tomlkit. Both keep comments and formatting.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from nemo_rl.errors import ConfigError, VenvBuildError, VenvError
from nemo_rl.utils.names import suggest_or_list
from nemo_rl.venvs.planning.resolve import lock_root
from nemo_rl.venvs.stacks import CONFLICTS, ENVIRONMENTS, EXTRAS, OVERRIDES, PACKAGE, requirement
from nemo_rl.venvs.uv import run_uv

if TYPE_CHECKING:
    from tomlkit.items import Table

_ARCHIVES = (".whl", ".tar.gz", ".zip")
# The extra of an environment's package: `env-textarena = ["textarena"]`.
_ENVIRONMENT_PREFIX = "env-"
# Parts of uv's messages about an index that does not answer.
_UNREACHABLE = ("error sending request", "Failed to fetch", "dns error", "network was disabled", "Could not connect")


@dataclass(frozen=True)
class PackageSource:
    """Says where a project takes this package from.

    Attributes:
        requirement: a requirement, or the absolute path of a directory or archive.
        editable: whether the project imports a directory directly.
    """

    requirement: str
    editable: bool = False

    @staticmethod
    def parse(text: str) -> PackageSource:
        """Parse the path of a clone or wheel, a URL, or a requirement such as `nemo-rl>=0.2`. Raises `ConfigError`."""
        path = Path(text).expanduser()
        if path.exists():
            if path.is_dir() and not (path / "pyproject.toml").is_file():
                raise ConfigError(f"--nemo-rl {text}: the directory has no pyproject.toml; give the path of a clone")
            return PackageSource(str(path.resolve()), editable=path.is_dir())
        if "://" in text and " @ " not in text:
            return PackageSource(f"{PACKAGE} @ {text}")
        if "://" not in text and (os.sep in text or text.endswith(_ARCHIVES)):
            raise ConfigError(f"--nemo-rl {text}: there is no such file or directory")
        try:
            parsed = Requirement(text)
        except InvalidRequirement:
            parsed = None
        if parsed is None or canonicalize_name(parsed.name) != PACKAGE:
            raise ConfigError(
                f"--nemo-rl {text}: expected the path of a clone or a wheel, a URL, or a requirement such as "
                f"{PACKAGE}>=0.2"
            )
        return PackageSource(text)

    @staticmethod
    def installed() -> PackageSource:
        """Return where this package was installed from: a directory, an archive, a repository, or an index.

        The record of the installation (PEP 610, `direct_url.json`) says so. A source tree on `sys.path` has none.

        Raises:
            ConfigError: it was installed from a file that no longer exists.
        """
        try:
            distribution = metadata.distribution(PACKAGE)
        except metadata.PackageNotFoundError:
            return PackageSource(str(Path(__file__).resolve().parents[2]), editable=True)
        record = distribution.read_text("direct_url.json")
        if not record:
            return PackageSource(f"{PACKAGE}=={distribution.version}")
        origin = json.loads(record)
        url = origin["url"]
        if (vcs := origin.get("vcs_info")) is not None:
            directory = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
            return PackageSource(f"{PACKAGE} @ {vcs['vcs']}+{url}@{vcs['commit_id']}{directory}")
        if not url.startswith("file:"):
            return PackageSource(f"{PACKAGE} @ {url}")
        path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
        if not os.path.exists(path):
            raise ConfigError(
                f"{PACKAGE} was installed from {path}, which no longer exists; say where it is with --nemo-rl"
            )
        return PackageSource(path, editable=bool(origin.get("dir_info", {}).get("editable")))

    def add_to(self, project: Path) -> None:
        """Add this package to the project's dependencies, and its source to `tool.uv.sources`."""
        target = self.requirement
        if os.path.isabs(target) and Path(target).is_relative_to(project):  # moves with the project
            target = f"./{os.path.relpath(target, project)}"
        options = ["--no-workspace", *(["--editable"] if self.editable else [])]
        _uv_add(project, *options, target)


def check_extras_exist(extras: Iterable[str]) -> list[str]:
    """Return the normalised names without repetition. Raises `ConfigError` for one that this package does not have."""
    names: list[str] = list(dict.fromkeys(canonicalize_name(extra) for extra in extras))
    for name in names:
        if name not in EXTRAS:
            raise ConfigError(f"{PACKAGE} has no extra {name!r}{suggest_or_list(name, EXTRAS)}")
    return names


def add_extras(project: Path, extras: Sequence[str], source: PackageSource | None) -> list[str]:
    """Add extras of this package to a project's `pyproject.toml`, and the settings that uv needs to lock them.

    What the project has already stays as it is. Overrides and environments go to the root of a workspace, because uv
    reads them only there.

    Args:
        extras: names of this package's extras.
        source: where the project takes this package from, if it does not depend on it yet; None for
            `PackageSource.installed()`.

    Returns:
        One line per change.

    Raises:
        ConfigError: the file is no project, or its settings contradict those of an extra.
    """
    path = project / "pyproject.toml"
    document = _read(path)
    if "project" not in document:
        raise ConfigError(f"{path} has no [project]; change to a member of the workspace")
    name = canonicalize_name(str(document["project"].get("name", "")))
    if name == PACKAGE:
        raise ConfigError(f"{path} is {PACKAGE} itself; change to your project, or create one with `nemo-rl init`")
    present = document["project"].get("optional-dependencies", {})
    present = {canonicalize_name(extra): list(requirements) for extra, requirements in present.items()}
    missing = [extra for extra in extras if extra not in present]
    for extra in set(extras) & set(present):
        if not any(extra in parsed.extras for parsed in _parsed(present[extra]) if parsed.name == PACKAGE):
            raise ConfigError(
                f"{path} has an extra {extra!r} of its own, {present[extra]}; rename it, or add "
                f"{requirement(extra)!r} to it"
            )
    changes: list[str] = []
    with _edited(path) as uv:
        changes += _declare_conflicts(uv, {*present, *extras}, name)
    root = lock_root(str(project))
    with _edited(root / "pyproject.toml") as uv:
        changes += _override(uv, extras, root / "pyproject.toml")
        changes += _limit_environments(uv)
    if not any(parsed.name == PACKAGE for parsed in _parsed(document["project"].get("dependencies", []))):
        source = source or PackageSource.installed()
        source.add_to(project)
        changes.insert(0, f"dependency on {PACKAGE}: {source.requirement}")
    for extra in missing:
        _uv_add(project, "--optional", extra, requirement(extra))
        changes.append(f'extra {extra} = ["{requirement(extra)}"]')
    return changes


def add_environment_extra(project: Path, package: Requirement) -> tuple[str, list[str]]:
    """Add the package of an RL environment to a project's `pyproject.toml`, as an extra of its own.

    The extra conflicts with those of other environments and with those of this package that need a venv of their own,
    so uv may choose other versions for each.

    Returns:
        The extra, and one line per change.

    Raises:
        ConfigError: the file is no project.
        VenvBuildError: uv refuses the requirement.
    """
    changes = add_extras(project, (), None)
    path = project / "pyproject.toml"
    document = _read(path)["project"]
    extra = f"{_ENVIRONMENT_PREFIX}{canonicalize_name(package.name)}"
    extras = document.get("optional-dependencies", {})
    present: dict[str, Any] = {canonicalize_name(each): requirements for each, requirements in extras.items()}
    with _edited(path) as uv:
        changes += _declare_conflicts(uv, {*present, extra}, canonicalize_name(str(document["name"])))
    if str(package) not in [str(parsed) for parsed in _parsed(present.get(extra, []))]:
        _uv_add(project, "--optional", extra, str(package))
        changes.append(f'extra {extra} = ["{package}"]')
    return extra, changes


def lock(project: Path, *, retry: str) -> None:
    """Run `uv lock` in a project.

    Args:
        retry: what to do when the index can be reached again, for the error message.

    Raises:
        VenvError: the index cannot be reached; says how to continue.
        VenvBuildError: the requirements cannot be resolved.
    """
    try:
        run_uv(["lock", "--python", sys.executable], what=f"Locking {project}", cwd=project)
    except VenvBuildError as error:
        tail = error.output_tail
        if f"{PACKAGE} was not found" in tail:
            raise VenvError(
                f"the package index has no such version of {PACKAGE}, so uv.lock was not written. Give the path of a "
                f"clone or a wheel, or a URL, with --nemo-rl.\n{tail}"
            ) from error
        if any(sign in tail for sign in _UNREACHABLE):
            raise VenvError(
                "uv could not reach the package index, so uv.lock was not written. Check the network and the index "
                f"(UV_DEFAULT_INDEX, or [[tool.uv.index]] in pyproject.toml), then {retry}.\n{tail}"
            ) from error
        raise


@contextlib.contextmanager
def restored_on_failure(project: Path) -> Iterator[None]:
    """Restore `pyproject.toml` and `uv.lock` of a project and of its workspace if the block fails."""
    root = lock_root(str(project))
    paths = {directory / name for directory in (project, root) for name in ("pyproject.toml", "uv.lock")}
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is not None:
                path.write_bytes(content)
            else:
                path.unlink(missing_ok=True)
        raise


def _uv_add(project: Path, *arguments: str) -> None:
    # --frozen: the lock is written once, when all changes are made.
    run_uv(["add", "--frozen", *arguments], what=f"Adding {arguments[-1]} to {project / 'pyproject.toml'}", cwd=project)


def _read(path: Path) -> Any:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    try:
        return tomlkit.parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


@contextlib.contextmanager
def _edited(path: Path) -> Iterator[Table]:
    """Yield the table `tool.uv`, and write the file after the block if it has changed."""
    import tomlkit

    document = _read(path)
    before = tomlkit.dumps(document)
    tool = document.setdefault("tool", tomlkit.table(is_super_table=True))
    uv = tool.setdefault("uv", tomlkit.table())
    yield uv
    if not uv:
        del tool["uv"]
    after = tomlkit.dumps(document)
    if uv and after != before:
        path.write_text(after, encoding="utf-8")


def _declare_conflicts(uv: Table, extras: set[str], project: str) -> list[str]:
    """Declare the conflicts among the extras of a project in `tool.uv.conflicts`, in an existing set where one fits.

    Extras of environments conflict with all that need a venv of their own.
    """
    import tomlkit

    changes = []
    for stacks in CONFLICTS:
        conflict = (*stacks, *sorted(extra for extra in extras if extra.startswith(_ENVIRONMENT_PREFIX)))
        present = [extra for extra in conflict if extra in extras]
        declared = uv.get("conflicts", [])
        names = [{_extra_of(item, project) for item in items} for items in declared]
        if len(present) < 2 or any(set(present) <= each for each in names):
            continue
        if "conflicts" not in uv:
            uv["conflicts"] = tomlkit.array()
        fitting = next((index for index, each in enumerate(names) if each <= set(conflict)), None)
        if fitting is None:
            fitting = len(names)
            uv["conflicts"].append(tomlkit.array())
        items = uv["conflicts"][fitting]
        for extra in present:
            if extra not in {_extra_of(item, project) for item in items}:
                item = tomlkit.inline_table()
                item["extra"] = extra
                items.append(item)
        changes.append(f"conflicting extras: {', '.join(present)}")
    return changes


def _extra_of(item: Any, project: str) -> str | None:
    """Return the extra of this project that an entry of a conflict names; None if it names something else."""
    extra = item.get("extra")
    owner = canonicalize_name(item.get("package", project))
    return canonicalize_name(extra) if extra is not None and owner == project else None


def _override(uv: Table, extras: Sequence[str], path: Path) -> list[str]:
    """Add the overrides of extras to `tool.uv.override-dependencies`."""
    import tomlkit

    changes = []
    for extra in extras:
        for text in OVERRIDES.get(extra, ()):
            wanted = Requirement(text)
            others = [parsed for parsed in _parsed(uv.get("override-dependencies", [])) if parsed.name == wanted.name]
            if others and others != [wanted]:
                raise ConfigError(
                    f"{path}: tool.uv.override-dependencies has {', '.join(map(str, others))}, but the extra {extra} "
                    f"needs {text}"
                )
            if not others:
                if "override-dependencies" not in uv:
                    uv["override-dependencies"] = tomlkit.array()
                uv["override-dependencies"].append(text)
                changes.append(f"override {text}, for {extra}")
    return changes


def _limit_environments(uv: Table) -> list[str]:
    """Set `tool.uv.environments` if it is not set."""
    import tomlkit

    if "environments" in uv:
        return []
    uv["environments"] = tomlkit.array()
    uv["environments"].extend(ENVIRONMENTS)
    uv["environments"].multiline(True)
    return ["environments: Linux on x86_64 and aarch64"]


def _parsed(requirements: Iterable[Any]) -> list[Requirement]:
    """Parse requirements, with normalised names. Skips invalid ones, which uv reports."""
    parsed = []
    for text in requirements:
        with contextlib.suppress(InvalidRequirement):
            item = Requirement(str(text))
            item.name = canonicalize_name(item.name)
            parsed.append(item)
    return parsed
