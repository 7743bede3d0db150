"""In-memory implementations of the interfaces of the GRPO loop. The policy is a single number."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.grpo import GRPO
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.errors import EnvironmentFailure
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.models.policy.interfaces import TrainResult
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.utils.checkpoint import CheckpointStore
from nemo_rl.utils.config import load_config

PAD = 0


@dataclass
class FakePolicy:
    """Has one weight, `skill`: the probability of a correct completion. It grows by the mean positive advantage."""

    skill: float = 0.3
    batches: list[BatchedDataDict] = field(default_factory=list)
    logprob_offset: float = 0.0
    data_parallel_size: ClassVar[int] = 1

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return batch["generation_logprobs"] + self.logprob_offset * batch["token_mask"]

    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return torch.zeros_like(batch["generation_logprobs"])

    def train(self, batch: BatchedDataDict, loss_fn: Any, *, batch_size: int | None = None) -> TrainResult:
        self.batches.append(batch)
        self.skill += 0.01 * float(batch["advantages"].clamp(min=0).mean())
        return TrainResult({"loss": -self.skill, "grad_norm": 1.0})

    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        return WeightUpdate(version, "fake", (), digest=repr(self.skill))

    def offer_weights(self, version: int, dtype: str, *, lasting: bool = False) -> WeightUpdate:
        return self.publish_weights(version, dtype)

    def save_checkpoint(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "skill").write_text(repr(self.skill))

    def load_checkpoint(self, directory: Path) -> None:
        self.skill = float((directory / "skill").read_text())


@dataclass
class FakeGeneration:
    weights: str | None = None
    corrupt: bool = False
    num_calls: int = 0
    num_in_flight: int = 0
    syncs: list[int] = field(default_factory=list)

    def update_weights(self, update: WeightUpdate, *, in_flight: bool = False) -> str:
        self.num_in_flight += in_flight
        self.syncs.append(update.version)
        self.weights = "garbage" if self.corrupt else update.digest
        return self.weights

    def generate(self, prompts, *, seed, num_generations=1, greedy=False, sampling=None) -> GenerationResult:
        self.num_calls += 1
        count = prompts.size * num_generations
        right = np.random.default_rng(seed).random(count) < float(self.weights)
        ids = torch.full((count, 3), 7)
        return GenerationResult(
            output_ids=ids,
            output_lengths=torch.full((count,), 3),
            prompt_lengths=torch.ones(count, dtype=torch.long),
            logprobs=torch.tensor([[0.0, -1.0, -1.0]]).repeat(count, 1),
            sampling_logprobs=torch.zeros(count, 3),
            truncated=torch.zeros(count, dtype=torch.bool),
            texts=["right" if r else "wrong" for r in right],
            weights_version=0,
        )


@dataclass
class FakeEnvironment:
    fails: bool = False

    def step(self, completions, metadata) -> EnvironmentReturn:
        if self.fails:
            raise EnvironmentFailure("the grader died")
        count = len(completions)
        return EnvironmentReturn(
            rewards=np.array([c == "right" for c in completions], dtype=np.float32),
            terminated=np.ones(count, dtype=bool),
            answers=list(completions),
            status=["ok"] * count,
            latency_s=np.zeros(count),
        )

    def global_post_process_and_metrics(self, result):
        return result, {"accuracy": float(result.rewards.mean())}


@dataclass
class FakeLoader:
    position: int = 0
    length: int | None = None

    def next_batch(self, num_problems: int) -> BatchedDataDict | None:
        if self.length is not None and self.position >= self.length:
            return None
        start, self.position = self.position, self.position + num_problems
        return problems(num_problems, start)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@dataclass
class Recorder:
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)
    rollouts: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)

    def log_metrics(self, step, metrics):
        self.metrics.append({"step": step, **metrics})

    def log_episodes(self, step, episodes):
        self.episodes.append((step, episodes))

    def log_rollouts(self, step, samples):
        self.rollouts.append((step, samples))

    def log_samples(self, step, samples):
        self.samples.extend(samples)


def problems(count: int, start: int = 0) -> BatchedDataDict:
    return BatchedDataDict(
        input_ids=torch.full((count, 1), 5),
        input_lengths=torch.ones(count, dtype=torch.long),
        prompt=[f"p{start + i}" for i in range(count)],
        answer=["right"] * count,
        metadata=[{}] * count,
    )


def build(*overrides: str, directory: Path | None = None, **parts: Any) -> GRPO:
    config = load_config(
        MasterConfig,
        None,
        ["grpo.num_prompts_per_step=4", "grpo.num_generations_per_prompt=4", "grpo.max_num_steps=6", *overrides],
    )
    parts = {
        "policy": FakePolicy(),
        "generation": FakeGeneration(),
        "environment": FakeEnvironment(),
        "loader": FakeLoader(),
        "validation": problems(8),
        "recorder": Recorder(),
        "checkpoints": CheckpointStore(directory, config.checkpointing) if directory else None,
        **parts,
    }
    return GRPO(config=config, pad_token_id=PAD, **parts)


def without_timings(records: list[dict[str, Any]]) -> str:
    return json.dumps([{k: v for k, v in r.items() if not k.startswith(("timing/", "perf/"))} for r in records])
