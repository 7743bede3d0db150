"""Runs a job for supervised fine-tuning: starts the policy, runs the loop of `nemo_rl.algorithms.sft`, and writes the
report.

::

    main thread     Ray ───────────────────┬─► venv on every node ─┬─► policy ─► SFT.run ─► report
    second thread   model, tokenizer, data ┴─► embedded model ─────┘

Generation and environments are started only for an evaluation in the background. However the job ends, it stops
everything it started, in reverse order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.algorithms.training_loop import epochs_done
from nemo_rl.data.conversations import ConversationDataset, load_conversations
from nemo_rl.errors import DataError
from nemo_rl.jobs.attempt import INPUTS_THREAD, Attempt, WorkerGroup, finish, open_attempt, print_dry_run
from nemo_rl.jobs.command_line import JobArguments, run_command
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
    from nemo_rl.data.supervised import ConversationLoader, TokenizedConversations
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.policy.policy import Policy
    from nemo_rl.utils.checkpoint import Checkpoint
    from nemo_rl.venvs import VenvPlan

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"


def main(argv: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command line of supervised fine-tuning and return its exit code; see `run_command`."""
    return run_command(SFTJobConfig, "sft_embedded", run_sft, argv, program=program)


def run_sft(arguments: JobArguments[SFTJobConfig]) -> None:
    """Run a job for supervised fine-tuning, or print its plan with `--dry-run`."""
    config = arguments.config
    check_model_name(config.policy)
    roles = job_roles(config)
    if arguments.dry_run:
        print_dry_run(config)
        return
    # Errors are reported before anything is started.
    check_weight_files(config.policy.model_name, "policy.model_name")
    plans = role_plans(roles)
    train, validation = load_conversations(config.data)
    evaluation = EvaluationPart.of(config)
    run = open_run_directory(config, arguments.name)
    finished = run.finished()
    if finished is not None and _is_complete(config, finished["step"], finished["reason"]):
        logger.info("%s is finished: %s. Increase its limits to continue it", run.path, finished["reason"])
        return
    with open_attempt(run, arguments.name, config.sft.max_num_steps or 0) as attempt:
        reason, step = _SFTAttempt(config, roles, plans, train, validation, attempt, evaluation).train()
    finish(run, config, step, reason)


def _is_complete(config: SFTJobConfig, step: int, reason: str) -> bool:
    is_last_step = config.sft.max_num_steps is not None and step >= config.sft.max_num_steps
    return is_last_step or reason == epochs_done(config.sft.max_num_epochs)


@dataclass(frozen=True)
class _Inputs:
    """Holds the inputs that the second thread prepares.

    Attributes:
        num_steps: number of training steps of the run, resumed or not.
    """

    loader: ConversationLoader
    validation: BatchedDataDict | None
    num_steps: int


@dataclass(frozen=True)
class _SFTAttempt:
    """Starts the policy of an attempt and runs the loop.

    Attributes:
        plans: the venvs of the roles, by name.
        evaluation: the evaluation in the background, if it is on.
    """

    config: SFTJobConfig
    roles: list[Role]
    plans: dict[str, VenvPlan]
    train_data: ConversationDataset
    validation_data: ConversationDataset | None
    attempt: Attempt
    evaluation: EvaluationPart | None = None

    def train(self) -> tuple[str, int]:
        """Train, and return the reason for the end and the last step."""
        config, attempt = self.config, self.attempt
        checkpoints = CheckpointStore(attempt.run.checkpoint_dir, config.checkpointing)
        checkpoint = checkpoints.latest()
        recorder = attempt.open_recorder(config, checkpoint)
        with gc_paused():
            inputs, policy = self._start(checkpoint)
        recorder.log_hyperparameters(config.model_dump(mode="json"))
        attestation = attempt.attest(self._groups(policy))
        from nemo_rl.algorithms.sft import SFT

        loop = SFT(
            config=config,
            policy=policy,
            loader=inputs.loader,
            validation=inputs.validation,
            recorder=recorder,
            checkpoints=checkpoints if config.checkpointing.enabled else None,
            on_first_step=attempt.timeline.mark_first_step,
        )
        if self.evaluation is None:
            return attempt.run_loop(loop, checkpoint)
        evaluation = self.evaluation.begin(attempt, policy, recorder, attestation)
        return attempt.run_loop(loop, checkpoint, evaluation)

    def _groups(self, policy: Policy) -> dict[str, WorkerGroup]:
        return {"policy": policy, **({} if self.evaluation is None else self.evaluation.groups)}

    def _start(self, checkpoint: Checkpoint | None) -> tuple[_Inputs, Policy]:
        """Check the inputs while Ray starts, then build the venv, then start the policy."""
        config, attempt = self.config, self.attempt
        preparing = run_in_thread(lambda: self._prepare_inputs(checkpoint), "inputs")
        creating = run_in_thread(lambda: self.attempt.create_model(self.config.policy, preparing), "model")
        attempt.join_ray()
        cluster = attempt.make_cluster(config.cluster, "sft")
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
                seed=config.sft.seed,
                route=route,
            )
            attempt.stack.callback(policy.shutdown)
            attempt.wait_ready(self._groups(policy))
        return inputs, policy

    def _prepare_inputs(self, checkpoint: Checkpoint | None) -> _Inputs:
        config, timeline = self.config, self.attempt.timeline
        with timeline.phase("model and tokenizer", INPUTS_THREAD):
            model = prepare_model(config.trained_policy)
            if checkpoint is not None:
                check_checkpoint_model(checkpoint, config.policy)
        with timeline.phase("data", INPUTS_THREAD):
            from nemo_rl.algorithms.sft import restore_data_position
            from nemo_rl.data.supervised import (
                ConversationEncoder,
                ConversationLoader,
                TokenizedConversations,
                collate_conversations,
            )

            encoder = ConversationEncoder(model.tokenizer, config.data, self.attempt.run.started)

            def tokenize(dataset: ConversationDataset) -> TokenizedConversations:
                return TokenizedConversations(dataset, encoder, config.policy.max_sequence_length, config.data.overlong)

            conversations = tokenize(self.train_data)
            counts = {"train": conversations.counts()}
            loader = ConversationLoader(
                conversations,
                model.pad_token_id,
                seed=config.sft.seed,
                shuffle=config.data.shuffle,
                num_epochs=config.sft.max_num_epochs,
            )
            num_steps = self._num_steps(loader, len(conversations))
            if checkpoint is not None:
                restore_data_position(loader, checkpoint)  # `resume` does, too, but only when the workers run
            validation = None
            if self.validation_data is not None:
                tokenized = tokenize(self.validation_data)
                counts["validation"] = tokenized.counts()
                rows = tokenized[: config.sft.validation.max_num_records]
                validation = collate_conversations(rows, model.pad_token_id, row_multiple=config.num_shards)
            write_atomically(self.attempt.run.path / DATA_FILE, json.dumps(counts, indent=1))
            if self.evaluation is not None:
                self.evaluation.prepare(self.attempt, model, checkpoint)
        return _Inputs(loader, validation, num_steps)

    def _num_steps(self, loader: ConversationLoader, num_conversations: int) -> int:
        config = self.config.sft
        of_epochs = loader.num_batches_left(config.num_records_per_step)
        if of_epochs == 0:
            raise DataError(
                f"{num_conversations} conversations in {config.max_num_epochs} epochs do not make one batch of "
                f"{config.num_records_per_step}; lower sft.num_records_per_step or raise sft.max_num_epochs"
            )
        return min(limit for limit in (config.max_num_steps, of_epochs) if limit is not None)
