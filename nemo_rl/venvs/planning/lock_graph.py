"""Read `uv.lock` as a graph: which version of a package a selection of extras and groups gets, and along which path.

`uv export` decides what is installed (`resolve.py`), but not why. The lock holds the reasons: every package's
dependencies with markers. uv resolves conflicting extras in forks and writes the extra into the markers as
`extra == 'extra-<length of the package name>-<package>-<extra>'` (`group-...` for dependency groups). Such a marker is
true if the selection contains the extra.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from nemo_rl.errors import LockMismatchError

_EXTRA_ATOM = re.compile(r"""extra\s*(==|!=)\s*(?:'([^']*)'|"([^"]*)")""")
_TRUE, _FALSE = "python_version != '0'", "python_version == '0'"


@dataclass(frozen=True)
class Origin:
    """Names the start of a path: the project's dependencies, one of its extras or one of its groups."""

    kind: Literal["project", "extra", "group"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else "the project's dependencies"


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
    """Searches a parsed `uv.lock` from one of its projects.

    Args:
        content: the parsed lock.
        root: directory of the lock.
        project: directory of a project that the lock contains.
    """

    def __init__(self, content: Mapping[str, Any], root: Path, project: Path) -> None:
        self._entries: dict[LockedPackage, Mapping[str, Any]] = {}
        self._by_name: dict[str, list[LockedPackage]] = {}
        for entry in content.get("package", []):
            package = LockedPackage(entry["name"], entry.get("version", ""), json.dumps(entry.get("source", {})))
            self._entries[package] = entry
            self._by_name.setdefault(package.name, []).append(package)
        self._conflicts = content.get("conflicts", [])
        self._overrides = content.get("manifest", {}).get("overrides", [])
        self.project = self._member(root, project)

    @staticmethod
    def read(root: Path, project: Path) -> LockGraph:
        """Read the lock in the directory `root`.

        Raises:
            LockMismatchError: the lock cannot be read or does not contain the project.
        """
        path = root / "uv.lock"
        try:
            return LockGraph(tomllib.loads(path.read_text(encoding="utf-8")), root, project)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LockMismatchError(f"{path} cannot be read: {error}. Run `uv lock`.") from None

    @property
    def extras(self) -> frozenset[str]:
        """All extras of the project."""
        return frozenset(self._entries[self.project].get("optional-dependencies", {}))

    def versions(self, name: str) -> list[str]:
        """Return every version of a package in the lock."""
        return [package.version for package in self._by_name.get(canonicalize_name(name), [])]

    def conflicts_of(self, selection: Selection) -> list[list[str]]:
        """Return each declared set of conflicting extras and groups (`extra vllm`) that contains a selected one."""
        selected = {f"extra {name}" for name in selection.extras} | {f"group {name}" for name in selection.groups}
        conflicts = []
        for conflict in self._conflicts:
            items = [_conflict_item(item) for item in conflict if item.get("package") == self.project.name]
            if selected & set(items):
                conflicts.append(items)
        return conflicts

    def project_requirements(self, name: str, selection: Selection) -> list[str]:
        """Return the project's requirements on a package, such as `numpy>=2.0`, that apply to the selection."""
        metadata = self._entries[self.project].get("metadata", {})
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
        active = {_encoded("extra", self.project.name, name) for name in selection.extras}
        active |= {_encoded("group", self.project.name, name) for name in selection.groups}
        markers = _Markers(selection.markers, active)
        entry, result = self._entries[self.project], Walk()
        self._walk_from(Origin("project"), entry.get("dependencies", []), markers, result)
        for name in sorted(selection.extras):
            dependencies = entry.get("optional-dependencies", {}).get(name, [])
            self._walk_from(Origin("extra", name), dependencies, markers, result)
        for name in sorted(selection.groups):
            dependencies = entry.get("dev-dependencies", {}).get(name, [])
            self._walk_from(Origin("group", name), dependencies, markers, result)
        return result

    def _walk_from(self, origin: Origin, roots: Iterable[Any], markers: _Markers, result: Walk) -> None:
        queue: deque[tuple[LockedPackage, tuple[str, ...], tuple[LockedPackage, ...]]] = deque()
        for target, extras in self._targets(roots, markers):
            result.dependents.setdefault(target, set()).add(self.project)
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

    def _member(self, root: Path, project: Path) -> LockedPackage:
        for package, entry in self._entries.items():
            source = entry.get("source", {})
            location = source.get("editable") or source.get("virtual") or source.get("directory")
            if location is not None and (root / location).resolve() == project.resolve():
                return package
        raise LockMismatchError(f"{root / 'uv.lock'} does not contain the project {project}. Run `uv lock` there.")


class _Markers:
    """Evaluates markers for one selection, each marker once."""

    def __init__(self, values: Mapping[str, str], active: set[str]) -> None:
        self._values = dict(values)
        self._active = active
        self.is_true = functools.cache(self._evaluate)

    def _evaluate(self, marker: str) -> bool:
        return Marker(_EXTRA_ATOM.sub(self._replace_extra, marker)).evaluate(self._values)

    def _replace_extra(self, atom: re.Match[str]) -> str:
        is_active = (atom[2] or atom[3] or "") in self._active
        return _TRUE if is_active == (atom[1] == "==") else _FALSE


def _encoded(kind: str, package: str, name: str) -> str:
    return f"{kind}-{len(package)}-{package}-{name}"


def _requirement(item: Mapping[str, Any]) -> str:
    return f"{item['name']}{item.get('specifier', '')}"


def _conflict_item(item: Mapping[str, str]) -> str:
    return f"extra {item['extra']}" if "extra" in item else f"group {item.get('group', '')}"
