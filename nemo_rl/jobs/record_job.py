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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_rl.algorithms.record_config import RecordJobConfig
from nemo_rl.algorithms.training_loop import epochs_done
from nemo_rl.errors import DataError
from nemo_rl.jobs.attempt import INPUTS_THREAD, WorkerGroup
from nemo_rl.jobs.model_files import check_checkpoint_model, prepare_model
from nemo_rl.jobs.training_job import StartedJob, TrainingAttempt
from nemo_rl.utils.files import write_atomically
from nemo_rl.utils.futures import run_in_thread

if TYPE_CHECKING:
    from nemo_rl.algorithms.record_training import RecordTraining
    from nemo_rl.data.conversation_encoder import ConversationEncoder
    from nemo_rl.data.examples import ExampleDataset
    from nemo_rl.data.problem import Role as SplitRole
    from nemo_rl.data.tokenized_examples import ExampleLoader, TokenizedExamples
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.utils.checkpoint import Checkpoint

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
class RecordAttempt(TrainingAttempt[ConfigT, Datasets], ABC):
    """Trains a policy on records. A subclass is one algorithm. Its `data` are training and validation data."""

    @classmethod
    def open_data(cls, config: ConfigT) -> Datasets:
        return cls.load_data(config.data)

    @classmethod
    def max_num_steps(cls, config: ConfigT) -> int | None:
        return config.training.max_num_steps

    @classmethod
    def is_complete(cls, config: ConfigT, step: int, reason: str) -> bool:
        training = config.training
        is_last_step = training.max_num_steps is not None and step >= training.max_num_steps
        return is_last_step or reason == epochs_done(training.max_num_epochs)

    @classmethod
    def limits(cls, config: ConfigT) -> str:
        return "its limits"

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

    def _start(self, checkpoint: Checkpoint | None) -> StartedJob:
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

            transport = self._start_evaluation(model_name, cluster)
            policy = Policy(
                cluster,
                config.trained_policy,
                model_name,
                total_steps=config.num_optimizer_steps(inputs.num_steps),
                seed=config.training.seed,
                route=None if transport is None else Route(transport),
            )
            attempt.stack.callback(policy.shutdown)
            groups: dict[str, WorkerGroup] = {"policy": policy}
            attempt.wait_ready(self._with_evaluation(groups))
        make_loop = functools.partial(
            self.loop_class(),
            config=config,
            policy=policy,
            loader=inputs.loader,
            validation=inputs.validation,
            **inputs.loop_options,
        )
        return StartedJob(policy, groups, make_loop)

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
            data: dict[SplitRole, ExampleDataset[Any, Any] | None] = dict(zip(("train", "validation"), self.data))
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
