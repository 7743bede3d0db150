"""`uv.lock` as a graph: which version of a package a selection of extras and groups gets, and along which path.

`uv export` stays the authority for what is installed (`resolve.py`); it does not say why. The lock does: it holds every
package's dependencies with markers. Where extras conflict, uv resolves them in forks and writes the extra into the
markers as `extra == 'extra-<length of the package name>-<package>-<extra>'` (`group-...` for dependency groups),
which is true when the selection has it.
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
    """Where a path starts: the project's own dependencies, one of its extras, or one of its groups."""

    kind: Literal["project", "extra", "group"]
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else "the project's dependencies"


@dataclass(frozen=True)
class LockedPackage:
    """One version of a package in a lock. `version` is empty where the package's own build decides it."""

    name: str
    version: str
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass(frozen=True)
class Selection:
    """What a venv asks of a project.

    Attributes:
        extras, groups: normalised names; groups with the default ones.
        markers: marker values of the venv's interpreter (PEP 508).
    """

    extras: frozenset[str]
    groups: frozenset[str]
    markers: Mapping[str, str]


@dataclass
class Walk:
    """What a selection reaches.

    Attributes:
        paths: per package, the shortest path from each origin that reaches it: the packages on the way, itself last.
        dependents: per package, the packages in this venv that depend on it directly, the project among them.
    """

    paths: dict[LockedPackage, dict[Origin, tuple[LockedPackage, ...]]] = field(default_factory=dict)
    dependents: dict[LockedPackage, set[LockedPackage]] = field(default_factory=dict)

    def find(self, name: str) -> LockedPackage | None:
        """The version of `name` that this selection gets."""
        wanted = canonicalize_name(name)
        return next((package for package in self.paths if package.name == wanted), None)


class LockGraph:
    """A parsed `uv.lock`, walked for the member of it that lives in one project directory."""

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
        """The lock in the directory `root`. Raises `LockMismatchError` when it cannot be read or lacks the project."""
        path = root / "uv.lock"
        try:
            return LockGraph(tomllib.loads(path.read_text(encoding="utf-8")), root, project)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LockMismatchError(f"{path} cannot be read: {error}. Run `uv lock`.") from None

    @property
    def extras(self) -> frozenset[str]:
        """Every extra of the project."""
        return frozenset(self._entries[self.project].get("optional-dependencies", {}))

    def versions(self, name: str) -> list[str]:
        """Every version of a package in the lock."""
        return [package.version for package in self._by_name.get(canonicalize_name(name), [])]

    def conflicts_of(self, selection: Selection) -> list[list[str]]:
        """The sets of conflicting extras and groups that an item of the selection belongs to, as `extra vllm`."""
        chosen = {f"extra {name}" for name in selection.extras} | {f"group {name}" for name in selection.groups}
        found = []
        for conflict in self._conflicts:
            items = [_conflict_item(item) for item in conflict if item.get("package") == self.project.name]
            if chosen & set(items):
                found.append(items)
        return found

    def asked_for(self, name: str, selection: Selection) -> list[str]:
        """What the project itself asks for in its metadata, as `numpy>=2.0`, as far as the selection has it."""
        metadata = self._entries[self.project].get("metadata", {})
        listed = [*metadata.get("requires-dist", [])]
        for group in sorted(selection.groups):
            listed += metadata.get("requires-dev", {}).get(group, [])
        # In metadata an extra is written plainly, as `extra == 'vllm'`.
        markers, wanted = _Markers(selection.markers, set(selection.extras)), canonicalize_name(name)
        return [
            _requirement(item)
            for item in listed
            if item["name"] == wanted and ("marker" not in item or markers.hold(item["marker"]))
        ]

    def overrides(self, name: str) -> list[str]:
        """What `tool.uv.override-dependencies` sets for a package, whatever others ask for."""
        return [_requirement(item) for item in self._overrides if item["name"] == canonicalize_name(name)]

    def walk(self, selection: Selection) -> Walk:
        """Everything that the selection reaches, from each of its origins, breadth first."""
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
            if "marker" in edge and not markers.hold(edge["marker"]):
                continue
            source = json.dumps(edge["source"]) if "source" in edge else None
            for package in self._by_name.get(edge["name"], []):
                # An edge names version and source only where the lock holds several.
                if edge.get("version", package.version) == package.version and source in (None, package.source):
                    yield package, tuple(edge.get("extra", ()))

    def _member(self, root: Path, project: Path) -> LockedPackage:
        for package, entry in self._entries.items():
            source = entry.get("source", {})
            place = source.get("editable") or source.get("virtual") or source.get("directory")
            if place is not None and (root / place).resolve() == project.resolve():
                return package
        raise LockMismatchError(f"{root / 'uv.lock'} does not hold the project {project}. Run `uv lock` there.")


class _Markers:
    """Markers of one selection, each evaluated once."""

    def __init__(self, values: Mapping[str, str], active: set[str]) -> None:
        self._values = dict(values)
        self._active = active
        self.hold = functools.cache(self._hold)

    def _hold(self, marker: str) -> bool:
        return Marker(_EXTRA_ATOM.sub(self._decide, marker)).evaluate(self._values)

    def _decide(self, atom: re.Match[str]) -> str:
        is_active = (atom[2] or atom[3] or "") in self._active
        return _TRUE if is_active == (atom[1] == "==") else _FALSE


def _encoded(kind: str, package: str, name: str) -> str:
    return f"{kind}-{len(package)}-{package}-{name}"


def _requirement(item: Mapping[str, Any]) -> str:
    return f"{item['name']}{item.get('specifier', '')}"


def _conflict_item(item: Mapping[str, str]) -> str:
    return f"extra {item['extra']}" if "extra" in item else f"group {item.get('group', '')}"
