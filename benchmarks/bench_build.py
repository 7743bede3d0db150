"""Building venvs: the engine of `nemo_rl.venvs` against bare `uv sync` of the same packages.

    uv run benchmarks/bench_build.py                    # ray[default] and a few others, about 60 packages
    uv run benchmarks/bench_build.py --set base         # the project's own BASE venv: torch with CUDA libraries, 5 GB
    uv run benchmarks/bench_build.py --cold 0           # without the builds from an empty cache, which download all

| case | ours | rival |
| --- | --- | --- |
| cold | empty cache: downloads, no bytecode | `uv sync --locked --no-compile-bytecode` |
| warm | all in uv's cache, no bytecode | the same |
| bytecode | compiled, and no venv to carry bytecode over from | `uv sync --locked --compile-bytecode` |
| second venv | bytecode, another venv of the store holds the same packages and one more | the same |
| no-op | the venv is there | the same, on its own finished venv |
| 8 classes | 8 worker classes that ask for the same packages | one `uv sync` per class |

Ours is measured in a fresh process, from the call to the return: resolving, installing, checking and sealing. The rival
is a whole `uv sync` process, which checks nothing. Every build gets a fresh directory on the file system of uv's cache.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

MEDIUM = ("ray[default]==2.60.0", "numpy", "pandas", "pyarrow")
ONE_MORE = "iniconfig"
NUM_CLASSES = 8
CALLER = Path(__file__).with_name("venv_caller.py")


@dataclass
class Workshop:
    """A scratch directory, and how to run both sides in it.

    Attributes:
        scratch: on the file system of uv's cache, so that both sides can hard-link.
        project, sibling: two projects whose venvs differ in one small package.
        caller: the interpreter that calls the engine. It holds nothing but what the engine imports, so that no bytecode
            is carried over from it.
    """

    scratch: Path
    project: Path
    sibling: Path
    caller: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def fresh(self, name: str) -> Path:
        """A path that is not there yet."""
        return self.scratch / f"{name}-{next(self._numbers)}"

    def ours(
        self,
        project: Path,
        store: Path,
        *,
        names: Sequence[str] = ("worker",),
        compiled: bool,
        cache: Path | None = None,
    ) -> dict[str, float]:
        """Make venvs ready with the engine."""
        asked = {"py_executable": f"uv run --locked --project {project}", "names": list(names)}
        environment = os.environ | {
            "PYTHONPATH": str(harness.REPOSITORY),
            "NEMO_RL_VENV_DIR": str(store),
            "NEMO_RL_COMPILE_BYTECODE": "1" if compiled else "0",
        }
        command = [str(self.caller), str(CALLER), json.dumps(asked)]
        answer = harness.run_json(command, env=environment | _cache(cache))
        phases = {f"  {name}": value for name, value in answer["phases"].items()}
        return {"seconds": answer["seconds"], "builds": answer["builds"]} | phases

    def rival(
        self, project: Path, targets: Sequence[Path], *, compiled: bool, cache: Path | None = None
    ) -> dict[str, float]:
        """Run `uv sync` once per target directory."""
        compiling = "--compile-bytecode" if compiled else "--no-compile-bytecode"
        command = [harness.uv(), "sync", "--locked", "--project", str(project), "--python", sys.executable, compiling]
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | _cache(cache)
        seconds = 0.0
        for target in targets:
            own = environment | {"UV_PROJECT_ENVIRONMENT": str(target)}
            seconds += harness.timed(functools.partial(harness.run, command, env=own))
        return {"seconds": seconds}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--set", choices=("medium", "base"), default="medium", help="which packages")
    parser.add_argument("--cold", type=int, default=1, metavar="N", help="rounds with an empty cache (default: 1)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="such as `warm no-op`; default: all of them")
    arguments = parser.parse_args()
    cache = Path(harness.run([harness.uv(), "cache", "dir"]).strip())
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_", dir=cache.parent) as directory:
        shop = _open_workshop(Path(directory), arguments.set)
        results = harness.Measurements()
        if arguments.cold:
            results.merge(harness.measure(_chosen(_cold_cases(shop), arguments.cases), arguments.cold))
        results.merge(harness.measure(_chosen(_warm_cases(shop), arguments.cases), arguments.repeats))
        packages = harness.run([harness.uv(), "export", "--frozen", "--project", str(shop.project), "--no-hashes"])
    count = sum("==" in line and not line.lstrip().startswith("#") for line in packages.splitlines())
    goals = {"warm": 1.1}
    pairs = [name.removesuffix(": ours") for name in results.rounds if name.endswith(": ours")]
    harness.report(
        "build" if arguments.set == "medium" else f"build_{arguments.set}",
        results,
        [Ratio("seconds", f"{name}: ours", f"{name}: uv sync", at_most=goals.get(name)) for name in pairs],
        arguments.json,
        title=f"Building venvs: {arguments.set}, {count} packages in the lock",
        notes=[
            "Ours resolves, builds, checks and seals; uv sync checks nothing. Indented rows are phases of ours.",
            "Cold rounds download everything, so the network is in them.",
        ],
        details={"set": arguments.set, "packages": list(MEDIUM) if arguments.set == "medium" else "the project's"},
    )


def _cold_cases(shop: Workshop) -> list[Case]:
    def ours() -> Metrics:
        with _removed(shop.fresh("store")) as store, _removed(shop.fresh("cache")) as cache:
            return shop.ours(shop.project, store, compiled=False, cache=cache)

    def rival() -> Metrics:
        with _removed(shop.fresh("venv")) as target, _removed(shop.fresh("cache")) as cache:
            return shop.rival(shop.project, [target], compiled=False, cache=cache)

    return _pair("cold", ours, rival)


def _warm_cases(shop: Workshop) -> list[Case]:
    names = [f"worker{index}" for index in range(NUM_CLASSES)]
    kept_store, kept_venv = shop.fresh("store"), shop.fresh("venv")
    donor_store = shop.fresh("store")
    shop.ours(shop.project, kept_store, compiled=False)
    shop.rival(shop.project, [kept_venv], compiled=False)
    shop.ours(shop.sibling, donor_store, compiled=True)

    def ours(compiled: bool, names: Sequence[str] = ("worker",)) -> Callable[[], Metrics]:
        def run() -> Metrics:
            with _removed(shop.fresh("store")) as store:
                return shop.ours(shop.project, store, compiled=compiled, names=names)

        return run

    def rival(compiled: bool, count: int = 1) -> Callable[[], Metrics]:
        def run() -> Metrics:
            with _removed(shop.fresh("venvs")) as parent:
                return shop.rival(shop.project, [parent / str(index) for index in range(count)], compiled=compiled)

        return run

    def second() -> Metrics:
        metrics = shop.ours(shop.project, donor_store, compiled=True)
        shutil.rmtree((donor_store / "worker").resolve())  # the next round builds it again beside the sibling's
        return metrics

    def no_op() -> Metrics:
        return shop.ours(shop.project, kept_store, compiled=False)

    def rival_no_op() -> Metrics:
        return shop.rival(shop.project, [kept_venv], compiled=False)

    return [
        *_pair("warm", ours(compiled=False), rival(compiled=False)),
        *_pair("bytecode", ours(compiled=True), rival(compiled=True)),
        *_pair("second venv", second, rival(compiled=True)),
        *_pair("no-op", no_op, rival_no_op),
        *_pair(f"{NUM_CLASSES} classes", ours(False, names), rival(False, NUM_CLASSES)),
    ]


def _chosen(cases: list[Case], names: Sequence[str] | None) -> list[Case]:
    return [case for case in cases if names is None or case.name.partition(":")[0] in names]


def _pair(name: str, ours: Callable[[], Metrics], rival: Callable[[], Metrics]) -> list[Case]:
    return [Case(f"{name}: ours", ours), Case(f"{name}: uv sync", rival)]


def _open_workshop(scratch: Path, which: str) -> Workshop:
    """Make the projects and the caller's venv, and fill uv's cache."""
    if which == "base":
        project = harness.REPOSITORY
        sibling = _sibling_of_base(scratch / "sibling")
    else:
        project = _project(scratch / "project", "bench-build", MEDIUM)
        sibling = _project(scratch / "sibling", "bench-build-sibling", (*MEDIUM, ONE_MORE))
    caller = scratch / "caller"
    harness.run([harness.uv(), "venv", "--quiet", "--no-project", "--python", sys.executable, str(caller)])
    python = caller / "bin" / "python"
    harness.run([harness.uv(), "pip", "install", "--quiet", "--python", str(python), "packaging"])
    shop = Workshop(scratch, project, sibling, python)
    with _removed(shop.fresh("venv")) as target:
        shop.rival(project, [target], compiled=False)
    return shop


def _project(directory: Path, name: str, dependencies: Sequence[str]) -> Path:
    directory.mkdir()
    version = ".".join(map(str, sys.version_info[:2]))
    lines = [
        f'[project]\nname = "{name}"\nversion = "0"\nrequires-python = "=={version}.*"',
        f"dependencies = {json.dumps(list(dependencies))}",
    ]
    (directory / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    harness.run([harness.uv(), "lock", "--project", str(directory), "--python", sys.executable])
    return directory


def _sibling_of_base(directory: Path) -> Path:
    """This project with one more package, locked to the same versions."""
    directory.mkdir()
    for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE"):
        shutil.copy2(harness.REPOSITORY / name, directory / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(harness.REPOSITORY / "nemo_rl", directory / "nemo_rl", ignore=ignore)
    text = (directory / "pyproject.toml").read_text(encoding="utf-8")
    (directory / "pyproject.toml").write_text(
        text.replace("\ndependencies = [", f'\ndependencies = [\n    "{ONE_MORE}",', 1), encoding="utf-8"
    )
    harness.run([harness.uv(), "lock", "--project", str(directory), "--python", sys.executable])
    return directory


class _removed:
    """A path that is removed, whatever is there, when the block ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *unused: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.sync()  # else the next case waits for the disk to forget this one


def _cache(cache: Path | None) -> dict[str, str]:
    return {} if cache is None else {"UV_CACHE_DIR": str(cache)}


if __name__ == "__main__":
    main()
