"""Uses the wheel from projects outside this repository, as docs/use-from-your-project.md shows.

The first test uses the machine's uv cache and takes half a minute. The others start with an empty uv cache and home.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from foreign_project import REPOSITORY, Machine

RUN = """
import sys

from nemo_rl.distributed.virtual_cluster import RayVirtualCluster, init_ray
from nemo_rl.distributed.worker_groups import RayWorkerBuilder, RayWorkerGroup

if __name__ == "__main__":
    init_ray()
    with RayVirtualCluster([1], use_gpus=False, max_colocated_worker_groups=len(sys.argv) - 2) as cluster:
        for fqn in sys.argv[2:]:
            group = RayWorkerGroup(cluster, RayWorkerBuilder(fqn))
            print(*group.get_all_worker_results(group.run_all_workers_single_data("version", package=sys.argv[1])))
            group.shutdown()
"""
VERSION_WORKER = """
from importlib.metadata import version

class {name}:
    def version(self, package: str) -> str:
        return version(package)
"""


@pytest.mark.slow
def test_new_project_runs_a_worker(tmp_path: Path) -> None:
    # Compiling the bytecode of torch and Ray would take longer than everything else.
    machine = Machine.set_up(tmp_path, NEMO_RL_COMPILE_BYTECODE="0", RAY_ADDRESS="local")
    site = str(tmp_path / "site")
    machine.run(tmp_path, "uv", "pip", "install", "--quiet", "--no-deps", "--target", site, str(machine.wheel))
    command = (sys.executable, "-m", "nemo_rl.cli")
    machine.run(tmp_path, *command, "init", "my-project", "--no-extras", PYTHONPATH=site)
    project = tmp_path / "my-project"
    machine.run(project, *command, "add", "mcore", PYTHONPATH=site)
    content = tomllib.loads((project / "pyproject.toml").read_text())
    assert content["project"]["optional-dependencies"]["mcore"] == ["nemo-rl[mcore]"]
    assert content["tool"]["uv"]["sources"]["nemo-rl"] == {"path": str(machine.wheel)}
    assert machine.run(project, "uv", "run", "run.py") == "[3, 2]\n"
    where = machine.run(project, "uv", "run", "python", "-c", "import nemo_rl; print(nemo_rl.__file__)")
    assert Path(where).is_relative_to(project / ".venv")
    assert [path.name for path in (project / "venvs").iterdir() if path.is_symlink()] == [
        "my_project.distance_worker.DistanceWorker"
    ]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine with an empty home directory and an empty uv cache on the file system of the projects."""
    folder = tmp_path_factory.mktemp("machine")
    home = folder / "home"
    home.mkdir()
    return Machine.set_up(folder, HOME=str(home), UV_CACHE_DIR=str(home / "uv"), RAY_ADDRESS="local")


@pytest.fixture(scope="module")
def project(machine: Machine) -> Path:
    """The project of `nemo-rl init`, with two conflicting extras and an environment of its own."""
    wheel = str(machine.wheel)
    print(machine.run(machine.folder, "uvx", "--from", wheel, "nemo-rl", "init", "my-project"))
    directory = machine.folder / "my-project"
    pyproject = (directory / "pyproject.toml").read_text()
    pyproject = pyproject.replace(
        "[project.entry-points.",
        'old = ["wcwidth==0.2.13"]\nnew = ["wcwidth==0.2.14"]\n\n'
        '[project.entry-points."nemo_rl.environments"]\nexact = "my_project.exact_environment:ExactEnvironment"\n\n'
        "[project.entry-points.",
        1,
    )
    pyproject = pyproject.replace("conflicts = [", 'conflicts = [[{ extra = "old" }, { extra = "new" }], ')
    (directory / "pyproject.toml").write_text(pyproject)
    package = directory / "src" / "my_project"
    for extra in ("old", "new"):
        (package / f"{extra}_worker.py").write_text(VERSION_WORKER.format(name=extra.title()))
    (package / "exact_environment.py").write_text(ENVIRONMENT)
    with (package / "__init__.py").open("a") as file:
        file.write("for extra in ('old', 'new'):\n")
        file.write("    fqn = f'my_project.{extra}_worker.{extra.title()}'\n")
        file.write("    ACTOR_ENVIRONMENTS[fqn] = f'uv run --locked --extra {extra}'\n")
        file.write("import sys\n")
        file.write("ACTOR_ENVIRONMENTS['my_project.exact_environment.ExactEnvironment'] = sys.executable\n")
    (directory / "versions.py").write_text(RUN)
    machine.run(directory, "uv", "sync")
    return directory


ENVIRONMENT = """
import numpy as np
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

class ExactEnvironment(EnvironmentInterface):
    def step(self, completions, metadata):
        size = len(completions)
        correct = [text.strip() == str(record["ground_truth"]) for text, record in zip(completions, metadata)]
        rewards = np.array(correct, np.float32)
        return EnvironmentReturn(rewards, np.ones(size, bool), list(completions), ["ok"] * size, np.zeros(size))

    def global_post_process_and_metrics(self, result):
        return result, {"accuracy": float(result.rewards.mean())} if result.size else {}

    def shutdown(self):
        pass
"""


@pytest.mark.slow
def test_script_of_the_project_runs(machine: Machine, project: Path) -> None:
    assert machine.run(project, "uv", "run", "run.py") == "[3, 2]\n"
    nemo_rl = machine.run(project, "uv", "run", "python", "-c", "import nemo_rl; print(nemo_rl.__file__)")
    assert Path(nemo_rl).is_relative_to(project)
    assert not [line for line in (project / "uv.lock").read_text().splitlines() if str(REPOSITORY) in line]


@pytest.mark.slow
def test_tests_of_the_project_pass(machine: Machine, project: Path) -> None:
    assert "1 passed" in machine.run(project, "uv", "run", "--extra", "distance", "--group", "test", "pytest")


@pytest.mark.slow
def test_extras_may_conflict(machine: Machine, project: Path) -> None:
    workers = ("my_project.old_worker.Old", "my_project.new_worker.New")
    assert machine.run(project, "uv", "run", "versions.py", "wcwidth", *workers) == "0.2.13\n0.2.14\n"
    table = machine.run(project, "uv", "run", "nemo-rl", "venvs", "list")
    assert all(worker in table for worker in workers)


@pytest.mark.slow
def test_job_trains_with_the_environment_of_the_project(machine: Machine, project: Path) -> None:
    command = ["nemo-rl", "grpo", "--config", "configs/grpo.yaml", "env.name=exact", "grpo.max_num_steps=2"]
    command += ["grpo.num_prompts_per_step=16", "grpo.validation.max_num_problems=16", "logger.log_dir=results/run"]
    machine.run(project, "uv", "run", *command)
    records = [json.loads(line) for line in (project / "results/run/metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records if "train/loss" in record) == 2
    workers = json.loads((project / "results/run/attestation.json").read_text())
    assert "my_project.exact_environment.ExactEnvironment" in {worker["fqn"] for worker in workers}
    assert all(Path(worker["prefix"]).is_relative_to(project) for worker in workers)


PIPELINE = """
from nemo_rl.pipelines import DocumentBatch, Pipeline, ProcessingStage
from nemo_rl.pipelines.io.readers import JsonlReader
from nemo_rl.pipelines.io.writers import JsonlWriter

class Width(ProcessingStage[DocumentBatch, DocumentBatch]):
    runtime_env = {"uv": ["wcwidth==0.2.14"]}

    def inputs(self):
        return ["data"], ["text"]

    def outputs(self):
        return ["data"], ["width"]

    def process(self, task):
        import wcwidth
        frame = task.to_pandas()
        return task.with_data(frame.assign(width=frame["text"].map(wcwidth.wcswidth)))

if __name__ == "__main__":
    reader = JsonlReader("texts.jsonl", columns={"text": "string"})
    Pipeline("widths", stages=[reader, Width(), JsonlWriter("widths")]).run()
"""


@pytest.mark.slow
def test_pipeline_runs(machine: Machine, project: Path) -> None:
    (project / "widths.py").write_text(PIPELINE)
    (project / "texts.jsonl").write_text('{"text": "ab"}\n{"text": "日本"}\n')
    machine.run(project, "uv", "run", "widths.py")
    (written,) = (project / "widths").glob("*.jsonl")
    assert [json.loads(line)["width"] for line in written.read_text().splitlines()] == [2, 4]


@pytest.mark.slow
def test_notebook_runs(machine: Machine, project: Path) -> None:
    execute = ("jupyter", "nbconvert", "--execute", "--to", "notebook", "--output", "executed.ipynb", "notebook.ipynb")
    machine.run(project, "uv", "run", "--group", "notebook", *execute)
    cells = json.loads((project / "executed.ipynb").read_text())["cells"]
    results = [output["data"]["text/plain"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert "[3]" in str(results)


FLAT = """
[project]
name = "flat"
version = "0.1.0"
requires-python = ">=3.11,<3.14"
"""
REGISTER = """
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES, register_actor_environment

register_actor_environment("counting_worker.Counter", PY_EXECUTABLES.MCORE)
"""


@pytest.mark.slow
def test_flat_project_gets_an_extra(machine: Machine) -> None:
    machine.write("flat/pyproject.toml", FLAT)
    machine.write("flat/counting_worker.py", VERSION_WORKER.format(name="Counter"))
    directory = machine.write("flat/versions.py", REGISTER + RUN).parent
    machine.run(directory, "uvx", "--from", str(machine.wheel), "nemo-rl", "add", "mcore")
    printed = machine.run(directory, "uv", "run", "versions.py", "megatron-core", "counting_worker.Counter")
    assert printed == ("0.16.1\n" if sys.version_info < (3, 12) else "0.19.2\n")


MEMBER = """
[project]
name = "member"
version = "0.1.0"
requires-python = ">=3.11,<3.14"
dependencies = ["nemo-rl", "wcwidth==0.2.14"]

[project.entry-points."nemo_rl.actor_environments"]
"member.counting_worker.Counter" = "nemo_rl.distributed.ray_actor_environment_registry:PY_EXECUTABLES.BASE"

[build-system]
requires = ["uv_build>=0.9,<0.15"]
build-backend = "uv_build"

[tool.uv.sources]
nemo-rl = {{ path = "{wheel}" }}
"""


@pytest.mark.slow
def test_member_of_a_workspace_runs_a_worker(machine: Machine) -> None:
    machine.write("space/pyproject.toml", '[tool.uv.workspace]\nmembers = ["packages/*"]\n')
    member = machine.write("space/packages/member/pyproject.toml", MEMBER.format(wheel=machine.wheel)).parent
    machine.write("space/packages/member/src/member/__init__.py", "")
    machine.write("space/packages/member/src/member/counting_worker.py", VERSION_WORKER.format(name="Counter"))
    machine.write("space/packages/member/versions.py", RUN)
    printed = machine.run(member, "uv", "run", "versions.py", "wcwidth", "member.counting_worker.Counter")
    assert printed == "0.2.14\n"
    assert (machine.folder / "space" / "uv.lock").exists()
    assert (member / "venvs").is_dir()


def is_serving(port: int) -> bool:
    """Return whether an HTTP server answers, be it with an error. It may accept connections before that."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


@pytest.fixture
def head(machine: Machine, project: Path) -> Iterator[dict[str, str]]:
    """Start a Ray head with a job server, and yield the variables with which a client reaches it."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        gcs, server, agent = (opened.getsockname()[1] for opened in sockets)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{server}"}
    command = [str(project / ".venv" / "bin" / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += [f"--port={gcs}", f"--dashboard-port={server}", f"--dashboard-agent-listen-port={agent}"]
    # Without --node-ip-address: the driver of a job joins the head by the machine's address, not by loopback.
    command += ["--include-dashboard=true", "--disable-usage-stats"]
    variables = {name: value for name, value in machine.env.items() if name != "RAY_ADDRESS"}
    # A head of a real cluster is no child of `uv run`, whose options Ray would take over for its jobs.
    variables["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    log = machine.folder / "head.log"
    with log.open("w") as file:
        process = psutil.Popen(command, cwd=machine.folder, env={**variables, **env}, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 600
        for port in (server, agent):
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                if is_serving(port):
                    break
                time.sleep(0.2)
        yield env
    finally:
        members = [*process.children(recursive=True), process] if process.is_running() else []
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=400)


@pytest.mark.slow
def test_submitted_job_runs_the_edited_code(machine: Machine, project: Path, head: dict[str, str]) -> None:
    store = machine.folder / "home" / ".cache" / "nemo_rl" / "venvs" / ".store"
    worker = project / "src" / "my_project" / "distance_worker.py"

    def submit() -> str:
        return machine.run(project, "uv", "run", "nemo-rl", "submit", "--", "uv", "run", "run.py", **head)

    assert "[3, 2]\n" in submit()
    built = sorted(path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert built
    original = worker.read_text()
    worker.write_text(original.replace("return Levenshtein", "return 100 + Levenshtein"))
    try:
        assert "[103, 102]\n" in submit()
    finally:
        worker.write_text(original)
    assert sorted(path.name for path in store.iterdir() if path.is_dir() and not path.name.startswith(".")) == built
