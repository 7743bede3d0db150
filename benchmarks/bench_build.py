"""Compares building venvs with `nemo_rl.venvs` and with plain `uv sync` of the same packages.

    uv run benchmarks/bench_build.py                    # ray[default] and a few others, about 60 packages
    uv run benchmarks/bench_build.py --set base         # the project's own BASE venv: torch with CUDA libraries, 5 GB
    uv run benchmarks/bench_build.py --cold 0           # skip the builds with an empty cache, which download everything

| case | ours | baseline |
| --- | --- | --- |
| cold | empty cache: downloads, no bytecode | `uv sync --locked --no-compile-bytecode` |
| warm | all packages in uv's cache, no bytecode | the same |
| bytecode | compiled; no other venv has the bytecode | `uv sync --locked --compile-bytecode` |
| second venv | bytecode; another venv of the store has the same packages and one more | the same |
| no-op | the venv exists | the same, with its existing venv |
| 8 classes | 8 worker classes that ask for the same packages | one `uv sync` per class |

Our side runs in a new process. Its time is from the call to the return, and includes resolving, installing, checking
and sealing. The baseline is a complete `uv sync` process, which checks nothing. Every build gets a new directory on the
file system of uv's cache.
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
class BuildBench:
    """Runs both sides in a scratch directory.

    Attributes:
        scratch: directory on the file system of uv's cache, so that both sides can hard-link.
        project, sibling: two projects whose venvs differ in one small package.
        caller: the interpreter that calls the engine. Its venv has only the packages that the engine imports, so the
            engine cannot copy bytecode from it.
    """

    scratch: Path
    project: Path
    sibling: Path
    caller: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def fresh(self, name: str) -> Path:
        """Return a new path."""
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
        """Build venvs with the engine."""
        request = {"py_executable": f"uv run --locked --project {project}", "names": list(names)}
        environment = os.environ | {
            "PYTHONPATH": str(harness.REPOSITORY),
            "NEMO_RL_VENV_DIR": str(store),
            "NEMO_RL_COMPILE_BYTECODE": "1" if compiled else "0",
        }
        command = [str(self.caller), str(CALLER), json.dumps(request)]
        answer = harness.run_json(command, env=environment | _cache(cache))
        phases = {f"  {name}": value for name, value in answer["phases"].items()}
        return {"seconds": answer["seconds"], "builds": answer["builds"]} | phases

    def baseline(
        self, project: Path, targets: Sequence[Path], *, compiled: bool, cache: Path | None = None
    ) -> dict[str, float]:
        """Run `uv sync` once per target directory."""
        compiling = "--compile-bytecode" if compiled else "--no-compile-bytecode"
        command = [harness.uv(), "sync", "--locked", "--project", str(project), "--python", sys.executable, compiling]
        environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | _cache(cache)
        seconds = 0.0
        for target in targets:
            with_target = environment | {"UV_PROJECT_ENVIRONMENT": str(target)}
            seconds += harness.timed(functools.partial(harness.run, command, env=with_target))
        return {"seconds": seconds}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--set", choices=("medium", "base"), default="medium", help="which packages")
    parser.add_argument("--cold", type=int, default=1, metavar="N", help="rounds with an empty cache (default: 1)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="such as `warm no-op`; default: all")
    arguments = parser.parse_args()
    cache = Path(harness.run([harness.uv(), "cache", "dir"]).strip())
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nemo_rl_bench_", dir=cache.parent) as directory:
        bench = _make_bench(Path(directory), arguments.set)
        results = harness.Measurements()
        if arguments.cold:
            results.merge(harness.measure(_chosen(_cold_cases(bench), arguments.cases), arguments.cold))
        results.merge(harness.measure(_chosen(_warm_cases(bench), arguments.cases), arguments.repeats))
        packages = harness.run([harness.uv(), "export", "--frozen", "--project", str(bench.project), "--no-hashes"])
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
            "Cold rounds download everything, so they include the network.",
        ],
        details={"set": arguments.set, "packages": list(MEDIUM) if arguments.set == "medium" else "the project's"},
    )


def _cold_cases(bench: BuildBench) -> list[Case]:
    def ours() -> Metrics:
        with _removed(bench.fresh("store")) as store, _removed(bench.fresh("cache")) as cache:
            return bench.ours(bench.project, store, compiled=False, cache=cache)

    def baseline() -> Metrics:
        with _removed(bench.fresh("venv")) as target, _removed(bench.fresh("cache")) as cache:
            return bench.baseline(bench.project, [target], compiled=False, cache=cache)

    return _pair("cold", ours, baseline)


def _warm_cases(bench: BuildBench) -> list[Case]:
    names = [f"worker{index}" for index in range(NUM_CLASSES)]
    existing_store, existing_venv = bench.fresh("store"), bench.fresh("venv")
    donor_store = bench.fresh("store")
    bench.ours(bench.project, existing_store, compiled=False)
    bench.baseline(bench.project, [existing_venv], compiled=False)
    bench.ours(bench.sibling, donor_store, compiled=True)

    def ours(compiled: bool, names: Sequence[str] = ("worker",)) -> Callable[[], Metrics]:
        def run() -> Metrics:
            with _removed(bench.fresh("store")) as store:
                return bench.ours(bench.project, store, compiled=compiled, names=names)

        return run

    def baseline(compiled: bool, count: int = 1) -> Callable[[], Metrics]:
        def run() -> Metrics:
            with _removed(bench.fresh("venvs")) as parent:
                return bench.baseline(bench.project, [parent / str(index) for index in range(count)], compiled=compiled)

        return run

    def second() -> Metrics:
        metrics = bench.ours(bench.project, donor_store, compiled=True)
        shutil.rmtree((donor_store / "worker").resolve())  # the next round builds it again
        return metrics

    def no_op() -> Metrics:
        return bench.ours(bench.project, existing_store, compiled=False)

    def baseline_no_op() -> Metrics:
        return bench.baseline(bench.project, [existing_venv], compiled=False)

    return [
        *_pair("warm", ours(compiled=False), baseline(compiled=False)),
        *_pair("bytecode", ours(compiled=True), baseline(compiled=True)),
        *_pair("second venv", second, baseline(compiled=True)),
        *_pair("no-op", no_op, baseline_no_op),
        *_pair(f"{NUM_CLASSES} classes", ours(False, names), baseline(False, NUM_CLASSES)),
    ]


def _chosen(cases: list[Case], names: Sequence[str] | None) -> list[Case]:
    return [case for case in cases if names is None or case.name.partition(":")[0] in names]


def _pair(name: str, ours: Callable[[], Metrics], baseline: Callable[[], Metrics]) -> list[Case]:
    return [Case(f"{name}: ours", ours), Case(f"{name}: uv sync", baseline)]


def _make_bench(scratch: Path, which: str) -> BuildBench:
    """Create the projects and the caller's venv, and fill uv's cache."""
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
    bench = BuildBench(scratch, project, sibling, python)
    with _removed(bench.fresh("venv")) as target:
        bench.baseline(project, [target], compiled=False)
    return bench


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
    """Copy this project with one more package, locked to the same versions."""
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
    """Removes a path when the block ends."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *unused: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        os.sync()  # otherwise the next case waits for the disk to finish these removals


def _cache(cache: Path | None) -> dict[str, str]:
    return {} if cache is None else {"UV_CACHE_DIR": str(cache)}


if __name__ == "__main__":
    main()
