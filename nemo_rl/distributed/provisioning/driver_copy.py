"""Compare the code that the driver imports with the code that workers will import from a project's local packages.

A driver that was started outside the project's venv, such as with the Python of an image, may import another copy of a
package than its workers: a stale installation, or another clone. The job would then run code that nobody edited.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from nemo_rl.errors import ConfigError
from nemo_rl.venvs import VenvPlan
from nemo_rl.venvs.planning.plan import Package
from nemo_rl.venvs.planning.relocation import located


def check_driver_copies(plans: Mapping[str, VenvPlan]) -> None:
    """Check that the driver and the workers import the same code of every local package.

    A package that the driver cannot import is not compared; nor is one whose modules are in neither `src/` nor the
    project's directory. Copies with equal Python files are equal.

    Args:
        plans: name -> plan of each venv.

    Raises:
        ConfigError: two copies differ; names both paths and the first file that differs.
    """
    packages: dict[Package, str] = {}
    for name, top in plans.items():
        for venv_plan in (top, top.base):
            for package in venv_plan.packages if venv_plan is not None else ():
                if package.local is not None:
                    packages.setdefault(package, name)
    for package, venv in packages.items():
        _check(package, venv)


def _check(package: Package, venv: str) -> None:
    assert package.local is not None
    project, module = located(package.local.path), package.name.replace("-", "_")
    workers_copy = next((path for path in _candidates(project, module) if path.exists()), None)
    drivers_copy = _driver_copy(module)
    if workers_copy is None or drivers_copy is None or drivers_copy.samefile(workers_copy):
        return
    difference = _first_difference(drivers_copy, workers_copy)
    if difference is not None:
        raise ConfigError(
            f"the driver imports {module} from {drivers_copy}, but the workers of {venv} would import it from "
            f"{workers_copy}, and {difference} differs. Start the driver with the project's venv (`uv run` in "
            f"{project}), or set NEMO_RL_PROJECT_ROOT to the project of the driver's copy"
        )


def _candidates(project: Path, module: str) -> list[Path]:
    return [project / "src" / module, project / module, project / "src" / f"{module}.py", project / f"{module}.py"]


def _driver_copy(module: str) -> Path | None:
    """Return the package directory or the file that the driver imports; None without one, or for a namespace."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _first_difference(one: Path, other: Path) -> str | None:
    """Return the name of the first Python file that differs or exists in one copy only; None if there is none."""
    if one.is_file() or other.is_file():
        return None if one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes() else one.name
    files = {path.relative_to(root) for root in (one, other) for path in root.rglob("*.py")}
    for name in sorted(files):
        paths = (one / name, other / name)
        if not all(path.is_file() for path in paths) or paths[0].read_bytes() != paths[1].read_bytes():
            return str(name)
    return None
