"""Read `uv.lock` as a graph: which version of a package a selection of extras and groups gets, and along which path.

`uv export` decides what is installed (`resolve.py`), but not why. The lock holds the reasons: every package's
dependencies with markers. uv resolves conflicting extras in forks and writes the extra into the markers as
`extra == 'extra-<length of the package name>-<package>-<extra>'` (`group-...` for dependency groups). Such a marker is
true if the selection contains the extra.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from packaging.utils import canonicalize_name

from nemo_rl.errors import LockMismatchError
from nemo_rl.venvs.planning.markers import parse_marker

_EXTRA_ATOM = re.compile(r"""extra\s*(==|!=)\s*(?:'([^']*)'|"([^"]*)")""")
# The keys of `source` in a lock that hold the directory of a local package.
_LOCAL_SOURCES = ("editable", "virtual", "directory")
_PACKAGE_TABLE = "[[package]]"
_OTHER_TABLES = re.compile(r"^\s*\[\[(?!package\]\])", re.M)
_TRUE, _FALSE = "python_version != '0'", "python_version == '0'"


@dataclass(frozen=True)
class Origin:
    """Names the start of a path: a project's dependencies, one of its extras or one of its groups.

    `member` is the project's name if the selection contains several members of a workspace.
    """

    kind: Literal["project", "extra", "group"]
    name: str = ""
    member: str = ""

    def __str__(self) -> str:
        if not self.name:
            return f"the dependencies of {self.member}" if self.member else "the project's dependencies"
        return f"{self.kind} {self.name}" + (f" of {self.member}" if self.member else "")


@dataclass(frozen=True)
class LockedPackage:
    """Identifies one version of a package in a lock. `version` is empty if the package's build decides it."""

    name: str
    version: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Selection:
    """Selects packages of a project.

    Attributes:
        extras, groups: normalised names; the groups include the default groups.
        markers: marker values of the venv's interpreter (PEP 508).
    """

    extras: frozenset[str]
    groups: frozenset[str]
    markers: Mapping[str, str]


@dataclass
class Walk:
    """Holds the packages that a selection reaches.

    Attributes:
        paths: package -> origin -> the shortest path from the origin to the package, which is its last element.
        dependents: package -> the packages of this venv that depend on it directly; may include the project.
    """

    paths: dict[LockedPackage, dict[Origin, tuple[LockedPackage, ...]]] = field(default_factory=dict)
    dependents: dict[LockedPackage, set[LockedPackage]] = field(default_factory=dict)

    def find(self, name: str) -> LockedPackage | None:
        """Return the version of `name` that this selection gets; None if it does not get the package."""
        normalized = canonicalize_name(name)
        return next((package for package in self.paths if package.name == normalized), None)


class LockGraph:
    """Searches a parsed `uv.lock` from the projects that a spec installs.

    Args:
        content: the parsed lock.
        root: directory of the lock.
        project: the project's directory, or a directory in it.
        package: name of the workspace member to install; None for the project.
        all_packages: install all members.

    Attributes:
        targets: the projects to install: `package`, all members, or the project. A workspace root that is no project
            itself stands for all members.
    """

    def __init__(
        self, content: Mapping[str, Any], root: Path, project: Path, package: str | None, all_packages: bool
    ) -> None:
        self._entries: dict[LockedPackage, Mapping[str, Any]] = {}
        self._by_name: dict[str, list[LockedPackage]] = {}
        for entry in content.get("package", []):
            locked = LockedPackage(entry["name"], entry.get("version", ""), json.dumps(entry.get("source", {})))
            self._entries[locked] = entry
            self._by_name.setdefault(locked.name, []).append(locked)
        self._root = root
        self._conflicts = content.get("conflicts", [])
        self._overrides = content.get("manifest", {}).get("overrides", [])
        names = content.get("manifest", {}).get("members")  # only in the lock of a workspace
        members = [
            locked
            for locked, entry in self._entries.items()
            if (locked.name in names if names is not None else self._directory(locked) == root.resolve())
        ]
        self.targets = tuple(members if all_packages else self._targets_of(members, project, package))

    @staticmethod
    def read(root: Path, project: Path, *, package: str | None = None, all_packages: bool = False) -> LockGraph:
        """Read the lock in the directory `root`.

        Raises:
            LockMismatchError: the lock cannot be read or does not contain the project.
        """
        path = root / "uv.lock"
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
            return LockGraph(content, root, project, package, all_packages)
        except LockMismatchError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LockMismatchError(f"{path} cannot be read: {error}. Run `uv lock`.") from None

    def _targets_of(self, members: list[LockedPackage], project: Path, package: str | None) -> list[LockedPackage]:
        if package is not None:
            targets = [member for member in members if member.name == package]
        else:
            directories = {self._directory(member): [member] for member in members}
            directories.setdefault(self._root.resolve(), members)
            around = (project.resolve(), *project.resolve().parents)
            targets = next((directories[path] for path in around if path in directories), [])
        if not targets:
            what = f"the package {package}" if package is not None else f"the project {project}"
            raise LockMismatchError(f"{self._root / 'uv.lock'} does not contain {what}. Run `uv lock` there.")
        return targets

    def _directory(self, package: LockedPackage) -> Path | None:
        location = _location(self._entries[package])
        return (self._root / location).resolve() if location is not None else None

    def directory_of(self, target: LockedPackage) -> Path:
        """Return the directory of one of `targets`."""
        directory = self._directory(target)
        assert directory is not None
        return directory

    @property
    def extras(self) -> frozenset[str]:
        """All extras of the targets."""
        return frozenset(name for target in self.targets for name in self._names(target, "extra"))

    def known_names(self, kind: str) -> list[str]:
        """Return the names of every `extra` or `group` of the targets, or of the targets themselves (`package`)."""
        if kind == "package":
            return sorted(target.name for target in self.targets)
        if len(self.targets) == 1:
            return sorted(self._names(self.targets[0], kind))
        return [f"{name} ({target.name})" for target in self.targets for name in sorted(self._names(target, kind))]

    def _names(self, target: LockedPackage, kind: str) -> set[str]:
        entry = self._entries[target]
        metadata = entry.get("metadata", {})  # alone lists the empty ones
        if kind == "extra":
            return {*entry.get("optional-dependencies", {}), *metadata.get("provides-extras", ())}
        return {*entry.get("dev-dependencies", {}), *metadata.get("requires-dev", {})}

    def versions(self, name: str) -> list[str]:
        """Return every version of a package in the lock."""
        return [package.version for package in self._by_name.get(canonicalize_name(name), [])]

    def conflicts_of(self, selection: Selection) -> list[list[str]]:
        """Return each declared set of conflicts (`extra vllm`) that contains a part of the selection."""
        names = {target.name for target in self.targets}
        selected = {f"package {name}" for name in names}
        selected |= {f"extra {name}" for name in selection.extras} | {f"group {name}" for name in selection.groups}
        conflicts = []
        for conflict in self._conflicts:
            items = [_conflict_item(item) for item in conflict]
            if selected & {text for text, item in zip(items, conflict) if item.get("package") in names}:
                conflicts.append(items)
        return conflicts

    def project_requirements(self, target: LockedPackage, name: str, selection: Selection) -> list[str]:
        """Return a target's requirements on a package, such as `numpy>=2.0`, that apply to the selection."""
        metadata = self._entries[target].get("metadata", {})
        requirements = [*metadata.get("requires-dist", [])]
        for group in sorted(selection.groups):
            requirements += metadata.get("requires-dev", {}).get(group, [])
        # Markers in metadata hold the name of the extra, as `extra == 'vllm'`.
        markers, normalized = _Markers(selection.markers, set(selection.extras)), canonicalize_name(name)
        return [
            _requirement(item)
            for item in requirements
            if item["name"] == normalized and ("marker" not in item or markers.is_true(item["marker"]))
        ]

    def overrides(self, name: str) -> list[str]:
        """Return the requirements on a package in `tool.uv.override-dependencies`, which replace all others."""
        return [_requirement(item) for item in self._overrides if item["name"] == canonicalize_name(name)]

    def walk(self, selection: Selection) -> Walk:
        """Search breadth first from each origin of the selection."""
        active = {f"project-{len(target.name)}-{target.name}" for target in self.targets}
        for target in self.targets:
            active |= {_encoded("extra", target.name, name) for name in selection.extras}
            active |= {_encoded("group", target.name, name) for name in selection.groups}
        markers, result = _Markers(selection.markers, active), Walk()
        for target in self.targets:
            entry, member = self._entries[target], target.name if len(self.targets) > 1 else ""
            origins = {Origin("project", member=member): entry.get("dependencies", [])}
            for name in sorted(selection.extras):
                origins[Origin("extra", name, member)] = entry.get("optional-dependencies", {}).get(name, [])
            for name in sorted(selection.groups):
                origins[Origin("group", name, member)] = entry.get("dev-dependencies", {}).get(name, [])
            for origin, dependencies in origins.items():
                self._walk_from(origin, target, dependencies, markers, result)
        return result

    def _walk_from(
        self, origin: Origin, project: LockedPackage, roots: Iterable[Any], markers: _Markers, result: Walk
    ) -> None:
        queue: deque[tuple[LockedPackage, tuple[str, ...], tuple[LockedPackage, ...]]] = deque()
        for target, extras in self._targets(roots, markers):
            result.dependents.setdefault(target, set()).add(project)
            queue.append((target, extras, (target,)))
        seen: set[tuple[LockedPackage, str]] = set()
        while queue:
            package, extras, path = queue.popleft()
            result.paths.setdefault(package, {}).setdefault(origin, path)
            entry = self._entries[package]
            for extra in ("", *extras):
                if (package, extra) in seen:
                    continue
                seen.add((package, extra))
                table = entry.get("optional-dependencies", {}) if extra else {"": entry.get("dependencies", [])}
                for target, target_extras in self._targets(table.get(extra, []), markers):
                    result.dependents.setdefault(target, set()).add(package)
                    queue.append((target, target_extras, (*path, target)))

    def _targets(self, edges: Iterable[Any], markers: _Markers) -> Iterator[tuple[LockedPackage, tuple[str, ...]]]:
        for edge in edges:
            if "marker" in edge and not markers.is_true(edge["marker"]):
                continue
            source = json.dumps(edge["source"]) if "source" in edge else None
            for package in self._by_name.get(edge["name"], []):
                # An edge names version and source only if the lock holds several versions.
                if edge.get("version", package.version) == package.version and source in (None, package.source):
                    yield package, tuple(edge.get("extra", ()))


def local_directories(root: Path) -> list[Path]:
    """Return the directories of the local packages in the lock in `root`: members and path dependencies."""
    locations = [_location(entry) for entry in _possibly_local((root / "uv.lock").read_text(encoding="utf-8"))]
    return [Path(os.path.normpath(root / location)) for location in locations if location is not None]


def _possibly_local(lock: str) -> list[dict[str, Any]]:
    """Return the packages of a lock except those whose text has no word that marks a local one.

    Parsing a complete lock takes as long as a call of uv.
    """
    texts = lock.split(_PACKAGE_TABLE)[1:]
    if texts and not _OTHER_TABLES.search(lock):  # as uv writes it
        with contextlib.suppress(tomllib.TOMLDecodeError):  # the name of the table is in a string, too
            return [
                entry
                for text in texts
                if any(word in text for word in _LOCAL_SOURCES)
                for entry in tomllib.loads(_PACKAGE_TABLE + text)["package"]
            ]
    entries: list[dict[str, Any]] = tomllib.loads(lock).get("package", [])
    return entries


def _location(entry: Mapping[str, Any]) -> str | None:
    """Return the directory of a local package as it is in the lock."""
    source = entry.get("source", {})
    return next((source[kind] for kind in _LOCAL_SOURCES if source.get(kind)), None)


class _Markers:
    """Evaluates markers for one selection, each marker once."""

    def __init__(self, values: Mapping[str, str], active: set[str]) -> None:
        self._values = dict(values)
        self._active = active
        self.is_true = functools.cache(self._evaluate)

    def _evaluate(self, marker: str) -> bool:
        return parse_marker(_EXTRA_ATOM.sub(self._replace_extra, marker)).evaluate(self._values)

    def _replace_extra(self, atom: re.Match[str]) -> str:
        is_active = (atom[2] or atom[3] or "") in self._active
        return _TRUE if is_active == (atom[1] == "==") else _FALSE


def _encoded(kind: str, package: str, name: str) -> str:
    return f"{kind}-{len(package)}-{package}-{name}"


def _requirement(item: Mapping[str, Any]) -> str:
    return f"{item['name']}{item.get('specifier', '')}"


def _conflict_item(item: Mapping[str, str]) -> str:
    kind = next((kind for kind in ("extra", "group") if kind in item), "package")
    return f"{kind} {item[kind]}"
