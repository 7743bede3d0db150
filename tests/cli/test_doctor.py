"""Runs `nemo-rl doctor` and `nemo-rl plan` as processes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.cli.checks import OK, WARNING, check_compiler, cpu_check
from nemo_rl.cli.cluster_checks import clock_check

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "examples" / "configs" / "grpo_math_embedded.yaml"


def run(*arguments: str, program: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("NEMO_RL_", "NRL_")) and n != "RAY_ADDRESS"}
    command = [sys.executable, "-c", program] if program else [sys.executable, "-m", "nemo_rl.cli"]
    environment = {**inherited, "PYTHONPATH": str(REPOSITORY), **env}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(done.stdout)}


def test_healthy_machine_has_no_fatal_check(tmp_path: Path) -> None:
    done = run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path))
    findings = checks(done)
    assert done.returncode == 0, done.stdout
    expected = {"Python", "uv", "lock", "Ray", "CPU", "GPU", "ports", "clock", "file system", "build locks"}
    assert expected <= findings.keys()
    assert all(check["fix"] for check in findings.values() if check["state"] != "ok")
    assert list(tmp_path.glob(".clock*")) == list(tmp_path.glob(".lock-*")) == []


def test_gpu_machine_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert check_compiler().state == OK
    driver = tmp_path / "nvidia-smi"
    driver.touch(mode=0o755)
    missing = check_compiler()
    assert (missing.state, "no C compiler" in missing.found, "install gcc" in missing.fix) == (WARNING, True, True)
    (tmp_path / "gcc").touch(mode=0o755)
    assert "C compiler" not in check_compiler().found


AVX512 = "avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "cpu_info", "means"),
    [
        ("x86_64", f"model name\t: EPYC\nflags\t\t: {AVX512} avx512_bf16", "EPYC: AVX-512 with bfloat16"),
        (
            "x86_64",
            f"model name\t: Xeon\nflags\t\t: {AVX512} avx512_bf16 amx_bf16",
            "Xeon: AMX and AVX-512 with bfloat16",
        ),
        ("x86_64", f"flags\t\t: fpu {AVX512}", "x86_64: AVX-512 without bfloat16"),
        ("x86_64", "flags\t\t: fpu avx avx2 avx_ne_convert", "converts bfloat16"),
        ("x86_64", "flags\t\t: fpu avx avx2 fma\nflags\t\t: other", "AVX2 only; bfloat16 is emulated"),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd sve bf16", "aarch64: Arm with bfloat16"),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd", "Arm without bfloat16"),
        ("aarch64", "", "Arm without bfloat16"),
        ("x86_64", "", "instruction sets unknown"),
    ],
)
def test_cpu_check_reports_bfloat16_support(machine: str, cpu_info: str, means: str) -> None:
    check = cpu_check(cpu_info, machine)
    assert (check.state, check.fix) == (OK, "")
    assert means in check.found
    native = " with bfloat16" in check.found or "unknown" in check.found
    assert ("policy.precision=float32" in check.found) is not native


def test_cpu_without_avx2_is_a_warning() -> None:
    check = cpu_check("model name\t: old\nflags\t\t: fpu sse4_2 avx", "x86_64")
    assert (check.state, check.found) == (WARNING, "old: no AVX2")
    assert "policy.generation.backend=torch" in check.fix


@pytest.mark.parametrize(
    ("env", "name", "fix"),
    [
        ({"NEMO_RL_UV": "/nowhere/uv"}, "uv", "pip install uv"),
        ({"RAY_ADDRESS": "127.0.0.1:9"}, "Ray", "ray start --head"),
        ({"NEMO_RL_PROJECT_ROOT": "/nowhere"}, "lock", "NEMO_RL_PROJECT_ROOT"),
    ],
)
def test_fatal_checks_suggest_the_fix(tmp_path: Path, env: dict[str, str], name: str, fix: str) -> None:
    done = run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path), **env)
    assert done.returncode == 1
    assert checks(done)[name]["state"] == "fatal"
    assert fix in checks(done)[name]["fix"]


def test_lock_mismatch_suggests_uv_lock(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n')
    done = run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path / "v"), NEMO_RL_PROJECT_ROOT=str(tmp_path))
    assert done.returncode == 1
    assert "uv lock" in checks(done)["lock"]["fix"]


def test_port_and_lock_warnings_name_the_holder(tmp_path: Path) -> None:
    store = tmp_path / ".store"
    store.mkdir()
    with socket.socket() as taken, (store / "0123456789abcdef.lock").open("w") as lock:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 10001))
            taken.listen()
        except OSError:
            pass  # another process already uses the port
        lock.write(json.dumps({"pid": 42, "host": "h"}))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path))
    assert done.returncode == 0
    findings = checks(done)
    assert "10001" in findings["ports"]["found"]
    assert findings["build locks"]["state"] == "warning"
    assert '"pid": 42' in findings["build locks"]["found"]
    assert checks(run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path)))["build locks"]["state"] == "ok"


def test_file_as_venv_directory_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path / "file"))
    assert done.returncode == 1
    assert checks(done)["disk: venvs"]["state"] == "fatal"


@pytest.mark.parametrize("arguments", [("doctor", "--json"), ("plan", str(CONFIG), "--json")])
def test_user_without_account_or_home_is_supported(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    program = (
        "import os, pwd\n"
        "os.environ.pop('HOME', None)\n"
        "def unknown_user(uid):\n"
        "    raise KeyError(uid)\n"  # as in `docker run --user 4444`
        "pwd.getpwuid = unknown_user\n"
        "from nemo_rl.cli import main\n"
        "main()\n"
    )
    done = run(*arguments, program=program, NEMO_RL_VENV_DIR=str(tmp_path), UV_CACHE_DIR=str(tmp_path / "uv"))
    assert done.returncode == 0, done.stderr
    if arguments[0] == "doctor":
        assert "HOME" in checks(done)["home"]["fix"]


def test_clock_offset_is_a_warning(tmp_path: Path) -> None:
    program = (
        "import time, os, pathlib\n"
        "touch = pathlib.Path.touch\n"
        "def late(path, *a, **k):\n"
        "    touch(path); os.utime(path, (time.time() - 60,) * 2)\n"  # a file server whose clock is a minute behind
        "pathlib.Path.touch = late\n"
        "from nemo_rl.cli import checks\n"
        "print(checks.check_clock())\n"
    )
    done = run(program=program, NEMO_RL_VENV_DIR=str(tmp_path))
    assert "state='warning'" in done.stdout
    assert "differs by 60 s" in done.stdout


def run_on_cluster(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Start a local cluster with two CPUs and run the command line with its address."""
    program = (
        "import sys\n"
        "import ray\n"
        "from nemo_rl.distributed.cluster.session import start_local_ray\n"
        "address = start_local_ray(num_cpus=2, num_gpus=0)\n"
        f"sys.argv = ['nemo-rl', *{list(arguments)!r}, '--address', address]\n"
        "from nemo_rl.cli import main\n"
        "main()\n"
    )
    return run(program=program, **env)


@pytest.mark.slow
def test_doctor_checks_every_node_of_a_cluster(tmp_path: Path) -> None:
    done = run_on_cluster("doctor", "--json", NEMO_RL_VENV_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    assert {check["node"] for check in findings} == {"127.0.0.1"}
    states = {check["name"]: check["state"] for check in findings}
    assert "uv" in states
    assert states["clock of the driver"] == "ok"


@pytest.mark.slow
def test_nodes_with_one_address_are_listed_separately(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from ray.cluster_utils import Cluster\n"
        "from nemo_rl.distributed import ray_private\n"
        "ray_private.keep_loopback_addresses()\n"
        "cluster = Cluster()\n"
        "for _ in range(2): cluster.add_node(num_cpus=1, include_dashboard=False)\n"
        "sys.argv = ['nemo-rl', 'doctor', '--json', '--address', cluster.address]\n"
        "from nemo_rl.cli import main\n"
        "main()\n"
    )
    done = run(program=program, NEMO_RL_VENV_DIR=str(tmp_path), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    findings = json.loads(done.stdout)
    assert {check["node"] for check in findings} == {"127.0.0.1"}
    node_ids = {check["node_id"] for check in findings}
    names = {node_id: [c["name"] for c in findings if c["node_id"] == node_id] for node_id in node_ids}
    assert len(names) == 2
    assert all(checks.count("uv") == checks.count("clock of the driver") == 1 for checks in names.values())


@pytest.mark.parametrize(
    ("node_time", "state"), [(100.5, "ok"), (96.0, "ok"), (105.0, "ok"), (90.0, "warning"), (110.0, "warning")]
)
def test_node_clock_is_compared_with_the_driver(node_time: float, state: str) -> None:
    assert clock_check(node_time, asked=100.0, answered=101.0).state == state


def test_readable_or_missing_token_is_reported(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    env = {"NEMO_RL_VENV_DIR": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": ""}
    finding = checks(run("doctor", "--json", **env))["token"]
    assert (finding["state"], finding["fix"].split()[0]) == ("warning", "chmod")
    token.chmod(0o600)
    assert checks(run("doctor", "--json", **env))["token"]["state"] == "ok"
    token.unlink()
    done = run("doctor", "--json", **env, RAY_AUTH_MODE="token", RAY_ADDRESS="127.0.0.1:9")
    assert (done.returncode, checks(done)["token"]["state"]) == (1, "fatal")


@pytest.mark.slow
def test_cluster_plan_has_placements_and_builds(tmp_path: Path) -> None:
    done = run_on_cluster(
        "plan", str(CONFIG), "cluster.cpu_workers_per_node=2", "--json", NEMO_RL_VENV_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    job_plan = json.loads(done.stdout)
    assert [place["address"] for place in job_plan["placements"]] == ["127.0.0.1", "127.0.0.1", ""]
    assert job_plan["obstacle"] == ""
    (node,) = job_plan["nodes"]
    assert (node["address"], node["problem"]) == ("127.0.0.1", "")
    assert {venv["state"] for venv in node["venvs"]} == {"would be built"}
    assert all(venv["installed_bytes"] > 10**9 and venv["basis"] for venv in node["venvs"])


def test_cluster_option_needs_an_address() -> None:
    done = run("doctor", "--cluster")
    assert done.returncode == 2
    assert "--address HOST:PORT" in done.stderr


def test_plan_lists_builds_and_starts_nothing(tmp_path: Path) -> None:
    done = run("plan", str(CONFIG), "--json", NEMO_RL_VENV_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    job_plan = json.loads(done.stdout)
    assert [role["name"] for role in job_plan["roles"]] == ["policy", "generation", "environment"]
    assert "would be built" in {venv["state"] for venv in job_plan["venvs"]}
    (node,) = job_plan["nodes"]
    assert node["address"] == "this machine"
    for venv in node["venvs"]:
        assert venv["seconds"] > 0
        assert venv["basis"]
    assert not [path for path in tmp_path.glob(".store/*") if path.is_dir() and path.name != ".resolved"]


@pytest.mark.slow  # starts the job's script again and again
def test_plan_validates_overrides() -> None:
    overrides = ("grpo.num_prompts_per_step=3", "grpo.num_generations_per_prompt=5")
    assert json.loads(run("plan", str(CONFIG), *overrides, "--json").stdout)["samples_per_step"] == 15
    done = run("plan", str(CONFIG), "grpo.num_promts_per_step=2")
    assert done.returncode == 2
    assert "num_prompts_per_step" in done.stderr
