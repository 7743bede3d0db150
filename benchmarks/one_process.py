"""Assembles a GRPO job in one process, without Ray, from the real training loop, policy worker and generator."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.grpo import GRPO
from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.data.loader import PromptLoader
from nemo_rl.data.processing import TokenizedProblems
from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationInterface, GenerationRequest, GenerationResult
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.models.policy.interfaces import LossFunction, PolicyInterface, TrainResult
from nemo_rl.models.policy.microbatching import sharding_args
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker
from nemo_rl.models.weights.interfaces import WeightOffer, WeightUpdate


@dataclass(frozen=True)
class ModelSize:
    """Describes a Llama whose MLPs are four times as wide, with four query heads per key-value head."""

    hidden: int
    num_layers: int
    num_heads: int
    vocabulary: int = 32_000


SIZES = {
    "0.1B": ModelSize(768, 12, 12),
    "0.5B": ModelSize(1280, 24, 20),
    "1.5B": ModelSize(2048, 26, 32),
    "tiny": ModelSize(128, 2, 4, 128),
}


def write_llama(directory: Path, size: ModelSize, max_length: int, *, device: str = "cpu") -> int:
    """Write a model with random weights and a character tokenizer. Returns the number of parameters.

    Token ids beyond the tokenizer's vocabulary decode to unknown tokens. The model rarely ends a completion.
    """
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=max(size.vocabulary, len(tokenizer)),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads // 4,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


class OneWorkerPolicy(PolicyInterface):
    """Implements a policy with one worker in this process."""

    def __init__(self, config: PolicyConfig, *, total_steps: int, device: str) -> None:
        self.worker = TorchPolicyWorker(
            config, total_steps=total_steps, seed=0, device_type=device, weight_transport="local"
        )
        self._batching = config.batching

    def _single_shard(self, batch: BatchedDataDict, batch_size: int | None = None) -> SlicedDataDict:
        shards = batch.shard_by_batch_size(1, batch_size, **sharding_args(self._batching))
        return (shards[0] if isinstance(shards, tuple) else shards)[0]

    def get_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return self.worker.get_logprobs(self._single_shard(batch))

    def get_reference_policy_logprobs(self, batch: BatchedDataDict) -> torch.Tensor:
        return self.worker.get_reference_policy_logprobs(self._single_shard(batch))

    def train(self, batch: BatchedDataDict, loss_fn: LossFunction, *, batch_size: int | None = None) -> TrainResult:
        return self.worker.train(self._single_shard(batch, batch_size), loss_fn, batch_size)

    def publish_weights(self, version: int, dtype: str) -> WeightUpdate:
        update = self.worker.publish_weights(version, dtype)
        assert update is not None
        return update

    def offload(self, *, keep_weights: bool = False) -> None:
        self.worker.offload(keep_weights)

    def save_checkpoint(self, directory: Path) -> None:
        self.worker.save_checkpoint(directory)

    def load_checkpoint(self, directory: Path) -> None:
        self.worker.load_checkpoint(directory)

    def attestation(self) -> list[dict[str, Any]]:
        return [self.worker.attestation()]

    def shutdown(self) -> None:
        self.worker.shutdown()


class OneGenerator(GenerationInterface):
    """Implements generation with one engine in this process."""

    def __init__(self, generator: TorchGenerator) -> None:
        self.generator = generator

    def generate(
        self,
        prompts: BatchedDataDict,
        *,
        seed: int,
        num_generations: int = 1,
        greedy: bool = False,
        sampling: Any = None,
        rows: Sequence[int] | None = None,
    ) -> GenerationResult:
        request = GenerationRequest.for_prompts(
            prompts, seed=seed, num_generations=num_generations, greedy=greedy, sampling=sampling, rows=rows
        )
        return self.generator.generate(request)

    def update_weights(self, update: WeightUpdate | WeightOffer, *, in_flight: bool = False) -> str:
        assert isinstance(update, WeightUpdate)
        return self.generator.update_weights(update)

    def attestation(self) -> list[dict[str, Any]]:
        return [self.generator.attestation()]

    def shutdown(self) -> None:
        """Do nothing. The engine ends with the process."""


class Coin(EnvironmentInterface):
    """Rewards completions with 0 or 1 by a hash of the text, so models with random weights get different rewards."""

    def step(self, completions: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> EnvironmentReturn:
        tosses = np.array([zlib.crc32(text.encode()) % 2 for text in completions], np.float32)
        count = len(tosses)
        return EnvironmentReturn(tosses, np.ones(count, bool), list(completions), ["ok"] * count, np.zeros(count))

    def global_post_process_and_metrics(self, result: EnvironmentReturn) -> tuple[EnvironmentReturn, dict[str, float]]:
        return result, {"heads": float(result.rewards.mean())}

    def shutdown(self) -> None:
        """Do nothing. The environment has started nothing."""


@dataclass
class Metrics:
    """Records the metrics of each step."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None: ...

    def log_episodes(self, step: int, episodes: list[dict[str, Any]]) -> None: ...

    def log_rollouts(self, step: int, samples: list[dict[str, Any]]) -> None: ...


def make_job(model: Path, config: MasterConfig, device: str) -> GRPO:
    """Create the training loop with its parts. `recorder` is a `Metrics`. The job does not validate or save."""
    policy = config.policy.model_copy(update={"model_name": str(model)})
    tokenizer = make_tokenizer()
    problems = TokenizedProblems(ArithmeticDataset("train", 1000), tokenizer, config.data)
    spec = GeneratorSpec(
        str(model),
        policy.generation,
        policy.max_sequence_length,
        default_precision=policy.precision,
        use_gpu=device == "cuda",
    )
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return GRPO(
        config=config,
        policy=OneWorkerPolicy(policy, total_steps=config.num_optimizer_steps, device=device),
        generation=OneGenerator(TorchGenerator(spec)),
        environment=Coin(),
        loader=PromptLoader(problems, pad, seed=config.grpo.seed),
        validation=None,
        recorder=Metrics(),
        checkpoints=None,
        pad_token_id=pad,
    )
