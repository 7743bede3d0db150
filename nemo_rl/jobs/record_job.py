"""Runs jobs that train a policy on records: supervised fine-tuning, DPO, reward models.

::

    main thread     Ray ───────────────────┬─► venv on every node ─┬─► policy ─► loop ─► report
    second thread   model, tokenizer, data ┴─► embedded model ─────┘

Generation and environments are started only for an evaluation in the background. However a job ends, it stops
everything it started, in reverse order.
"""

from __future__ import annotations

import functools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.training_loop import epochs_done
from nemo_rl.errors import DataError
from nemo_rl.jobs.attempt import INPUTS_THREAD, Attempt, WorkerGroup, finish, open_attempt, print_dry_run
from nemo_rl.jobs.command_line import JobArguments
from nemo_rl.jobs.evaluation_part import EvaluationPart
from nemo_rl.jobs.model_files import (
    check_checkpoint_model,
    check_model_name,
    check_weight_files,
    prepare_model,
)
from nemo_rl.jobs.roles import Role, job_roles, role_plans
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.futures import run_in_thread
from nemo_rl.utils.garbage import gc_paused

if TYPE_CHECKING:
    from nemo_rl.algorithms.record_training import RecordTraining
    from nemo_rl.data.conversation_encoder import ConversationEncoder
    from nemo_rl.data.examples import ExampleDataset
    from nemo_rl.data.problem import Role as SplitRole
    from nemo_rl.data.tokenized_examples import ExampleLoader, TokenizedExamples
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"

ConfigT = TypeVar("ConfigT", bound=RecordJobConfig)
Datasets = tuple["ExampleDataset[Any, Any]", "ExampleDataset[Any, Any] | None"]


@dataclass(frozen=True)
class RecordInputs:
    """Holds the inputs that the second thread prepares.

    Attributes:
        records: the tokenized data, by their role: "train", and "validation" if there are any.
        collate: makes a batch of them, whose rows can be divided among the workers.
        validation: the first validation records as a batch.
        num_steps: number of training steps of the run, resumed or not.
        loop_options: arguments of the loop that only this algorithm has.
    """

    records: Mapping[SplitRole, TokenizedExamples[Any, Any]]
    pad_token_id: int
    collate: Callable[[Sequence[Any]], BatchedDataDict]
    loader: ExampleLoader[Any]
    validation: BatchedDataDict | None
    num_steps: int
    loop_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordAttempt(ABC, Generic[ConfigT]):
    """Starts the policy of an attempt and runs the loop. A subclass is one algorithm.

    Attributes:
        plans: the venvs of the roles, by name.
        datasets: training and validation data.
        evaluation: the evaluation in the background, if it is on.
    """

    config: ConfigT
    roles: list[Role]
    plans: dict[str, VenvPlan]
    datasets: Datasets
    attempt: Attempt
    evaluation: EvaluationPart | None = None

    @staticmethod
    @abstractmethod
    def load_data(data: Any) -> Datasets:
        """Open the data of the section `data`. Raises `ConfigError` and `DataError`."""

    @abstractmethod
    def tokenized(self, dataset: ExampleDataset[Any, Any], encoder: ConversationEncoder) -> TokenizedExamples[Any, Any]:
        """Tokenize a data set."""

    @staticmethod
    @abstractmethod
    def collate(records: Sequence[Any], pad_token_id: int, multiple: int = 1) -> BatchedDataDict:
        """Make a batch of tokenized records, filled up to a multiple of them."""

    @staticmethod
    @abstractmethod
    def loop_class() -> type[RecordTraining[ConfigT]]:
        """Import the loop, which imports torch."""

    def train(self) -> tuple[str, int]:
        """Train, and return the reason for the end and the last step."""
        config, attempt = self.config, self.attempt
        checkpoints = CheckpointStore(attempt.run.checkpoint_dir, config.checkpointing)
        checkpoint = checkpoints.latest()
        recorder = attempt.open_recorder(config, checkpoint)  # type: ignore[arg-type]
        with gc_paused():
            inputs, policy = self._start(checkpoint)
        recorder.log_hyperparameters(config.model_dump(mode="json"))
        attestation = attempt.attest(self._groups(policy))
        loop = self.loop_class()(
            config=config,
            policy=policy,
            loader=inputs.loader,
            validation=inputs.validation,
            recorder=recorder,
            checkpoints=checkpoints if config.checkpointing.enabled else None,
            on_first_step=attempt.timeline.mark_first_step,
            **inputs.loop_options,
        )
        if self.evaluation is None:
            return attempt.run_loop(loop, checkpoint)
        evaluation = self.evaluation.begin(attempt, policy, recorder, attestation)
        return attempt.run_loop(loop, checkpoint, evaluation)

    def _groups(self, policy: Policy) -> dict[str, WorkerGroup]:
        return {"policy": policy, **({} if self.evaluation is None else self.evaluation.groups)}

    def _start(self, checkpoint: Checkpoint | None) -> tuple[RecordInputs, Policy]:
        """Check the inputs while Ray starts, then build the venv, then start the policy."""
        config, attempt = self.config, self.attempt
        preparing = run_in_thread(lambda: self.prepare_inputs(checkpoint), "inputs")
        creating = run_in_thread(lambda: self.attempt.create_model(self.config.policy, preparing), "model")
        attempt.join_ray()
        cluster = attempt.make_cluster(config.cluster, config.section)
        inputs = preparing.result()  # users' mistakes are reported before a venv is built
        attempt.view.set_max_num_steps(inputs.num_steps)
        attempt.build_venvs(self.roles, self.plans)
        model_name = creating.result()
        with attempt.timeline.phase("start workers", waits=True):
            from nemo_rl.models.policy.policy import Policy
            from nemo_rl.models.weights.routes import Route

            route = None
            if self.evaluation is not None:
                self.evaluation.start(attempt, model_name)
                route = Route(self.evaluation.transport_from(cluster))
            policy = Policy(
                cluster,
                config.trained_policy,
                model_name,
                total_steps=config.num_optimizer_steps(inputs.num_steps),
                seed=config.training.seed,
                route=route,
            )
            attempt.stack.callback(policy.shutdown)
            attempt.wait_ready(self._groups(policy))
        return inputs, policy

    def prepare_inputs(self, checkpoint: Checkpoint | None) -> RecordInputs:
        """Load the tokenizer, tokenize the data, and check that a checkpoint fits."""
        config, timeline = self.config, self.attempt.timeline
        with timeline.phase("model and tokenizer", INPUTS_THREAD):
            model = prepare_model(config.trained_policy)
            if checkpoint is not None:
                check_checkpoint_model(checkpoint, config.policy)
        with timeline.phase("data", INPUTS_THREAD):
            from nemo_rl.algorithms.record_training import restore_data_position
            from nemo_rl.data.conversation_encoder import ConversationEncoder
            from nemo_rl.data.tokenized_examples import ExampleLoader

            training = config.training
            encoder = ConversationEncoder(model.tokenizer, config.data, self.attempt.run.started)
            data: dict[SplitRole, ExampleDataset[Any, Any] | None] = dict(zip(("train", "validation"), self.datasets))
            records: dict[SplitRole, TokenizedExamples[Any, Any]] = {
                role: self.tokenized(dataset, encoder) for role, dataset in data.items() if dataset is not None
            }
            counts = {role: tokenized.counts() for role, tokenized in records.items()}
            write_atomically(self.attempt.run.path / DATA_FILE, json.dumps(counts, indent=1))
            loader = ExampleLoader(
                records["train"],
                functools.partial(self.collate, pad_token_id=model.pad_token_id),
                seed=training.seed,
                shuffle=config.data.shuffle,
                num_epochs=training.max_num_epochs,
            )
            num_steps = self._num_steps(loader, records["train"])
            if checkpoint is not None:
                restore_data_position(loader, checkpoint)  # `resume` does, too, but only when the workers run
            collate = functools.partial(self.collate, pad_token_id=model.pad_token_id, multiple=config.num_shards)
            validation = None
            if "validation" in records:
                validation = collate(records["validation"][: training.validation.max_num_records])
            if self.evaluation is not None:
                self.evaluation.prepare(self.attempt, model, checkpoint)
        return RecordInputs(records, model.pad_token_id, collate, loader, validation, num_steps)

    def _num_steps(self, loader: ExampleLoader[Any], records: TokenizedExamples[Any, Any]) -> int:
        training, section = self.config.training, self.config.section
        of_epochs = loader.num_batches_left(training.num_records_per_step)
        if of_epochs == 0:
            raise DataError(
                f"{len(records)} {records.items} in {training.max_num_epochs} epochs do not make one batch of "
                f"{training.num_records_per_step}; lower {section}.num_records_per_step or raise "
                f"{section}.max_num_epochs"
            )
        return min(limit for limit in (training.max_num_steps, of_epochs) if limit is not None)


def run_record_job(kind: type[RecordAttempt[ConfigT]], arguments: JobArguments[ConfigT]) -> None:
    """Run a job that trains on records, or print its plan with `--dry-run`."""
    config: Any = arguments.config
    check_model_name(config.policy)
    roles = job_roles(config)
    if arguments.dry_run:
        print_dry_run(config)
        return
    # Errors are reported before anything is started.
    check_weight_files(config.policy.model_name, "policy.model_name")
    plans = role_plans(roles)
    datasets = kind.load_data(config.data)
    evaluation = EvaluationPart.of(config)
    run = open_run_directory(config, arguments.name)
    finished = run.finished()
    if finished is not None and _is_complete(config, finished["step"], finished["reason"]):
        logger.info("%s is finished: %s. Increase its limits to continue it", run.path, finished["reason"])
        return
    with open_attempt(run, arguments.name, config.training.max_num_steps or 0) as attempt:
        reason, step = kind(config, roles, plans, datasets, attempt, evaluation).train()
    finish(run, config, step, reason)


def _is_complete(config: RecordJobConfig, step: int, reason: str) -> bool:
    training = config.training
    is_last_step = training.max_num_steps is not None and step >= training.max_num_steps
    return is_last_step or reason == epochs_done(training.max_num_epochs)
