"""Explain why a worker gets a version of a package, and why two workers get different versions.

The version comes from the plan, so it is exact. The reasons come from the lock (paths and dependents) and, if the venv
has been built, from the metadata of its packages (the requirement of each dependent).
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from nemo_rl.errors import VenvError
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.ensure import SealedVenv, find_sealed
from nemo_rl.venvs.interpreter import query_python_cached
from nemo_rl.venvs.planning.lock_graph import LockGraph, Selection
from nemo_rl.venvs.planning.markers import parse_requirement
from nemo_rl.venvs.planning.plan import Package, VenvPlan
from nemo_rl.venvs.planning.relocation import located
from nemo_rl.venvs.planning.resolve import python_of
from nemo_rl.venvs.planning.spec import InterpreterSpec, VenvSpec
from nemo_rl.venvs.storage.layout import Store

# Sources of a version.
LOCK, ADDED, INTERPRETER = "lock", "added", "interpreter"


@dataclass(frozen=True)
class Route:
    """Holds one path of dependencies from an origin, such as `extra vllm`, to the package in question."""

    origin: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        return " -> ".join((self.origin, *self.packages))


@dataclass(frozen=True)
class Demand:
    """Holds one requirement on the package in question.

    Attributes:
        by: the package or project that requires it.
        requirement: None if the metadata is unknown because the venv has not been built.
    """

    by: str
    requirement: str | None = None

    def __str__(self) -> str:
        return f"{self.by} ({self.requirement})" if self.requirement else self.by


@dataclass(frozen=True)
class Explanation:
    """Holds the version of a package that one worker gets, and the reasons.

    Attributes:
        worker: a worker's FQN or the name of a selection.
        spec: canonical py_executable.
        package: normalised name.
        version: None if the worker does not have the package; the location of a package without a version.
        source: `lock`, `added` (by `--with`, a runtime_env or a script) or `interpreter` (installed in the interpreter
            that the worker uses); None without a version.
        routes: the shortest path to the package from each origin: the project's dependencies, each extra, each group.
        demands: direct requirements: of packages of the venv, the project and its `tool.uv.override-dependencies`.
        replaced: version in the base venv that an added package overrides.
        selection: extras and groups of the spec, such as `extra vllm`.
        conflicts: declared sets of conflicting extras and groups that contain a part of the selection.
        locked_versions: every version in the lock; several if uv resolved conflicting extras separately.
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
    """Explain the version of one package in the plan of a worker's venv.

    Args:
        worker: the name of the worker, for the explanation.
        plan: plan of the worker's venv.
        package: name of a distribution, in any spelling.
        store: if it holds the venv, the explanation contains the requirement of each dependent.

    Raises:
        LockMismatchError: the lock cannot be read.
        VenvError: the interpreter of the spec does not start.

    Example::

        explanation = explain("my_package.MyWorker", plan("uv run --locked --extra vllm"), "numpy")
        print(explanation.version, *explanation.routes, *explanation.demands, sep="\\n")
    """
    name = canonicalize_name(package)
    if plan.base is not None:
        return _explain_additive(explain(worker, plan.base, name, store=store), plan, name)
    if isinstance(plan.spec, InterpreterSpec):
        return _explain_interpreter(worker, plan.spec, name)
    if plan.spec.script is not None:
        return _explain_additive(Explanation(worker, str(plan.spec), name, None), plan, name)
    return _explain_locked(worker, plan, plan.spec, name, find_sealed(plan.digest, store))


def difference(one: Explanation, other: Explanation) -> str | None:
    """Return one or more sentences on why two workers get different versions; None if the versions are equal."""
    if one.version == other.version:
        return None
    facts = [_why_absent(side, rival) for side, rival in ((one, other), (other, one)) if side.version is None]
    for side in (one, other):
        if side.source == ADDED:
            replaced = f" instead of {side.replaced} from its base venv" if side.replaced else ""
            facts.append(f"{side.worker} has {side.version} from a list of added requirements{replaced}")
        elif side.source == INTERPRETER:
            facts.append(
                f"{side.worker} uses the interpreter {side.spec}, which has {side.version} regardless of the lock"
            )
    if not facts:
        facts = _why_locked_apart(one, other)
    return "; ".join(facts) + "."


def _why_absent(side: Explanation, rival: Explanation) -> str:
    through = f", {rival.worker} gets {rival.version} through {rival.routes[-1]}" if rival.routes else ""
    if not side.spec.startswith("uv run"):
        return f"the interpreter {side.spec}, which {side.worker} uses, does not have {side.package}{through}"
    selected = " and ".join(["the project's dependencies", *side.selection])
    return f"no package that {side.worker} selects ({selected}) depends on {side.package}{through}"


def _why_locked_apart(one: Explanation, other: Explanation) -> list[str]:
    facts = []
    for side, rival in ((one, other), (other, one)):
        blocking = [str(demand) for demand in side.demands if _excludes(demand, rival.version)]
        if blocking:
            facts.append(f"{side.worker} cannot have {rival.version}: {' and '.join(blocking)} excludes it")
    if set(one.locked_versions) != set(other.locked_versions):
        facts.append("they use different locks")
    elif one.selection != other.selection:
        names = [", ".join(side.selection) or "no extra" for side in (one, other)]
        versions = " and ".join(one.locked_versions)
        facts.append(f"the lock holds {versions}: {one.worker} selects {names[0]} and {other.worker} {names[1]}")
        conflicts = sorted({" / ".join(items) for items in (*one.conflicts, *other.conflicts)})
        if conflicts:
            facts[-1] += f"; uv resolves them separately because {'; '.join(conflicts)} are declared as conflicting"
    else:
        facts.append("they use different Python versions or platforms, for which the lock holds different versions")
    return facts


def _excludes(demand: Demand, version: str | None) -> bool:
    if demand.requirement is None or version is None:
        return False
    try:
        return not parse_requirement(demand.requirement).specifier.contains(version, prereleases=True)
    except (InvalidRequirement, InvalidVersion):
        return False


def _explain_additive(base: Explanation, plan: VenvPlan, name: str) -> Explanation:
    added = _package(plan.packages, name)
    values = {**base.__dict__, "spec": str(plan.spec)}
    if added is None:
        return Explanation(**values)
    listed = [line for line in plan.spec.requirements if _names_package(line, name)]
    route = Route("added requirements", (_described(added),) if listed else ("...", _described(added)))
    values |= {
        "version": _version(added),
        "source": ADDED,
        "replaced": base.version,
        "routes": (route,),
        "demands": (),
    }
    return Explanation(**values)


def _explain_locked(worker: str, plan: VenvPlan, spec: VenvSpec, name: str, sealed: SealedVenv | None) -> Explanation:
    root = located(plan.lock_root or spec.project)
    graph = LockGraph.read(root, located(spec.project), package=spec.package, all_packages=spec.all_packages)
    _, markers = python_of(spec)
    extras = graph.extras if spec.all_extras else frozenset(spec.extras)
    default = _default_groups(graph.directory_of(graph.targets[0]) if len(graph.targets) == 1 else root)
    groups = frozenset(spec.groups) | (default if spec.default_groups else frozenset())
    selection = Selection(extras, groups, markers)
    walk = graph.walk(selection)
    selected = [f"extra {extra}" for extra in sorted(extras)] + [f"group {group}" for group in sorted(selection.groups)]
    package = _package(plan.packages, name)
    node = walk.find(name)
    installed = _distributions(sealed)
    demands = [Demand("tool.uv.override-dependencies", line) for line in graph.overrides(name)]
    for by in sorted(walk.dependents.get(node, ()), key=str) if node else ():
        if by in graph.targets:
            demands += [Demand(str(by), line) for line in graph.project_requirements(by, name, selection)]
        else:
            demands.append(Demand(str(by), _requirement_on(name, installed.get(by.name))))
    paths = walk.paths[node].items() if node and package else ()
    return Explanation(
        worker=worker,
        spec=str(spec),
        package=name,
        version=_version(package) if package else None,
        source=LOCK if package else None,
        routes=tuple(Route(str(origin), tuple(map(str, path))) for origin, path in paths),
        demands=tuple(sorted(demands, key=_strictness)) if package else (),
        selection=tuple(selected),
        conflicts=tuple(tuple(items) for items in graph.conflicts_of(selection)),
        locked_versions=tuple(graph.versions(name)),
    )


def _explain_interpreter(worker: str, spec: InterpreterSpec, name: str) -> Explanation:
    is_this_process = spec.path == sys.executable
    paths = [entry for entry in sys.path if entry] if is_this_process else query_python_cached(spec.path).site_paths
    installed: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=list(paths)):
        installed.setdefault(canonicalize_name(distribution.name or ""), distribution)
    held = installed.get(name)
    demands = []
    for other in installed.values():
        requirement = _requirement_on(name, other)
        if requirement is not None:
            demands.append(Demand(f"{canonicalize_name(other.name)} {other.version}", requirement))
    return Explanation(
        worker=worker,
        spec=str(spec),
        package=name,
        version=held.version if held else None,
        source=INTERPRETER if held else None,
        demands=tuple(sorted(sorted(demands, key=str), key=_strictness)) if held else (),
    )


def _strictness(demand: Demand) -> int:
    """Sort key: pins first, then upper bounds, then the rest."""
    requirement = demand.requirement or ""
    return 0 if "==" in requirement else 1 if "<" in requirement or "~=" in requirement else 2


def _default_groups(project: Path) -> frozenset[str]:
    path = project / "pyproject.toml"
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
    distributions = importlib.metadata.distributions(path=[str(site_packages_of(sealed.path))])
    return {canonicalize_name(distribution.name or ""): distribution for distribution in distributions}


def _requirement_on(name: str, distribution: importlib.metadata.Distribution | None) -> str | None:
    """Return the requirement on `name` in a distribution's metadata if its marker is true here, without the marker."""
    for line in (distribution.requires if distribution is not None else None) or ():
        try:
            requirement = parse_requirement(line)
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
        return canonicalize_name(parse_requirement(line).name) == name
    except InvalidRequirement:
        return False


def to_json(explanation: Explanation) -> dict[str, Any]:
    """Return the explanation as plain data."""
    plain = {key: value for key, value in explanation.__dict__.items() if key not in ("routes", "demands")}
    return {
        **plain,
        "routes": [{"origin": route.origin, "packages": list(route.packages)} for route in explanation.routes],
        "demands": [{"by": demand.by, "requirement": demand.requirement} for demand in explanation.demands],
    }
