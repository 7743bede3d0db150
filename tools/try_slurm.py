"""Run examples/clusters/slurm.sbatch on a real Slurm: a controller and two nodes on one machine, and three jobs.

::

    python tools/try_slurm.py [--scratch DIR]

Prints one line of JSON for each job, and ends with 1 where one did not go as it should.

Needs root, iproute2, uv, git, 6 GB of disk, and Debian's packages `slurmctld`, `slurmd`, `slurm-client` and `munge`. No
running Slurm and no Slurm configuration of the machine is touched. Each node is a host with an address, a process space
and a /tmp of its own; the project is a copy of the tracked files, which both nodes see, as on a shared file system.

Covered: the script's own options, the steps that it makes, Ray over two nodes with a token, a job that succeeds, one
that fails, one that is cancelled. Not covered: real GPUs (Slurm counts one per node that is not there), containers,
control groups, accounting.
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
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "uv", "git")
RAY_PROCESSES = ("raylet", "gcs_server", "ray start", "ray::")
SMALL_JOB = (
    "cluster.num_nodes=2",
    "grpo.num_prompts_per_step=4",
    "grpo.num_generations_per_prompt=4",
    "grpo.validation.max_num_problems=16",
)
_CONFIGURATION = """\
ClusterName=try
SlurmctldHost=node1({head})
SlurmUser=root
StateSaveLocation={own}/state
SlurmdSpoolDir={own}/spool
SlurmctldPidFile={own}/slurmctld.pid
SlurmdPidFile={own}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
KillWait=20
ReturnToService=2
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A Slurm cluster, from `with` to its end: the controller is on the first node.

    Args:
        scratch: an empty directory that all nodes see, which is not below /tmp.
        num_nodes, cpus_per_node: as Slurm counts them, whatever the machine has.
    """

    def __init__(self, scratch: Path, num_nodes: int = 2, cpus_per_node: int = 2) -> None:
        self.names = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._scratch = scratch
        self._cpus = cpus_per_node
        self._network = Network(num_nodes)
        self._nodes: list[subprocess.Popen[bytes]] = []
        # As on a node where no Ray runs: what one that runs here has set for its own processes stays out.
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
        for node in self._nodes:  # and with it everything in its process namespace
            node.kill()
            node.wait()
        self._network.__exit__()

    def ask(self, *command: str) -> str:
        """What a command of Slurm's says, on the first node; empty where it fails."""
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
        """What `scontrol show job` says: JobState, ExitCode, ..."""
        words = self.ask("scontrol", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ray_processes(self) -> list[str]:
        """Ray's processes that are alive, on all nodes."""
        found = []
        for number, name in enumerate(self.names):
            for line in self.run(["ps", "-eo", "stat=,args="], node=number).stdout.splitlines():
                state, _, words = line.partition(" ")
                if not state.startswith("Z") and any(word in words for word in RAY_PROCESSES):
                    found.append(f"{name}: {words.strip()[:120]}")
        return found

    def _configure(self) -> None:
        own = self._scratch / "own"
        own.mkdir()
        nodes = [
            f"NodeName={name} NodeAddr={self._network.address(number)} CPUs={self._cpus} RealMemory=4000 Gres=gpu:1"
            for number, name in enumerate(self.names)
        ]
        text = _CONFIGURATION.format(head=self._network.address(0), own=own, nodes="\n".join(nodes))
        (self._scratch / "slurm.conf").write_text(text)
        (self._scratch / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")
        hosts = [f"{self._network.address(number)} {name}" for number, name in enumerate(self.names)]
        (self._scratch / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        key = self._scratch / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = self._scratch / f"own{number}"
        own.mkdir()
        setup = [
            f"hostname {self.names[number]}",
            f"mount --bind {own} {self._scratch}/own",
            f"mount --bind {self._scratch}/hosts /etc/hosts",
            "mount -t tmpfs -o mode=1777 tmpfs /tmp",
            "mount -t tmpfs tmpfs /run",
            f"mkdir -p /run/munge {own}/state {own}/spool",
            f"munged --force --key-file={self._scratch}/munge.key --log-file={own}/munged.log --seed-file={own}/seed",
            *([f"slurmctld -L {own}/slurmctld.log"] if number == 0 else []),
        ]
        log = self._scratch / f"{self.names[number]}.log"
        return self._network.start(number, setup, ["slurmd", "-D"], self._environment, log)


def wait_until(what: str, is_so: Callable[[], bool], seconds: float = 120.0) -> None:
    """Raises `SystemExit` when it is not so in time."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.3)


class Project:
    """A copy of this project's tracked files with its own venv, and the jobs that are submitted from it."""

    def __init__(self, slurm: Slurm, directory: Path) -> None:
        self._slurm = slurm
        self._directory = directory
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        subprocess.run(["uv", "sync", "--quiet", "--locked"], cwd=directory, check=True)

    def submit(self, name: str, *arguments: str) -> str:
        """Submit a small job over all nodes; its id."""
        options = ["--gpus-per-node=1", "--cpus-per-task=2", f"--output={name}.out", f"--job-name={name}"]
        job = ["sbatch", "--parsable", *options, SCRIPT, *SMALL_JOB, f"logger.log_dir=results/{name}", *arguments]
        done = self._slurm.run(job, cwd=self._directory)
        if done.returncode:
            raise SystemExit(f"sbatch refuses: {done.stderr}")
        return done.stdout.strip()

    def steps(self, name: str) -> int:
        """How many training steps a job has recorded."""
        path = self._directory / "results" / name / "metrics.jsonl"
        return path.read_text().count('"train/loss"') if path.exists() else 0

    def is_over(self, job_id: str) -> bool:
        """Whether nothing of a job runs any more."""
        return self._slurm.job(job_id)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

    def output(self, name: str) -> str:
        """The end of what a job has written."""
        return (self._directory / f"{name}.out").read_text()[-4000:]

    def outcome(self, name: str, job_id: str) -> dict[str, Any]:
        """What is left of a job that is over."""

        wait_until(f"job {name} is over", lambda: self.is_over(job_id), 300.0)
        path = self._directory / "results" / name / "attestation.json"
        records = json.loads(path.read_text()) if path.exists() else []
        return {
            "job": name,
            "state": self._slurm.job(job_id)["JobState"],
            "exit_code": self._slurm.job(job_id)["ExitCode"],
            "steps": self.steps(name),
            "nodes": len({record["node_id"] for record in records}),
            "run_time": self._slurm.job(job_id)["RunTime"],
            "left_processes": self._slurm.ray_processes(),
            "left_tokens": [path.name for path in self._directory.glob(".ray-token-*")],
        }


def try_jobs(slurm: Slurm, project: Project) -> list[str]:
    """Run the three jobs and print what came of them.

    Returns:
        What is not as it should be.
    """
    wrong = []

    def judge(name: str, job_id: str, **expected: object) -> None:
        outcome = project.outcome(name, job_id)
        print(json.dumps(outcome), flush=True)
        for key, value in (expected | {"left_processes": [], "left_tokens": []}).items():
            if outcome[key] != value:
                wrong.append(f"{name}: {key} is {outcome[key]!r}, not {value!r}\n{project.output(name)}")

    good = project.submit("good", "grpo.max_num_steps=3")
    judge("good", good, state="COMPLETED", exit_code="0:0", steps=3, nodes=2)
    bad = project.submit("bad", "policy.model_name=./no-such-model")
    judge("bad", bad, state="FAILED", steps=0)
    cancelled = project.submit("cancelled", "grpo.max_num_steps=100000")
    has_begun = lambda: project.steps("cancelled") > 0 or project.is_over(cancelled)  # noqa: E731
    wait_until("the job that is to be cancelled has begun", has_begun, 300.0)
    slurm.ask("scancel", cancelled)
    judge("cancelled", cancelled, state="CANCELLED")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the Slurm example on a real Slurm, on this machine.")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp"), help="for the project's copy, not below /tmp")
    parent = parser.parse_args().scratch
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        print(
            f"needs root and these programs: {' '.join(missing) or 'all there'}; see the top of {__file__}",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the nodes are removed then as well
    with tempfile.TemporaryDirectory(prefix="nemo-rl-slurm-", dir=parent) as folder:
        scratch = Path(folder)
        with Slurm(scratch) as slurm:
            wrong = try_jobs(slurm, Project(slurm, scratch / "project"))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
