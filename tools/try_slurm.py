"""Runs examples/clusters/slurm.sbatch on a real Slurm: a controller and two nodes on one machine, with five jobs.

::

    python tools/try_slurm.py [--scratch DIR] [JOB...]

Prints one line of JSON per job, and exits with 1 if a job does not have the expected outcome. Takes about six minutes
on two idle cores.

Needs root, iproute2, uv, git, 6 GB of disk, and the Debian packages `slurmctld`, `slurmd`, `slurm-client` and `munge`.
Does not affect a running Slurm or the Slurm configuration of the machine. Each node has its own address, process
namespace and /tmp. Both nodes see a copy of the tracked files of the project, as on a shared file system.

Covers:

- the options and steps of the script, and Ray on two nodes with a token,
- jobs that succeed, fail or are cancelled: `good`, `bad`, `cancelled`,
- a job whose first node runs no worker (`DEDICATED_HEAD=1`): `dedicated`,
- a job that an administrator requeues, and that requeues itself close to its time limit: `requeued`,
- for each job: the nodes of its workers, Ray's logs of both nodes, and that no process, token or temporary directory of
  Ray is left; for `dedicated`: the ports that its processes listen on.

Does not cover GPUs (each node declares one that does not exist), containers, control groups, accounting, or two jobs on
one node.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from namespaces import Network, inside  # noqa: E402

SCRIPT = "examples/clusters/slurm.sbatch"
REQUIRED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "ss", "uv", "git")
RAY_PROCESSES = ("raylet", "gcs_server", "ray start", "ray::")
SMALL_JOB = (
    "cluster.num_nodes=2",
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.max_num_problems=16",
)
BOTH = ["node1", "node2"]
# The script gives each job a band of ports for Ray; worker groups take theirs from `nemo_rl.distributed.cluster.ports`.
BANDS, BAND_SIZE = range(10_000, 20_000), 500
GROUP_PORTS = range(20_000, 30_000)
KERNEL_PORTS = 32_768  # and above: given by the kernel, so never in use already
_CONFIGURATION = """\
ClusterName=try
SlurmctldHost=node1({head})
SlurmUser=root
StateSaveLocation={node}/state
SlurmdSpoolDir={node}/spool
SlurmctldPidFile={node}/slurmctld.pid
SlurmdPidFile={node}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=20
# A job that is requeued is eligible when its credential has expired; the default is 120 s.
AuthInfo=cred_expire=5
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """Runs a Slurm cluster during a `with` block. The controller is on the first node.

    Args:
        scratch: an empty directory outside /tmp, which all nodes see.
        num_nodes: number of nodes.
        cpus_per_node: CPUs per node in the Slurm configuration.
    """

    def __init__(self, scratch: Path, num_nodes: int = 2, cpus_per_node: int = 2) -> None:
        self.names = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._scratch = scratch
        self._cpus = cpus_per_node
        self._network = Network(num_nodes)
        self._nodes: list[subprocess.Popen[bytes]] = []
        # Exclude the variables of a Ray cluster that runs on this machine.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {**inherited, "SLURM_CONF": str(scratch / "slurm.conf")}

    def __enter__(self) -> Slurm:
        try:
            self._configure()
            self._network.__enter__()
            for number in range(len(self.names)):
                self._nodes.append(self._start(number))
            wait_until(
                "all nodes are idle", lambda: self.ask("sinfo", "-h", "-o", "%T %D") == f"idle {len(self.names)}"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:  # also kills all processes in its namespace
            node.kill()
            node.wait()
        self._network.__exit__()

    def ask(self, *command: str) -> str:
        """Return the standard output of a Slurm command on the first node; empty if it fails."""
        return self.run(command).stdout.strip()

    def run(
        self, command: Sequence[str], *, node: int = 0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        return subprocess.run(
            inside(self._nodes[node], ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd or "/"), *command]),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, such as JobState and ExitCode."""
        words = self.ask("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ray_processes(self) -> list[str]:
        """Return the running Ray processes on all nodes."""
        processes = []
        for number, name in enumerate(self.names):
            for line in self.run(["ps", "-eo", "stat=,args="], node=number).stdout.splitlines():
                state, _, words = line.partition(" ")
                if not state.startswith("Z") and any(word in words for word in RAY_PROCESSES):
                    processes.append(f"{name}: {words.strip()[:120]}")
        return processes

    def listening_ports(self) -> dict[int, str]:
        """Return the TCP ports that processes other than Slurm's listen on, on any node, with the process."""
        ports = {}
        for number, name in enumerate(self.names):
            for line in self.run(["ss", "-Hltnp"], node=number).stdout.splitlines():
                _, _, _, address, _, users = line.split(None, 5)
                process = users.split('"')[1]
                if not process.startswith(("slurm", "srun")):
                    ports[int(address.rpartition(":")[2])] = f"{name}: {process}"
        return ports

    def temporary_directories(self) -> list[str]:
        """Return the directories of Ray in /tmp on all nodes."""
        find = ["find", "/tmp", "-maxdepth", "1", "-name", "*ray*"]
        return [
            f"{name}: {path}"
            for number, name in enumerate(self.names)
            for path in self.run(find, node=number).stdout.split()
        ]

    def _configure(self) -> None:
        node = self._scratch / "node"
        node.mkdir()
        nodes = [
            f"NodeName={name} NodeAddr={self._network.address(number)} CPUs={self._cpus} RealMemory=4000 Gres=gpu:1"
            for number, name in enumerate(self.names)
        ]
        text = _CONFIGURATION.format(head=self._network.address(0), node=node, nodes="\n".join(nodes))
        (self._scratch / "slurm.conf").write_text(text)
        (self._scratch / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")
        hosts = [f"{self._network.address(number)} {name}" for number, name in enumerate(self.names)]
        (self._scratch / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        key = self._scratch / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        node = self._scratch / f"node{number}"
        node.mkdir()
        setup = [
            f"hostname {self.names[number]}",
            f"mount --bind {node} {self._scratch}/node",
            f"mount --bind {self._scratch}/hosts /etc/hosts",
            "mount -t tmpfs -o mode=1777 tmpfs /tmp",
            "mount -t tmpfs tmpfs /run",
            f"mkdir -p /run/munge {node}/state {node}/spool",
            f"munged --force --key-file={self._scratch}/munge.key --log-file={node}/munged.log --seed-file={node}/seed",
            *([f"slurmctld -L {node}/slurmctld.log"] if number == 0 else []),
        ]
        log = self._scratch / f"{self.names[number]}.log"
        return self._network.start(number, setup, ["slurmd", "-D"], self._environment, log)


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until `condition()` is true. Raises `SystemExit` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"timed out after {seconds:.0f} s waiting until {what}")
        time.sleep(0.3)


class Project:
    """Copies the tracked files of this project, creates a venv, and submits jobs from the copy."""

    def __init__(self, slurm: Slurm, directory: Path) -> None:
        self._slurm = slurm
        self._directory = directory
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        subprocess.run(["uv", "sync", "--quiet", "--locked"], cwd=directory, check=True)

    def submit(self, name: str, *arguments: str, export: str = "ALL") -> str:
        """Submit a small job on all nodes; return its id. `export` sets variables, as in `sbatch --export`."""
        options = ["--gpus-per-node=1", "--cpus-per-task=2", f"--output={name}.out", f"--job-name={name}"]
        options.append(f"--export={export}")
        job = ["sbatch", "--parsable", *options, SCRIPT, *SMALL_JOB, f"logger.log_dir=results/{name}", *arguments]
        done = self._slurm.run(job, cwd=self._directory)
        if done.returncode:
            raise SystemExit(f"sbatch failed: {done.stderr}")
        return done.stdout.strip()

    def steps(self, name: str) -> int:
        """Return the number of training steps that a job has recorded."""
        path = self._directory / "results" / name / "metrics.jsonl"
        return path.read_text().count('"train/loss"') if path.exists() else 0

    def has_ended(self, job_id: str) -> bool:
        """Return whether a job has ended."""
        return self._slurm.job(job_id)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

    def output(self, name: str) -> str:
        """Return the end of a job's output."""
        return self._text(name)[-4000:]

    def resumes(self, name: str) -> int:
        """Return how often a job has resumed from a checkpoint."""
        return self._text(name).count("resuming from")

    def _text(self, name: str) -> str:
        path = self._directory / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def outcome(self, name: str, job_id: str) -> dict[str, Any]:
        """Wait for the end of a job and return its outcome."""
        wait_until(f"job {name} has ended", lambda: self.has_ended(job_id), 300.0)
        path = self._directory / "results" / name / "attestation.json"
        workers: dict[str, set[str]] = {}
        for record in json.loads(path.read_text()) if path.exists() else []:
            workers.setdefault(record["group"], set()).add(record["hostname"])
        return {
            "job": name,
            "state": self._slurm.job(job_id)["JobState"],
            "exit_code": self._slurm.job(job_id)["ExitCode"],
            "restarts": int(self._slurm.job(job_id)["Restarts"]),
            "resumes": self.resumes(name),
            "steps": self.steps(name),
            "workers": {group: sorted(nodes) for group, nodes in workers.items()},
            "nodes_with_logs": sorted(
                f"{path.parents[1].name}/{path.parent.name}"
                for path in self._directory.glob(f"ray-logs/{job_id}*/*/raylet.out")
            ),
            "run_time": self._slurm.job(job_id)["RunTime"],
            "remaining_processes": self._slurm.ray_processes(),
            "remaining_tokens": [path.name for path in self._directory.glob(".ray-token-*")],
            "remaining_directories": self._slurm.temporary_directories(),
        }


class Trial:
    """Runs the jobs, prints their outcomes, and collects the deviations from the expected outcomes."""

    def __init__(self, slurm: Slurm, project: Project) -> None:
        self._slurm = slurm
        self._project = project
        self.problems: list[str] = []

    def good(self) -> None:
        job = self._project.submit("good", "grpo.max_num_steps=3")
        both = {"policy": BOTH, "generation": BOTH, "environment": ["node1"]}
        self._check("good", job, state="COMPLETED", exit_code="0:0", steps=3, workers=both)

    def bad(self) -> None:
        job = self._project.submit("bad", "policy.model_name=./no-such-model")
        self._check("bad", job, state="FAILED", steps=0)

    def cancelled(self) -> None:
        job = self._project.submit("cancelled", "grpo.max_num_steps=100000")
        self._wait_for_step("cancelled", job, 1)
        self._slurm.ask("scancel", job)
        self._check("cancelled", job, state="CANCELLED")

    def dedicated(self) -> None:
        arguments = ("cluster.num_nodes=1", "grpo.max_num_steps=20")
        job = self._project.submit("dedicated", *arguments, export="ALL,DEDICATED_HEAD=1")
        self._wait_for_step("dedicated", job, 1)
        first = BANDS.start + int(job) % 20 * BAND_SIZE
        band = range(first, first + BAND_SIZE)
        used = {port: process for port, process in self._slurm.listening_ports().items() if port < KERNEL_PORTS}
        self._expect("dedicated", "a port of Ray is in use", any(port in band for port in used), True)
        outside = {port: process for port, process in used.items() if port not in band and port not in GROUP_PORTS}
        self._expect("dedicated", "ports outside of the bands", outside, {})
        workers = {"policy": ["node2"], "generation": ["node2"], "environment": ["node1"]}
        self._check("dedicated", job, state="COMPLETED", steps=20, workers=workers)

    def requeued(self) -> None:
        job = self._project.submit("requeued", "grpo.max_num_steps=60", "checkpointing.save_period=5")
        self._wait_for_step("requeued", job, 6)
        self._slurm.ask("scontrol", "requeue", job)
        self._wait("the job has resumed", job, lambda: self._project.resumes("requeued") == 1)
        self._slurm.ask("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
        logs = sorted(f"{run}/{node}" for run in (job, f"{job}.1", f"{job}.2") for node in BOTH)
        self._check("requeued", job, state="COMPLETED", restarts=2, resumes=2, steps=60, nodes_with_logs=logs)

    def _wait_for_step(self, name: str, job: str, step: int) -> None:
        self._wait(f"job {name} has finished step {step}", job, lambda: self._project.steps(name) >= step)

    def _wait(self, what: str, job: str, condition: Callable[[], bool]) -> None:
        wait_until(what, lambda: condition() or self._project.has_ended(job), 300.0)

    def _check(self, name: str, job: str, **expected: object) -> None:
        outcome = self._project.outcome(name, job)
        print(json.dumps(outcome), flush=True)
        logs = [f"{job}/{node}" for node in BOTH]
        remaining: dict[str, object] = {key: [] for key in outcome if key.startswith("remaining")}
        for key, value in ({"nodes_with_logs": logs} | remaining | expected).items():
            self._expect(name, key, outcome[key], value)

    def _expect(self, name: str, what: str, value: object, expected: object) -> None:
        if value != expected:
            self.problems.append(f"{name}: {what}: {value!r}, expected {expected!r}\n{self._project.output(name)}")


JOBS = ("good", "bad", "cancelled", "dedicated", "requeued")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the Slurm example on a real Slurm on this machine.")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/var/tmp"), help="directory for the copy of the project, outside /tmp"
    )
    parser.add_argument("jobs", metavar="JOB", nargs="*", help=f"{', '.join(JOBS)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.jobs) - set(JOBS):
        parser.error(f"no such job: {', '.join(sorted(unknown))}; choose from {', '.join(JOBS)}")
    missing = [program for program in REQUIRED if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        print(
            f"needs root; missing programs: {' '.join(missing) or 'none'}; see the top of {__file__}",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up the nodes on SIGTERM
    with tempfile.TemporaryDirectory(prefix="nemo-rl-slurm-", dir=arguments.scratch) as folder:
        scratch = Path(folder)
        with Slurm(scratch) as slurm:
            trial = Trial(slurm, Project(slurm, scratch / "project"))
            for job in arguments.jobs or JOBS:
                getattr(trial, job)()
    for line in trial.problems:
        print(line, file=sys.stderr)
    return 1 if trial.problems else 0


if __name__ == "__main__":
    sys.exit(main())
