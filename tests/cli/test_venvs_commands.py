"""Runs `nemo-rl venvs` as real processes on small real projects."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.append(str(Path(__file__).parent.parent / "venvs"))
from sample_projects import make_wheel, uv

OLD, NEW, SYSTEM = "demo.workers.OldWorker", "demo.workers.NewWorker", "demo.workers.SystemWorker"
# A build backend that writes its pid to a file and then builds for a minute.
SLOW_BACKEND = """
import os, time
def build_wheel(directory, settings=None, metadata=None):
    with open({marker!r}, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
build_editable = build_wheel
"""


@dataclass
class Cli:
    """Runs `nemo-rl` for one project with a separate venv directory."""

    root: Path
    venvs: Path
    site: Path
    env: dict[str, str]

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env={**self.env, **env}, capture_output=True, text=True, timeout=400, check=False
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "nemo_rl.cli", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def json(self, *arguments: str, code: int = 0) -> Any:
        done = self(*arguments, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def builds(self) -> list[Path]:
        """Return the venv directories in the store, complete or not."""
        store = self.venvs / ".store"
        return (
            [entry for entry in store.iterdir() if entry.is_dir() and len(entry.name) == 25] if store.exists() else []
        )


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Make a project whose extras `old` and `new` conflict over alpha, and a distribution that registers workers."""
    wheels, root, site = tmp_path / "wheels", tmp_path / "project", tmp_path / "site"
    make_wheel(wheels, "alpha", "1.0")
    make_wheel(wheels, "alpha", "2.0")
    make_wheel(wheels, "tool", "3.1", requires=("alpha<2",))
    root.mkdir()
    (root / "pyproject.toml").write_text(
        f"""
[project]
name = "project"
version = "0.1"
requires-python = ">=3.11"
dependencies = ["alpha"]
[project.optional-dependencies]
old = ["tool"]
new = ["alpha==2.0"]
slow = ["slow"]
[tool.uv]
package = false
default-groups = []
conflicts = [[{{ extra = "old" }}, {{ extra = "new" }}]]
no-index = true
find-links = ["{wheels}"]
sources = {{ slow = {{ path = "{tmp_path}/slow" }} }}
"""
    )
    _slow_package(tmp_path)
    uv("lock", "--offline", cwd=root)
    info = site / "demo-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nemo_rl.actor_environments]\ndemo = demo_venvs:WORKERS\n")
    run = f"uv run --locked --project {root} --extra"
    workers = {OLD: f"{run} old", NEW: f"{run} new", SYSTEM: sys.executable}
    (site / "demo_venvs.py").write_text(f"WORKERS = {workers!r}\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("NEMO_RL_", "NRL_", "UV_"))}
    repository = Path(__file__).resolve().parents[2]
    env |= {"NEMO_RL_VENV_DIR": str(tmp_path / "venvs"), "NEMO_RL_PROJECT_ROOT": str(root)}
    env |= {"PYTHONPATH": f"{site}:{repository}", "COLUMNS": "200"}
    return Cli(root, tmp_path / "venvs", site, env)


def _slow_package(folder: Path) -> None:
    package = folder / "slow"
    package.mkdir()
    (package / "pyproject.toml").write_text(
        '[project]\nname = "slow"\nversion = "1.0"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (package / "backend.py").write_text(SLOW_BACKEND.format(marker=str(folder / "slow_build_pid")))


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"timed out waiting until {what}")


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_help_imports_no_heavy_module() -> None:
    program = (
        "import sys; sys.argv = ['nemo-rl', '--help']\n"
        "from nemo_rl.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(repr({'ray', 'torch', 'pydantic', 'nemo_rl.venvs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "venvs" in done.stdout
    assert done.stderr == "set()"


def test_build_path_list_verify_and_prune(cli: Cli) -> None:
    assert cli("venvs", "path", OLD).returncode == 1
    built = cli.json("venvs", "build", OLD, NEW, "old")
    assert [record["name"] for record in built] == [OLD, NEW, "old"]
    # OLD and old have the same packages: the first builder builds the venv for both.
    assert (built[1]["state"], sorted({built[0]["state"], built[2]["state"]})) == ("built", ["built", "ready"])
    assert built[0]["digest"] == built[2]["digest"] != built[1]["digest"]
    assert set(built[1]["phases"]) >= {"fetch", "check"}
    for name, version in ((OLD, "1.0"), (NEW, "2.0")):
        python = cli("venvs", "path", name).stdout.strip()
        assert python == str(cli.venvs / name / "bin" / "python")
        code = "import alpha; print(alpha.VERSION)"
        assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout == f"{version}\n"

    listed = cli.json("venvs", "list")
    assert {tuple(venv["names"]): venv["sealed"] for venv in listed["venvs"]} == {(OLD, "old"): True, (NEW,): True}
    states = {worker["worker"]: worker["state"] for worker in listed["workers"]}
    assert (states[OLD], states[NEW], states[SYSTEM]) == ("ready", "ready", "interpreter")

    assert cli.json("venvs", "verify") == []
    assert cli.json("venvs", "prune")["removed"] == []
    (cli.venvs / NEW).unlink()
    assert cli.json("venvs", "prune", "--dry-run")["removed"] == [built[1]["digest"][:16]]
    assert cli.json("venvs", "prune")["removed"] == [built[1]["digest"][:16]]
    assert len(cli.builds()) == 1


def test_verify_finds_damage_and_force_repairs_it(cli: Cli) -> None:
    (built,) = cli.json("venvs", "build", "new")
    module = next((cli.venvs / "new").glob("lib/*/site-packages/alpha/__init__.py"))
    module.unlink()
    module.write_text("VERSION = 'altered'\n")
    done = cli("venvs", "verify", "new")
    assert done.returncode == 1
    assert "alpha/__init__.py" in done.stdout
    assert "nemo-rl venvs build --force new" in done.stderr
    (finding,) = cli.json("venvs", "verify", code=1)
    assert finding["venv"] == "new"
    (again,) = cli.json("venvs", "build", "--force", "new")
    assert (again["state"], again["digest"]) == ("built", built["digest"])
    assert cli("venvs", "verify").returncode == 0


def test_build_all_builds_every_registered_worker(cli: Cli) -> None:
    """The vllm and mcore workers of nemo_rl fail, because this project does not have their extras."""
    done = cli("venvs", "build", "--all", "--json")
    records = {record["name"]: record for record in json.loads(done.stdout)}
    assert (records[OLD]["state"], records[SYSTEM]["state"]) == ("built", "interpreter")
    # NewWorker and the torch workers of nemo_rl have the same packages: one of them builds the venv.
    same_venv = [record["state"] for record in records.values() if record["digest"] == records[NEW]["digest"]]
    assert len(same_venv) > 1
    assert sorted(same_venv) == ["built", *["ready"] * (len(same_venv) - 1)]
    vllm = records["nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker"]
    assert vllm["state"] == "failed"
    assert "has no extra 'vllm'" in vllm["error"]
    assert done.returncode == 2  # all failures are invalid input
    assert done.stderr.count("has no extra 'vllm'") == 1
    assert "Traceback" not in done.stderr


def test_build_selects_workers_by_name_or_extra(cli: Cli) -> None:
    by_extra = cli.json("venvs", "build", "--match", "MCORE", code=2)  # the project lacks the extra
    assert [record["name"].rpartition(".")[2] for record in by_extra] == ["MegatronPolicyWorker"]
    named = cli.json("venvs", "build", "--all", "--match", "demo", "--match", "System", "--exclude", "old")
    assert {record["name"] for record in named} == {NEW, SYSTEM}
    done = cli("venvs", "build", "--match", "sglang")
    assert done.returncode == 2
    assert "no worker is selected" in done.stderr


def test_wrappers_run_the_interpreters_of_workers(cli: Cli, tmp_path: Path) -> None:
    cli.json("venvs", "build", NEW)
    cli("venvs", "wrappers", str(tmp_path / "bin"))
    code = "import alpha, sys; print(alpha.VERSION, sys.argv[1])"
    wrapper = tmp_path / "bin" / f"python-{NEW.rpartition('.')[2]}"
    done = subprocess.run([wrapper, "-c", code, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "2.0 a b\n"


def test_build_shows_phases_on_standard_error(cli: Cli) -> None:
    done = cli("venvs", "build", "base")
    assert done.returncode == 0
    for phase in ("resolve", "fetch", "compile", "check", "seal"):
        assert f"base: {phase} " in done.stderr
    assert "base: built after" in done.stderr
    assert done.stdout.splitlines()[0].split() == ["venv", "state", "digest", "seconds", "python"]
    assert "\x1b" not in done.stdout + done.stderr


def test_build_shows_a_live_table_on_a_terminal(cli: Cli) -> None:
    controller, terminal = pty.openpty()
    command = cli.command("venvs", "build", "base")
    process = subprocess.Popen(command, env={**cli.env, "TERM": "xterm"}, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b"".join(_read_all(controller)).decode()
    assert process.wait(60) == 0, output
    assert "\x1b[" in output
    assert "compile" in output
    assert "built" in output


def _read_all(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        yield chunk
    os.close(descriptor)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_build_leaves_no_venv(cli: Cli, tmp_path: Path, how: signal.Signals) -> None:
    marker = tmp_path / "slow_build_pid"
    process = cli.start("venvs", "build", "slow", "new")
    pid = int(wait_for(lambda: marker.exists() and marker.read_text(), "the build begins"))
    backend = psutil.Process(pid)
    wait_for(lambda: (cli.venvs / "new").exists(), "the other venv is ready")
    process.send_signal(how)
    _, errors = process.communicate(timeout=400)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "interrupted" in errors
        assert "Traceback" not in errors
        # The command exits only after the clean-up.
        assert ended(backend)
        assert len(cli.builds()) == 1
    wait_for(lambda: ended(backend) and len(cli.builds()) == 1, "the build is removed")
    assert cli("venvs", "verify").returncode == 0
    assert not (cli.venvs / "slow").exists()


def test_bundle_prints_the_build_command(cli: Cli, tmp_path: Path) -> None:
    archive = str(tmp_path / "my bundle.tar.gz")
    done = cli("venvs", "bundle", "base", "new", "--output", archive)
    assert done.returncode == 0, done.stderr
    built = cli("venvs", "build", "--offline", "--from-bundle", archive, "base", "new")
    assert built.returncode == 0, built.stderr
    program, *words = shlex.split(done.stdout.rpartition("Build from it: ")[2])
    assert (program, cli(*words).returncode) == ("nemo-rl", 0)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_bundle_leaves_no_file(cli: Cli, tmp_path: Path, how: signal.Signals) -> None:
    marker, folder = tmp_path / "slow_build_pid", tmp_path / "bundles"
    process = cli.start("venvs", "bundle", "slow", "--output", str(folder / "bundle.tar.gz"))
    pid = int(wait_for(lambda: marker.exists() and marker.read_text(), "the build begins"))
    backend = psutil.Process(pid)
    assert list(folder.iterdir())
    process.send_signal(how)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(folder.iterdir())
    wait_for(lambda: ended(backend), "the build has ended")


def test_killed_builder_is_reported(cli: Cli, tmp_path: Path) -> None:
    marker = tmp_path / "slow_build_pid"
    process = cli.start("venvs", "build", "slow")
    wait_for(lambda: marker.exists() and marker.read_text(), "the build begins")
    (builder,) = psutil.Process(process.pid).children()
    builder.kill()
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "the venv 'slow' was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    (again,) = cli.json("venvs", "build", "new")  # leftovers do not block the next build
    assert again["state"] == "built"


def test_why_explains_version_and_difference(cli: Cli) -> None:
    cli("venvs", "build", OLD)
    done = cli("venvs", "why", OLD, "Alpha", "--and", NEW)
    assert done.returncode == 1  # they differ
    assert f"{OLD} gets alpha 1.0" in done.stdout
    assert "through extra old -> tool 3.1 -> alpha 1.0" in done.stdout
    assert f"{OLD} cannot have 2.0: tool 3.1 (alpha<2) excludes it" in done.stdout
    answer = cli.json("venvs", "why", OLD, "alpha")  # without --and, differences do not change the exit code
    others = {worker: other for other in answer["others"] for worker in other["workers"]}
    assert others[NEW]["explanation"]["version"] == "2.0"
    assert "declared as conflicting" in others[NEW]["difference"]
    assert "does not have alpha" in others[SYSTEM]["difference"]
    vllm = others["nemo_rl.models.generation.vllm.vllm_worker.VllmGenerationWorker"]
    assert vllm["explanation"] is None
    assert "cannot be resolved here" in vllm["difference"]


def test_why_with_equal_versions(cli: Cli) -> None:
    done = cli("venvs", "why", "base", "alpha", "--and", NEW)
    assert done.returncode == 0
    assert "same" in done.stdout


def test_why_missing_package_suggests_names(cli: Cli) -> None:
    done = cli("venvs", "why", OLD, "tols", "--and", NEW)
    assert done.returncode == 1
    assert "does not have tols. Did you mean tool?" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "build needs either worker classes and extras, or --all"),
        (["build", "--all", "old"], "but not both"),
        (["build", "odl"], "Did you mean old?"),
        (["build", "OldWorker"], f"use its full name: {OLD}"),
        (["path", "demo.workers.OldWorkr"], f"Nearest registered names: {OLD}"),
        (["why", "nothing.Here", "alpha"], "no py_executable is registered"),
        (["build", "old", "--jobs", "0"], "--jobs"),
        (["verify", "old"], "there is no venv 'old' on disk"),
        (["fly"], "No such command"),
    ],
)
def test_invalid_input_is_one_message_and_exit_code_2(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("venvs", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not cli.venvs.exists()


def test_lock_mismatch_is_exit_code_2(cli: Cli) -> None:
    text = (cli.root / "pyproject.toml").read_text()
    (cli.root / "pyproject.toml").write_text(
        text.replace('dependencies = ["alpha"]', 'dependencies = ["alpha", "tool"]')
    )
    done = cli("venvs", "path", "base")
    assert done.returncode == 2
    assert "uv lock" in done.stderr
    assert "Traceback" not in done.stderr


def test_traceback_variable(cli: Cli) -> None:
    done = cli("venvs", "build", "odl", NEMO_RL_TRACEBACK="1")
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_version(cli: Cli) -> None:
    from nemo_rl import __version__

    assert cli("--version").stdout == f"{__version__}\n"
