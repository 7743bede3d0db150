"""Why a worker gets the version of a package that it gets, and why two workers differ.

What a venv holds is taken from its plan, so the answer is exact; why it holds that is taken from the lock (paths and
dependents) and, where the venv has been built, from the metadata of the packages inside (what each asks for).
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from nemo_rl.errors import VenvError
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.ensure import SealedVenv, find_sealed
from nemo_rl.venvs.interpreter import query_python_cached
from nemo_rl.venvs.lock_graph import LockGraph, Selection
from nemo_rl.venvs.planning.plan import Package, VenvPlan
from nemo_rl.venvs.planning.resolve import lock_root, python_of
from nemo_rl.venvs.planning.spec import InterpreterSpec, VenvSpec
from nemo_rl.venvs.storage.layout import Store

# Where a version comes from.
LOCK, ADDED, INTERPRETER = "lock", "added", "interpreter"


@dataclass(frozen=True)
class Route:
    """One way into the venv: an origin such as `extra vllm`, and the packages from there to the one asked for."""

    origin: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        return " -> ".join((self.origin, *self.packages))


@dataclass(frozen=True)
class Demand:
    """Who asks for the package in question, and for which versions.

    `requirement` is None for a package whose metadata is not at hand: the venv has not been built yet.
    """

    by: str
    requirement: str | None = None

    def __str__(self) -> str:
        return f"{self.by} ({self.requirement})" if self.requirement else self.by


@dataclass(frozen=True)
class Explanation:
    """Which version of a package one worker gets, and why.

    Attributes:
        worker: what the question was about: a worker's FQN or the name of a selection.
        spec: the canonical py_executable.
        package: normalised name.
        version: None when the worker does not have it; the location for packages that have no version.
        source: `lock`, `added` (laid over by `--with` or a runtime_env) or `interpreter` (installed in the interpreter
            that the worker runs with as it is); None without a version.
        routes: the shortest path from each extra, group and the project's own dependencies that leads to it.
        demands: who asks for it directly: packages of the venv, the project, its `tool.uv.override-dependencies`.
        replaced: the base venv's version that an added one covers up.
        selection: the extras and groups of the spec, as `extra vllm`.
        conflicts: declared sets of conflicting extras that the selection takes part in.
        locked_versions: every version in the lock; several where conflicting extras were resolved apart.
    """

    worker: str
    spec: str
    package: str
    version: str | None
    source: str | None = None
    routes: tuple[Route, ...] = ()
    demands: tuple[Demand, ...] = ()
    replaced: str | None = None
    selection: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, ...], ...] = ()
    locked_versions: tuple[str, ...] = ()


def explain(worker: str, plan: VenvPlan, package: str, *, store: Store | None = None) -> Explanation:
    """Explain one package of one plan.

    Args:
        worker: name to give to the answer.
        plan: of the worker's venv.
        package: any spelling of a distribution's name.
        store: where the venv is looked for. If it has been built, its metadata says what each dependent asks for.

    Raises:
        LockMismatchError: the lock cannot be read.
        VenvError: the interpreter of the spec does not start.
    """
    name = canonicalize_name(package)
    if plan.base is not None:
        below = explain(worker, plan.base, name, store=store)
        return _over(below, plan, name)
    if isinstance(plan.spec, InterpreterSpec):
        return _in_interpreter(worker, plan.spec, name)
    return _in_lock(worker, plan, plan.spec, name, find_sealed(plan.digest, store))


def difference(one: Explanation, other: Explanation) -> str | None:
    """One sentence or more about why two workers differ in a package; None when they have the same version."""
    if one.version == other.version:
        return None
    facts = [_why_absent(side, rival) for side, rival in ((one, other), (other, one)) if side.version is None]
    for side in (one, other):
        if side.source == ADDED:
            covered = f", which covers {side.replaced} of the venv below" if side.replaced else ""
            facts.append(f"{side.worker} has {side.version} laid over its venv by a list of requirements{covered}")
        elif side.source == INTERPRETER:
            facts.append(
                f"{side.worker} runs in {side.spec} as it is, which has {side.version}, whatever the lock says"
            )
    if not facts:
        facts = _why_locked_apart(one, other)
    return "; ".join(facts) + "."


def _why_absent(side: Explanation, rival: Explanation) -> str:
    through = f", {rival.worker} gets {rival.version} through {rival.routes[-1]}" if rival.routes else ""
    if not side.spec.startswith("uv run"):
        return f"{side.spec}, which {side.worker} runs in as it is, does not have {side.package}{through}"
    chosen = " and ".join(["the project's dependencies", *side.selection])
    return f"nothing that {side.worker} asks for ({chosen}) depends on {side.package}{through}"


def _why_locked_apart(one: Explanation, other: Explanation) -> list[str]:
    facts = []
    for side, rival in ((one, other), (other, one)):
        blocking = [str(demand) for demand in side.demands if _excludes(demand, rival.version)]
        if blocking:
            facts.append(f"{side.worker} cannot have {rival.version}: {' and '.join(blocking)} asks for another")
    if set(one.locked_versions) != set(other.locked_versions):
        facts.append("they take their packages from different locks")
    elif one.selection != other.selection:
        names = [", ".join(side.selection) or "no extra" for side in (one, other)]
        versions = " and ".join(one.locked_versions)
        facts.append(f"the lock holds {versions}: {one.worker} has {names[0]} and {other.worker} {names[1]}")
        conflicts = sorted({" / ".join(items) for items in (*one.conflicts, *other.conflicts)})
        if conflicts:
            facts[-1] += f", which are resolved apart because {'; '.join(conflicts)} are declared as conflicting"
    else:
        facts.append("they run different Python versions or platforms, for which the lock holds different versions")
    return facts


def _excludes(demand: Demand, version: str | None) -> bool:
    if demand.requirement is None or version is None:
        return False
    try:
        return not Requirement(demand.requirement).specifier.contains(version, prereleases=True)
    except (InvalidRequirement, InvalidVersion):
        return False


def _over(below: Explanation, plan: VenvPlan, name: str) -> Explanation:
    """The explanation of an additive venv, from that of its base."""
    added = _package(plan.packages, name)
    values = {**below.__dict__, "spec": str(plan.spec)}
    if added is None:
        return Explanation(**values)
    listed = [line for line in plan.spec.requirements if _names_package(line, name)]
    route = Route("added requirements", (_described(added),) if listed else ("...", _described(added)))
    values |= {
        "version": _version(added),
        "source": ADDED,
        "replaced": below.version,
        "routes": (route,),
        "demands": (),
    }
    return Explanation(**values)


def _in_lock(worker: str, plan: VenvPlan, spec: VenvSpec, name: str, sealed: SealedVenv | None) -> Explanation:
    root = lock_root(spec.project)
    graph = LockGraph.read(root, Path(spec.project))
    _, markers = python_of(spec)
    extras = graph.extras if spec.all_extras else frozenset(spec.extras)
    selection = Selection(extras, frozenset(spec.groups) | _default_groups(spec), markers)
    walk = graph.walk(selection)
    chosen = [f"extra {extra}" for extra in sorted(extras)] + [f"group {group}" for group in sorted(selection.groups)]
    held = _package(plan.packages, name)
    node = walk.find(name)
    installed = _distributions(sealed)
    demands = [Demand(f"tool.uv.override-dependencies of {graph.project.name}", line) for line in graph.overrides(name)]
    for by in sorted(walk.dependents.get(node, ()), key=str) if node else ():
        if by == graph.project:
            demands += [Demand(str(by), line) for line in graph.asked_for(name, selection)]
        else:
            demands.append(Demand(str(by), _asks_for(installed.get(by.name), name)))
    return Explanation(
        worker=worker,
        spec=str(spec),
        package=name,
        version=_version(held) if held else None,
        source=LOCK if held else None,
        routes=tuple(Route(str(o), tuple(map(str, p))) for o, p in walk.paths[node].items()) if node and held else (),
        demands=tuple(sorted(demands, key=_limits_least)) if held else (),
        selection=tuple(chosen),
        conflicts=tuple(tuple(items) for items in graph.conflicts_of(selection)),
        locked_versions=tuple(graph.versions(name)),
    )


def _in_interpreter(worker: str, spec: InterpreterSpec, name: str) -> Explanation:
    is_own = spec.path == sys.executable
    paths = [entry for entry in sys.path if entry] if is_own else query_python_cached(spec.path).site_paths
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=list(paths)):
        installed.setdefault(canonicalize_name(distribution.name or ""), distribution)
    held = installed.get(name)
    demands = []
    for other in installed.values():
        requirement = _asks_for(other, name)
        if requirement is not None:
            demands.append(Demand(f"{canonicalize_name(other.name)} {other.version}", requirement))
    return Explanation(
        worker=worker,
        spec=str(spec),
        package=name,
        version=held.version if held else None,
        source=INTERPRETER if held else None,
        demands=tuple(sorted(sorted(demands, key=str), key=_limits_least)) if held else (),
    )


def _limits_least(demand: Demand) -> int:
    """Sorts demands: pins first, then upper bounds, then the rest."""
    requirement = demand.requirement or ""
    return 0 if "==" in requirement else 1 if "<" in requirement or "~=" in requirement else 2


def _default_groups(spec: VenvSpec) -> frozenset[str]:
    if not spec.default_groups:
        return frozenset()
    path = Path(spec.project) / "pyproject.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VenvError(f"{path} cannot be read: {error}") from None
    groups = {canonicalize_name(group) for group in content.get("dependency-groups", {})}
    default = content.get("tool", {}).get("uv", {}).get("default-groups", ["dev"])
    return frozenset(groups if default == "all" else groups & {canonicalize_name(group) for group in default})


def _distributions(sealed: SealedVenv | None) -> Mapping[str, importlib.metadata.Distribution]:
    if sealed is None:
        return {}
    found = importlib.metadata.distributions(path=[str(site_packages_of(sealed.path))])
    return {canonicalize_name(distribution.name or ""): distribution for distribution in found}


def _asks_for(distribution: importlib.metadata.Distribution | None, name: str) -> str | None:
    """The requirement on `name` in a distribution's metadata whose marker holds here, without its marker."""
    for line in (distribution.requires if distribution is not None else None) or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) == name and holds:
            return f"{requirement.name}{requirement.specifier}"
    return None


def _package(packages: Iterable[Package], name: str) -> Package | None:
    return next((package for package in packages if canonicalize_name(package.name) == name), None)


def _version(package: Package) -> str:
    return package.version or package.location or (package.local.path if package.local else "")


def _described(package: Package) -> str:
    return f"{package.name} {_version(package)}"


def _names_package(line: str, name: str) -> bool:
    try:
        return canonicalize_name(Requirement(line).name) == name
    except InvalidRequirement:
        return False


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as plain data."""
    plain = {key: value for key, value in explanation.__dict__.items() if key not in ("routes", "demands")}
    return {
        **plain,
        "routes": [{"origin": route.origin, "packages": list(route.packages)} for route in explanation.routes],
        "demands": [{"by": demand.by, "requirement": demand.requirement} for demand in explanation.demands],
    }
