"""Measures how difficult problems are for a model: a pipeline stage that computes pass rates.

::

    rows ─▶ prompts ─▶ generation worker, in the stage's own process ─▶ completions ─▶ MathEnvironment ─▶ pass rates

The worker of the stage is a generation worker of a GRPO job, in its registered Python, and the grader is the math
environment. A problem is scored exactly as a GRPO job would sample and reward it. Executors treat it like any other
stage: venvs, workers, GPUs, retries, resume.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from nemo_rl.data.config import DataConfig
from nemo_rl.data.problem import Problem
from nemo_rl.data.processing import PromptFormatter, TokenizedProblem
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.distributed.workers import host as worker_host
from nemo_rl.environments.config import MathEnvironmentConfig
from nemo_rl.environments.math_environment import GROUND_TRUTH, MathEnvironment
from nemo_rl.errors import ConfigError, ModelError
from nemo_rl.jobs.model_files import (
    check_is_language_model,
    check_model_path,
    check_weight_files,
    context_length,
    load_model_config,
)
from nemo_rl.models.backends import generation_backend
from nemo_rl.models.generation.config import GenerationConfig, GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.policy.config import EMBEDDED_MODELS, EmbeddedModelConfig
from nemo_rl.pipelines import DocumentBatch, ProcessingStage, Resources
from nemo_rl.pipelines.stages.text import drop_rows
from nemo_rl.utils.config import ConfigModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

    from nemo_rl.models.generation.worker import GenerationWorker

NUM_LEVELS = 5


class ScoringConfig(ConfigModel):
    """Configures the scoring model, the number of samples, and the range of pass rates to keep."""

    model: str | None = Field(
        None,
        description="Hugging Face directory or hub name, or `embedded`. Null estimates difficulty without a model.",
    )
    num_samples: int = Field(8, ge=1, description="Completions per problem.")
    seed: int = Field(0, ge=0, description="Seed of the sampling.")
    max_sequence_length: int = Field(
        1024, ge=2, description="Maximum tokens of prompt plus completion. Limited to the model's context."
    )
    prompt_template: str | None = Field(None, description="As data.prompt_template of a GRPO job.")
    system_prompt: str | None = Field(None, description="As data.system_prompt of a GRPO job.")
    min_pass_rate: float = Field(0.0, ge=0, le=1, description="Drop problems with a lower pass rate.")
    max_pass_rate: float = Field(1.0, ge=0, le=1, description="Drop problems with a higher pass rate.")
    use_gpu: bool = Field(False, description="Give each worker a GPU. Otherwise workers run on CPUs.")
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(max_new_tokens=256), description="As policy.generation of a GRPO job."
    )
    math: MathEnvironmentConfig = Field(default_factory=MathEnvironmentConfig, description="As env.math of a GRPO job.")

    @model_validator(mode="after")
    def _check_scoring(self) -> ScoringConfig:
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(f"min_pass_rate={self.min_pass_rate} is above max_pass_rate={self.max_pass_rate}")
        if self.generation.options.workers_per_replica != 1:
            raise ValueError(
                "generation.options shards the model over several workers; a stage supports one worker per replica"
            )
        return self


class ModelPassRate(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds `pass_rate`, the fraction of correct completions, and `difficulty`, from 1 (easy) to 5 (hard).

    Sampling depends on the seed and the position of the task in the input, so all executors and repetitions compute the
    same pass rates (up to rounding, which depends on the number of threads).

    Example::

        Pipeline("score", stages=[reader, ModelPassRate(ScoringConfig(model="embedded")), writer]).run()

    Args:
        config: scoring configuration with a model.
        problem: column with the prompt text.
        answer: column with the expected answer.
        started: when the run began, for chat templates with a date. None: now.

    Raises:
        ConfigError: the model is not set or does not exist, or the backend is unknown.
    """

    def __init__(
        self,
        config: ScoringConfig,
        *,
        problem: str = "problem",
        answer: str = "answer",
        started: datetime | None = None,
    ) -> None:
        if config.model is None:
            raise ConfigError(
                "scoring.model is not set: set it to a Hugging Face directory or hub name, or to `embedded`"
            )
        check_model_path(config.model, "scoring.model")
        self.model: str = config.model
        self.problem = problem
        self.answer = answer
        self._config = config
        # The run directory compares the public attributes of stages when a run is resumed.
        self.content = config.model_dump_json(exclude={"generation": {"num_workers"}})
        self.num_workers = config.generation.num_workers
        self.resources = Resources(cpus=float(config.generation.num_threads or 1), gpus=float(config.use_gpu))
        self._backend = generation_backend(config.generation.backend)
        python = self._backend.py_executable(config.generation.py_executable, use_gpus=config.use_gpu)
        self._started = started or datetime.now()  # one time for all workers
        self.runtime_env = None if python == PY_EXECUTABLES.SYSTEM else {"py_executable": python}

    def inputs(self) -> tuple[list[str], list[str]]:
        return ["data"], [self.problem, self.answer]

    def outputs(self) -> tuple[list[str], list[str]]:
        return [], ["pass_rate", "difficulty"]

    def setup_on_node(self) -> None:
        self._model_name()

    def setup(self) -> None:
        from nemo_rl.models.policy.hf_loading import load_tokenizer

        config, name = self._config, self._model_name()
        self._max_length = self._check_fits(load_model_config(name))
        self._tokenizer: Any = load_tokenizer(name)
        self._formatter = PromptFormatter(
            self._tokenizer,
            DataConfig(prompt_template=config.prompt_template, system_prompt=config.system_prompt),
            self._started,
        )
        worker_class, _ = worker_host.load_class(self._backend.fqn)
        self._worker: GenerationWorker = worker_class(self._spec(name, self._max_length))
        _load_weights(self._worker, name, config.generation.precision or "float32")
        self._environment = MathEnvironment(config.math)

    def process(self, task: DocumentBatch) -> DocumentBatch | None:
        frame = task.to_pandas()
        prompts, faults = self._prompts(list(frame[self.problem]), list(frame[self.answer]))
        rates, levels = [float("nan")] * len(frame), [0] * len(frame)
        for prompt, num_right in zip(prompts, self._num_right(prompts, task._lineage), strict=True):
            row, num_samples = prompt.problem.index, self._config.num_samples
            rates[row] = num_right / num_samples
            levels[row] = 1 + min(NUM_LEVELS - 1, NUM_LEVELS * (num_samples - num_right) // num_samples)
            faults[row] = self._fault(rates[row])
        return drop_rows(self, task.with_data(frame.assign(pass_rate=rates, difficulty=levels)), faults)

    def teardown(self) -> None:
        self._worker.shutdown()
        self._environment.shutdown()

    def _spec(self, name: str, max_length: int) -> GeneratorSpec:
        generation = self._config.generation.model_copy(update={"num_threads": max(1, int(self.resources.cpus))})
        return GeneratorSpec(name, generation, max_length, use_gpu=self._config.use_gpu)

    def check_model(self) -> None:
        """Check the files of a model in a directory, before workers start. Raises `ConfigError`."""
        if self.model not in EMBEDDED_MODELS and Path(self.model).is_dir():
            check_weight_files(self.model, "scoring.model")
            self._check_fits(load_model_config(self.model))

    def _check_fits(self, model: PretrainedConfig) -> int:
        """Return the longest sequence to generate. Raises `ConfigError` if generation does not support the model."""
        longest = self._config.max_sequence_length
        longest = min(longest, context_length(model) or longest)
        check_is_language_model(self.model, model)
        try:
            self._config.generation.options.check_model(model, self._spec(self.model, longest))
        except ModelError as error:
            raise ConfigError(f"scoring.model: {error}") from error
        return longest

    def _model_name(self) -> str:
        if self.model not in EMBEDDED_MODELS:
            return self.model
        from nemo_rl.models.embedded import ensure_embedded_model

        return str(ensure_embedded_model(EmbeddedModelConfig(), self.model))

    def _prompts(
        self, problems: Sequence[Any], answers: Sequence[Any]
    ) -> tuple[list[TokenizedProblem], list[str | None]]:
        """Return the prompts of valid rows, and the reason for each invalid row."""
        faults: list[str | None] = [None] * len(problems)
        prompts = []
        for row, (text, answer) in enumerate(zip(problems, answers)):
            if not isinstance(text, str) or not text.strip():
                faults[row] = "no problem"
            elif not isinstance(answer, str) or not answer.strip():
                faults[row] = "no answer"
            else:
                problem = Problem(text, answer, row)
                prompt = self._formatter.text(problem.prompt, f"row {row}")
                [ids] = self._formatter.tokenize([prompt])
                if len(ids) < self._max_length:
                    prompts.append(TokenizedProblem(problem, prompt, np.asarray(ids, dtype=np.int32)))
                else:
                    faults[row] = f"prompt without room for a completion within {self._max_length} tokens"
        return prompts, faults

    def _num_right(self, prompts: list[TokenizedProblem], lineage: str) -> list[int]:
        if not prompts:
            return []
        from nemo_rl.data.collation import collate

        config = self._config
        batch = collate(prompts, pad_token_id=0)
        digest = hashlib.blake2b(f"{config.seed} {lineage}".encode(), digest_size=8).digest()
        request = GenerationRequest(
            batch["input_ids"],
            batch["input_lengths"],
            seed=int.from_bytes(digest, "big"),
            num_generations=config.num_samples,
        )
        result = self._worker.generate(request)
        truths = [{GROUND_TRUTH: p.problem.answer} for p in prompts for _ in range(config.num_samples)]
        rewards = self._environment.step(result.texts, truths).rewards
        right: list[int] = (rewards.reshape(-1, config.num_samples) == 1.0).sum(axis=1).tolist()
        return right

    def _fault(self, rate: float) -> str | None:
        if rate < self._config.min_pass_rate:
            return f"solved in less than {self._config.min_pass_rate:.0%} of the samples"
        if rate > self._config.max_pass_rate:
            return f"solved in more than {self._config.max_pass_rate:.0%} of the samples"
        return None


def _load_weights(worker: GenerationWorker, name: str, precision: str) -> None:
    """Load the weights of a model on disk into a worker, like the first weight sync of a policy."""
    from nemo_rl.models.policy.hf_loading import load_config, load_model
    from nemo_rl.models.weights.sender import publish

    model = load_model(name, load_config(name, "sdpa"))
    worker.update_weights(publish(model.named_parameters(), version=0, dtype=precision, transport="local"))
