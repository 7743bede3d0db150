"""What every job does around its loop: run directory, console, Ray, venvs, attestation, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from nemo_rl.jobs.job_config import JobConfig
from nemo_rl.jobs.model_files import ensure_model
from nemo_rl.jobs.roles import Role
from nemo_rl.jobs.run_directory import RunDirectory
from nemo_rl.jobs.venv_phases import VenvPhases
from nemo_rl.observability.console import ConsoleView
from nemo_rl.observability.logger import Logger
from nemo_rl.observability.rollout_files import ATTESTATION_FILE
from nemo_rl.observability.timer import Timeline, TimelineEvent
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.futures import run_in_thread

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nemo_rl.algorithms.training_loop import TrainingLoop
    from nemo_rl.distributed.config import BundlesConfig
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.jobs.background_evaluation import BackgroundEvaluation
    from nemo_rl.models.policy.config import PolicyConfig
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

# The timeline's row for the thread that prepares the inputs while Ray starts.
INPUTS_THREAD = "driver: inputs"


class WorkerGroup(Protocol):
    """A group of workers that starts in the background, such as a `Policy`."""

    def wait_ready(self) -> None: ...

    def attestation(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run, from an opened run directory to the end of the loop.

    Attributes:
        stack: receives a shutdown callback for everything that the attempt starts.
    """

    run: RunDirectory
    view: ConsoleView
    timeline: Timeline
    stack: ExitStack

    def open_recorder(self, config: JobConfig, checkpoint: Checkpoint | None) -> Logger:
        """Open the logging back ends. A missing one is reported before anything is started."""
        return self.stack.enter_context(
            Logger(
                self.run.path,
                config.logger,
                resume_step=checkpoint.step if checkpoint else None,
                listeners=[self.view],
            )
        )

    def join_ray(self) -> None:
        """Join or start Ray."""
        with self.timeline.phase("Ray"):
            import ray

            from nemo_rl.distributed.virtual_cluster import init_ray

            self.stack.callback(ray.shutdown)
            init_ray(log_dir=str(self.run.path))

    def make_cluster(self, part: BundlesConfig, name: str, num_groups: int = 1) -> RayVirtualCluster:
        """Describe a cluster that `num_groups` worker groups share, without reserving resources."""
        from nemo_rl.distributed.virtual_cluster import RayVirtualCluster

        cluster = RayVirtualCluster(
            [part.workers_per_node] * part.num_nodes,
            use_gpus=part.use_gpus,
            num_gpus_per_node=max(part.gpus_per_node, 1),
            max_colocated_worker_groups=num_groups,
            name=name,
        )
        self.stack.callback(cluster.shutdown)
        return cluster

    def build_venvs(self, roles: Sequence[Role], plans: Mapping[str, VenvPlan]) -> None:
        """Build the venvs of all roles (see `role_plans`) on all nodes, as far as they do not exist."""
        names = {venv: ", ".join(role.name for role in roles if role.venv == venv) for venv in plans}
        with self.timeline.phase("venvs"), VenvPhases(self.view, self.timeline, names) as phases:
            from nemo_rl.distributed.node_venvs import ensure_venvs_on_each_node

            ensure_venvs_on_each_node(plans, progress=phases)

    def wait_ready(self, groups: Mapping[str, WorkerGroup]) -> None:
        """Wait until all groups, by the name of their role, have started. The first error ends the job."""
        for name, group in groups.items():
            with self.timeline.phase(f"{name} ready", waits=True):
                group.wait_ready()

    def create_model(self, policy: PolicyConfig, checked: Future[Any]) -> str:
        """Return the model that the workers load. An embedded one is created if need be, after `checked` has ended."""
        checked.result()
        with self.timeline.phase("create model", INPUTS_THREAD):
            return ensure_model(policy)

    def run_loop(
        self, loop: TrainingLoop, checkpoint: Checkpoint | None, evaluation: BackgroundEvaluation | None = None
    ) -> tuple[str, int]:
        """Run a loop from a checkpoint, or from the start; returns the reason for the end and the last step.

        Args:
            loop: the training loop.
            checkpoint: where it begins.
            evaluation: evaluates its weights in the background. Its last evaluation has ended when this returns.
        """
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint.path)
            with self.timeline.phase("load checkpoint"):
                loop.resume(checkpoint)
        if evaluation is None:
            return loop.run(), loop.step
        loop.on_weights = evaluation.offer
        reason = loop.run()
        evaluation.finish(loop.step)
        return reason, loop.step

    def attest(self, groups: Mapping[str, WorkerGroup]) -> list[dict[str, Any]]:
        """Write and return one record per worker of the job: node, venv, versions and startup phases."""
        records = [{"group": name, **record} for name, group in groups.items() for record in group.attestation()]
        self.timeline.extend(_worker_events(records))
        write_atomically(self.run.path / ATTESTATION_FILE, json.dumps(records, indent=1))
        return records


@contextmanager
def open_attempt(run: RunDirectory, title: str, max_num_steps: int) -> Iterator[Attempt]:
    """Show the progress of an attempt. What it starts is stopped at the end of the block, in reverse order."""
    run.reopen()
    with ExitStack() as stack:
        view = stack.enter_context(ConsoleView(title, max_num_steps))
        timeline = Timeline(run.path, view)
        timeline.record_process_start()
        yield Attempt(run, view, timeline, stack)


def finish(run: RunDirectory, config: JobConfig, step: int, reason: str) -> Callable[[], None]:
    """Mark a run as finished, and start to write its reports, if they are configured, in a thread.

    Returns:
        A function that waits for the reports and logs the end of the run. Call it when the workers are stopped: both
        take seconds.
    """
    run.finish(step, reason)
    written = run_in_thread(lambda: _write_reports(run, config) if config.logger.report else {}, "reports")

    def announce() -> None:
        logger.info("finished after step %d: %s", step, reason)
        for what, path in written.result().items():
            logger.info("%s: %s", what, path)

    return announce


def _write_reports(run: RunDirectory, config: JobConfig) -> dict[str, Path]:
    """Write the reports of a run; returns their paths by what they are."""
    from nemo_rl.observability.report import EVALUATION_DIRECTORY, SCORES_FILE, write_report

    reports = {"report": write_report(run.path)}
    evaluations = run.path / EVALUATION_DIRECTORY
    if (evaluations / SCORES_FILE).exists():
        from nemo_rl.observability.eval_report import write_eval_report

        reports["report of the evaluations"] = write_eval_report(evaluations, config.logger.num_samples)
    return reports


def print_dry_run(config: JobConfig) -> None:
    """Print what a job would do. Raises the errors that the job would raise for invalid input."""
    from nemo_rl.jobs.plan import make_plan
    from nemo_rl.jobs.plan_view import print_plan

    console = Console()
    print_plan(make_plan(config), console if console.is_terminal else Console(width=160))


def _worker_events(records: list[dict[str, Any]]) -> list[TimelineEvent]:
    return [
        TimelineEvent(name, record.get("name", record["group"]), record["hostname"], start, end)
        for record in records
        for name, start, end in record["phases"]
    ]
