"""Compares starting workers of a worker group, with a warm venv, with starting plain Ray actors.

    uv run benchmarks/bench_worker_start.py
    uv run benchmarks/bench_worker_start.py --cases ours "ready venv" --repeats 5

Times are from the creation to the first result of the last worker. Every case runs in a separate process and Ray
session; the sessions of a round run one after another. `ours` includes checking the venv, reserving the bundles,
finding ports, and the attestation of every worker.

| case | Python of the worker |
| --- | --- |
| ours | `RayWorkerGroup`, in the session that `init_ray` starts |
| plain | a Ray actor in the driver's Python, for which Ray prestarts processes |
| ready venv | a Ray actor whose `py_executable` is the python of an existing venv with compiled bytecode |
| ready venv, our session | the same in the session that `init_ray` starts |
| ray uv | Ray's `runtime_env={"uv": ["packaging==23.2"]}`, from a driver's venv with pip, which Ray requires |
| uv run | `py_executable="uv run --locked --project P"`, with an existing `P/.venv` |
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
from harness import Case, Metrics, Ratio

CASES = ("ours", "plain", "ready venv", "ready venv, our session", "ray uv", "uv run")
SESSION = Path(__file__).with_name("worker_start_session.py")
WORKER = "import os\n\n\nclass Worker:\n    def pid(self):\n        return os.getpid()\n"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-start-") as scratch:
        bench = _Bench(Path(scratch))
        bench.run("ours")  # builds the venv and describes the worker class
        results = harness.measure([bench.case(name) for name in arguments.cases], repeats=arguments.repeats)
    ratios = [
        Ratio(metric, "ours", baseline, at_most=1.15 if baseline == "ready venv" and metric == "8 workers" else None)
        for metric in ("first", "second", "8 workers")
        for baseline in arguments.cases
        if baseline != "ours" and "ours" in arguments.cases
    ]
    harness.report(
        "worker_start", results, ratios, arguments.json, title="seconds from creation to the last worker's first result"
    )


class _Bench:
    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._project = scratch / "project"
        self._sources = scratch / "sources"
        self._environment = {
            **os.environ,
            "NEMO_RL_VENV_DIR": str(scratch / "venvs"),
            "NEMO_RL_CACHE_DIR": str(scratch / "cache"),
        }
        self._sources.mkdir()
        (self._sources / "bench_start_workers.py").write_text(WORKER, encoding="utf-8")
        self._project.mkdir()
        version = ".".join(map(str, sys.version_info[:2]))
        (self._project / "pyproject.toml").write_text(
            f'[project]\nname = "bench-start"\nversion = "0"\nrequires-python = "=={version}.*"\n'
            'dependencies = ["ray==2.60.0", "numpy"]\n[tool.uv]\ncompile-bytecode = true\n',
            encoding="utf-8",
        )
        for command in (["lock"], ["sync", "--quiet"]):
            subprocess.run(
                [harness.uv(), *command, "--project", str(self._project), "--python", sys.executable], check=True
            )

    def case(self, name: str) -> Case:
        return Case(name, lambda: self.run(name))

    def run(self, name: str) -> Metrics:
        python = self._project / ".venv" / "bin" / "python"
        driver = self._driver_with_pip() if name == "ray uv" else sys.executable
        command = [driver, str(SESSION), name, str(python), str(self._project), str(self._sources)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def _driver_with_pip(self) -> str:
        """Create a driver's venv with pip. Ray clones it and installs uv with pip, which venvs of uv do not have."""
        venv = self._scratch / "with-pip"
        if not venv.exists():
            python = str(venv / "bin" / "python")
            packages = [f"ray[default]=={importlib.metadata.version('ray')}"]
            for command in (
                ["venv", "--quiet", "--seed", "--python", sys.executable, str(venv)],
                ["pip", "install", "--quiet", "--compile-bytecode", "--python", python, *packages],
            ):
                subprocess.run([harness.uv(), *command], check=True)
        return str(venv / "bin" / "python")


if __name__ == "__main__":
    main()
