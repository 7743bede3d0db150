"""Evaluates models and checkpoints: starts generation and the environments once, and loads one model after another.

::

    driver       publish the weights of model 1 ─► digest      publish model 2 ─► ...
                        │                                           │
    generation   load, compare digest ─► completions ─┐        load ─► ...
    environment                                       └─► rewards ─► scores.json, problems/, rollouts/, report.html

The models must differ in their weights only, so the workers and the tokenized problems serve all of them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from nemo_rl.algorithms.eval_config import ON_POLICY_SECTIONS, EvalConfig, from_training
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.attempt import Attempt, open_attempt
from nemo_rl.jobs.command_line import CommandOptions, JobArguments, config_path, run_command
from nemo_rl.jobs.eval_inputs import (
    CheckedModels,
    EvalInputs,
    check_models,
    load_problems,
    prepare_inputs,
)
from nemo_rl.jobs.eval_results import EvalResults
from nemo_rl.jobs.eval_view import print_scores, print_tasks, summary_line
from nemo_rl.jobs.evaluator import EvaluationWorkers, Evaluator
from nemo_rl.jobs.model_files import check_model_name, check_weight_files, ensure_model
from nemo_rl.jobs.model_sources import CONFIG_FILE, find_model, label
from nemo_rl.jobs.roles import Role, job_roles, role_plans
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.jobs.weight_route import route_between
from nemo_rl.observability.eval_report import write_eval_report
from nemo_rl.utils.config import load_config

if TYPE_CHECKING:
    from nemo_rl.data.problem import ProblemDataset
    from nemo_rl.models.weights.interfaces import WeightUpdate
    from nemo_rl.models.weights.sender import WeightSender
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "grpo_math_embedded"
_RUNS = "eval"  # runs without logger.log_dir are numbered in results/eval


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of an evaluation and return its exit code; see `run_command`."""
    options = CommandOptions(
        "MODEL [MODEL ...] [--data FILE] [--step N] [--config FILE] [--dry-run] [section.key=value ...]",
        _add_options,
        load_arguments,
    )
    return run_command(EvalConfig, DEFAULT_CONFIG, run_eval, argv, program=program, options=options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "MODEL is a Hugging Face directory or hub name, embedded, embedded-chat, a checkpoint, or the directory of a "
        "run, which stands for its best checkpoint. Without --config, the configuration is that of the first run."
    )
    parser.set_defaults(config=None)
    parser.add_argument("--data", metavar="FILE", help="problems: JSONL, Parquet or a Hugging Face data set")
    parser.add_argument("--step", type=int, metavar="N", help="of runs, the checkpoint of this step")


def load_arguments(arguments: argparse.Namespace) -> tuple[EvalConfig, str]:
    """Return the configuration of a parsed command line, with the models that it names.

    Raises:
        ConfigError: there is no model, a model does not exist or is given twice, or the configuration is invalid.
    """
    names = [argument for argument in arguments.overrides if _names_a_model(argument)]
    overrides = [argument for argument in arguments.overrides if argument not in names]
    if arguments.step is not None and not any((Path(name) / CONFIG_FILE).is_file() for name in names):
        raise ConfigError(f"--step {arguments.step} chooses a checkpoint of a run; name the directory of a run")
    sources = [find_model(name, arguments.step) for name in names]
    path = _config_file(arguments.config, [source.run for source in sources if source.run is not None])
    if arguments.data is not None:
        overrides += ["data.validation.kind=auto", f"data.validation.path={arguments.data}"]
    config = load_config(EvalConfig, path, overrides, convert=from_training)
    models = [source.name for source in sources] or [find_model(name).name for name in config.eval.models]
    if not models:
        raise ConfigError("name a model to evaluate: a directory, a hub name, a checkpoint, or the directory of a run")
    if repeated := [name for name in models if models.count(name) > 1]:
        raise ConfigError(f"{label(repeated[0])} is given twice; name each model once")
    entries = config.env.entries()
    if arguments.data is not None and entries and all(entry.data is not None for entry in entries.values()):
        raise ConfigError(
            f"--data {arguments.data} has no effect: every environment has its own problems; set "
            f"env.{next(iter(entries))}.data.validation.path"
        )
    return config.model_copy(update={"eval": config.eval.model_copy(update={"models": models})}), _RUNS


def _names_a_model(argument: str) -> bool:
    """Return whether an argument is a model, not an override; a directory may have an equals sign in its name."""
    return not (argument.startswith("~") or "=" in argument) or Path(argument).is_dir()


def _config_file(chosen: str | None, runs: Sequence[Path]) -> Path:
    """Return the chosen configuration, else that of the first run, else the default one."""
    if chosen is not None:
        return config_path(chosen)
    if not runs:
        return config_path(DEFAULT_CONFIG)
    import yaml

    path = runs[0] / CONFIG_FILE
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not {*ON_POLICY_SECTIONS} & {*content} and not (content.get("eval") or {}).get("period"):
        raise ConfigError(
            f"{path} is neither the configuration of GRPO or distillation nor of a job with eval.period, so it does "
            f"not say how to evaluate; name a configuration, for example --config {DEFAULT_CONFIG}"
        )
    return path


def run_eval(arguments: JobArguments[EvalConfig]) -> None:
    """Run an evaluation, or print what it would do with `--dry-run`."""
    config = arguments.config
    for name in config.eval.models:
        check_model_name(config.policy.of_model(name))
        check_weight_files(name, label(name))
    roles = job_roles(config)
    problems = load_problems(config)
    models = check_models(config)
    console = Console() if Console().is_terminal else Console(width=200)
    if arguments.dry_run:
        print_tasks(config, roles, problems, console)
        return
    run = open_run_directory(config, arguments.name)
    results = EvalResults(run.path)
    if run.finished() is None:
        plans = role_plans(roles)
        num_models = len(config.eval.models) - len(results.finished)
        with open_attempt(run, "evaluation", num_models) as attempt:
            _Evaluation(config, roles, plans, problems, models, results, attempt).run_models()
        run.finish(len(config.eval.models), f"all {len(config.eval.models)} models are evaluated")
    else:
        logger.info("%s is finished; set another logger.log_dir to evaluate again", run.path)
    if config.logger.report:
        logger.info("report: %s", write_eval_report(run.path, config.logger.num_samples))
    print_scores(results.content, console)


@dataclass(frozen=True)
class _Evaluation:
    """Runs one attempt of an evaluation.

    Attributes:
        plans: the venvs of the roles, by name.
    """

    config: EvalConfig
    roles: list[Role]
    plans: dict[str, VenvPlan]
    problems: dict[str, ProblemDataset]
    models: CheckedModels
    results: EvalResults
    attempt: Attempt

    def run_models(self) -> None:
        """Evaluate the models that are not finished, in their order."""
        names = [name for name in self.config.eval.models if name not in self.results.finished]
        if not names:
            return
        run, timeline = self.attempt.run, self.attempt.timeline
        with timeline.phase("problems"):
            inputs = prepare_inputs(self.config, self.problems, self.models.files, run.started)
            self.results.check_problems(inputs.digests)
        with timeline.phase("create model"):
            directories = {name: self._directory(name) for name in names}
        evaluator, sender = self._start(directories[names[0]], inputs)
        for name in names:
            step = len(self.results.finished) + 1
            publish = partial(self._publish, sender, directories[name], step)
            self.results.add(*evaluator.evaluate(name, label(name), step, publish))
            logger.info("%s: %s", label(name), summary_line(self.results.content))

    def _directory(self, name: str) -> str:
        """Return what the workers load. They may have another working directory."""
        created = ensure_model(self.config.policy.of_model(name))
        path = Path(created).expanduser()
        return str(path.absolute()) if path.is_dir() else created

    def _start(self, model: str, inputs: EvalInputs) -> tuple[Evaluator, WeightSender]:
        """Start Ray, build the venvs, and start all workers. The first error ends the job."""
        config, attempt = self.config, self.attempt
        attempt.join_ray()
        cluster = attempt.make_cluster(config.cluster, "evaluation")
        attempt.build_venvs(self.roles, self.plans)
        with attempt.timeline.phase("start workers", waits=True):
            workers = EvaluationWorkers.start(config, cluster, model, attempt.stack)
            attempt.wait_ready(workers.groups)
        evaluator = Evaluator.open(
            config,
            inputs,
            workers,
            attempt.attest(workers.groups),
            attempt.run.path,
            attempt.stack,
            resume_step=len(self.results.finished),
        )
        from nemo_rl.models.weights.sender import WeightSender

        return evaluator, WeightSender(route_between(None, cluster).published)

    def _publish(self, sender: WeightSender, directory: str, version: int) -> WeightUpdate:
        from nemo_rl.models.weights.saved_weights import saved_weights

        tensors = saved_weights(directory, self.models.shapes)
        return sender.publish(tensors, version=version, dtype=self.config.policy.generation_precision)
