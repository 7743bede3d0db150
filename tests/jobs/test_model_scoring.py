"""Tests the pass rates of the embedded model on problems that it can partly solve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import torch
from safetensors.torch import save_file

from nemo_rl.data.arithmetic import ArithmeticDataset
from nemo_rl.distributed.cluster.session import start_local_ray
from nemo_rl.distributed.ray_actor_environment_registry import PY_EXECUTABLES
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_scoring import ModelPassRate, ScoringConfig
from nemo_rl.models.embedded import ensure_embedded_model
from nemo_rl.models.policy.config import EmbeddedModelConfig
from nemo_rl.pipelines import DocumentBatch, Pipeline
from nemo_rl.utils.config import validate

GENERATION = {"max_new_tokens": 8, "py_executable": PY_EXECUTABLES.SYSTEM}


def scoring(**changes: Any) -> ScoringConfig:
    values = {"model": "embedded", "generation": GENERATION, "math": {"answer_format": "whole"}, **changes}
    return validate(ScoringConfig, values, where="scoring")


def arithmetic(num_problems: int, level: int) -> list[dict[str, Any]]:
    dataset = ArithmeticDataset("validation", num_problems, [level])
    return [{"problem": problem.prompt, "answer": problem.answer, "level": level} for problem in dataset[:]]


def scored(stage: ModelPassRate, rows: list[dict[str, Any]], lineage: str = "00000") -> pd.DataFrame:
    task = DocumentBatch("b", "d", pd.DataFrame(rows))
    task._lineage = lineage
    result = stage.process(task)
    assert result is not None
    return result.to_pandas()


@pytest.fixture(scope="module")
def started() -> Iterator[ModelPassRate]:
    stage = ModelPassRate(scoring(num_samples=16))
    stage.setup()
    yield stage
    stage.teardown()


def test_pass_rates_separate_easy_and_hard_problems(started: ModelPassRate) -> None:
    frame = scored(started, [*arithmetic(32, level=1), *arithmetic(32, level=5)])
    sums, products = (frame[frame["level"] == level] for level in (1, 5))
    assert sums["pass_rate"].mean() > 0.1
    assert products["pass_rate"].mean() < 0.05
    assert (frame["pass_rate"] * 16 % 1 == 0).all()
    bounds = [13, 10, 7, 4]  # of 16: 80%, 60%, 40% and 20%, rounded up
    levels = [1 + sum(16 * rate < bound for bound in bounds) for rate in frame["pass_rate"]]
    assert frame["difficulty"].tolist() == levels
    assert len(set(levels)) > 1


def test_pass_rates_are_reproducible_per_task(started: ModelPassRate) -> None:
    rows = arithmetic(24, level=1)
    first = scored(started, rows)["pass_rate"].tolist()
    assert scored(started, rows)["pass_rate"].tolist() == first
    assert scored(started, rows, "00001")["pass_rate"].tolist() != first


def test_greedy_pass_rates_equal_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = arithmetic(48, level=1)
    directory = ensure_embedded_model(EmbeddedModelConfig())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    right = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["problem"])["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right.append(float(answer.strip() == row["answer"]))
    assert 0 < sum(right) < len(right)
    stage = ModelPassRate(scoring(num_samples=2, generation={**GENERATION, "top_k": 1}))
    stage.setup()
    assert scored(stage, rows)["pass_rate"].tolist() == right
    stage.teardown()


class Drops:
    """Collects the dropped rows that a stage reports."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def dropped(self, reason: str, count: int, examples: list[Mapping[str, Any]]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count


def test_invalid_and_too_hard_problems_are_dropped() -> None:
    stage = ModelPassRate(scoring(num_samples=4, max_sequence_length=32, min_pass_rate=0.01))
    stage.setup()
    stage._reporter = drops = Drops()  # type: ignore[assignment]
    hopeless = {"problem": "x" * 31, "answer": "impossible"}
    rows = [
        *arithmetic(24, level=1),
        {"problem": "1" * 32, "answer": "1"},
        {"problem": None, "answer": "1"},
        {"problem": "1+1=", "answer": " "},
        hopeless,
    ]
    frame = scored(stage, rows)
    stage.teardown()
    assert frame["pass_rate"].min() >= 0.25
    assert drops.counts.pop("prompt without room for a completion within 32 tokens") == 1
    assert (drops.counts.pop("no problem"), drops.counts.pop("no answer")) == (1, 1)
    assert drops.counts == {"solved in less than 1% of the samples": len(rows) - 3 - len(frame)}


def test_invalid_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_pass_rate=0.5 is above max_pass_rate=0.4"):
        scoring(min_pass_rate=0.5, max_pass_rate=0.4)
    with pytest.raises(ConfigError, match="a stage supports one worker per replica"):
        scoring(generation={"backend": "vllm", "options": {"tensor_parallel_size": 2}})
    with pytest.raises(ConfigError, match=r"scoring\.model is not set"):
        ModelPassRate(ScoringConfig())
    with pytest.raises(ConfigError, match=r"scoring\.model: there is no directory /no/such/model"):
        ModelPassRate(scoring(model="/no/such/model"))


def test_unsupported_model_is_refused_before_workers_start(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"scoring\.model: .*attention heads of size 48; on CPUs, vLLM supports"):
        ModelPassRate(scoring(model=str(tmp_path), generation={"backend": "vllm"})).check_model()


def test_stage_runs_in_the_python_of_the_backend() -> None:
    """The stage uses the Python of a GRPO job. vLLM has a separate one without GPUs."""
    pythons = {
        (backend, use_gpu): ModelPassRate(scoring(generation={"backend": backend}, use_gpu=use_gpu))
        for backend in ("torch", "vllm")
        for use_gpu in (False, True)
    }
    assert {key: stage.runtime_env for key, stage in pythons.items()} == {
        ("torch", False): {"py_executable": PY_EXECUTABLES.BASE},
        ("torch", True): {"py_executable": PY_EXECUTABLES.BASE},
        ("vllm", False): {"py_executable": PY_EXECUTABLES.VLLM_CPU},
        ("vllm", True): {"py_executable": PY_EXECUTABLES.VLLM},
    }
    assert [stage.resources.gpus for stage in pythons.values()] == [0, 1, 0, 1]


@pytest.mark.slow  # starts Ray and its workers for one test
def test_pipeline_computes_the_same_pass_rates(started: ModelPassRate, tmp_path: Path) -> None:
    rows = arithmetic(16, level=1)
    start_local_ray(num_cpus=2, num_gpus=0)
    try:
        tasks = [DocumentBatch(str(i), "d", pd.DataFrame(rows)) for i in range(2)]
        done = Pipeline("score", stages=[ModelPassRate(scoring(num_samples=16))]).run(initial_tasks=tasks)
    finally:
        ray.shutdown()
    expected = [scored(started, rows, lineage)["pass_rate"].tolist() for lineage in ("00000", "00001")]
    assert [task.to_pandas()["pass_rate"].tolist() for task in done] == expected


@pytest.mark.slow
def test_vllm_pass_rates_equal_torch() -> None:
    """Compare greedy completions. Rounding may rarely select another token."""
    rows = arithmetic(64, level=1)
    greedy = {"max_new_tokens": 8, "top_k": 1}
    torch_stage = ModelPassRate(scoring(num_samples=1, generation={**GENERATION, **greedy}))
    torch_stage.setup()
    expected = scored(torch_stage, rows)["pass_rate"]
    torch_stage.teardown()
    start_local_ray(num_cpus=2, num_gpus=0)
    try:
        stage = ModelPassRate(scoring(num_samples=1, generation={"backend": "vllm", **greedy}))
        (task,) = Pipeline("score", stages=[stage]).run(initial_tasks=[DocumentBatch("b", "d", pd.DataFrame(rows))])
    finally:
        ray.shutdown()
    rates = task.to_pandas()["pass_rate"]
    assert 0 < expected.mean() < 1
    assert (rates == expected).mean() > 0.95
