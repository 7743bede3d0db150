"""Which steps are evaluated in the background, what happens to the others, and how a job resumes."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.eval_config import BackgroundEvaluationConfig, EvalConfig, from_training
from nemo_rl.algorithms.evaluation import ProblemScore
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.errors import ConfigError, WeightSyncError
from nemo_rl.jobs.background_evaluation import BackgroundEvaluation
from nemo_rl.jobs.eval_results import EvalResults
from nemo_rl.jobs.job_config import evaluation_of
from nemo_rl.jobs.plan import make_plan
from nemo_rl.models.weights.interfaces import WeightUpdate
from nemo_rl.utils.config import load_config


class Evaluation:
    """A background evaluation, whose evaluations last until they are released."""

    def __init__(self, directory: Path, **config: Any) -> None:
        self.results = EvalResults(directory)
        self.metrics: dict[int, dict[str, float]] = {}
        self.published: list[int] = []
        self.begun = threading.Semaphore(0)
        self.released = threading.Semaphore(0)
        self.error: Exception | None = None
        self.publish_error: Exception | None = None
        self.running = BackgroundEvaluation(
            BackgroundEvaluationConfig(**config),
            self.results,
            publish=self._publish,
            evaluate=self._evaluate,
            log_metrics=self.metrics.__setitem__,
        )

    def _publish(self, step: int) -> WeightUpdate:
        if self.publish_error is not None:
            raise self.publish_error
        self.published.append(step)
        return WeightUpdate(step, "local", (), digest=f"weights of {step}")

    def _evaluate(self, step: int, update: WeightUpdate) -> tuple[dict[str, Any], list[ProblemScore]]:
        self.begun.release()
        assert self.released.acquire(timeout=30)
        if self.error is not None:
            raise self.error
        return record(step, update.digest), [ProblemScore("math", 0, None, {"accuracy": step / 10})]

    def finish(self, step: int) -> None:
        self.released.release(100)
        self.running.finish(step)
        self.running.stop()
        self.running.join()


def record(step: int, digest: str = "") -> dict[str, Any]:
    return {"model": f"step_{step}", "step": step, "label": f"step {step}", "num_failed": 0, "weights_digest": digest}


def test_due_steps_are_evaluated_while_the_loop_continues(tmp_path):
    evaluation = Evaluation(tmp_path, period=2)
    evaluation.released.release(100)
    for step in range(5):
        evaluation.running.offer(step)
        while step % 2 == 0 and step not in evaluation.metrics:
            threading.Event().wait(0.01)
    evaluation.finish(5)
    assert evaluation.published == [0, 2, 4, 5]
    assert evaluation.metrics[4] == {"eval/accuracy": 0.4, "eval/num_failed": 0}
    models = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert [(model["step"], model["weights_digest"]) for model in models][-1] == (5, "weights of 5")


def test_newest_weights_wait_and_older_ones_are_skipped(tmp_path, caplog):
    evaluation = Evaluation(tmp_path, period=1, at_start=False, at_end=False)
    evaluation.running.offer(1)
    assert evaluation.begun.acquire(timeout=30)
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            evaluation.running.offer(step)
    assert "the evaluation of step 2 is skipped: an earlier one still runs, and step 3 is due" in caplog.text
    evaluation.finish(4)
    assert [model["step"] for model in evaluation.results.content["models"]] == [1, 4]
    assert [skipped["step"] for skipped in evaluation.results.content["not_evaluated"]] == [2, 3]


def test_failed_evaluation_is_reported_and_the_next_one_runs(tmp_path, caplog):
    evaluation = Evaluation(tmp_path, period=1, at_start=False)
    evaluation.error = WeightSyncError("another digest")
    evaluation.running.offer(1)
    evaluation.released.release()
    while not evaluation.results.content["not_evaluated"]:
        threading.Event().wait(0.01)
    evaluation.error = None
    evaluation.running.offer(2)
    evaluation.finish(2)
    assert evaluation.results.content["not_evaluated"] == [{"step": 1, "reason": "failed: another digest"}]
    assert [*evaluation.metrics] == [2]
    assert "evaluations in the background have failed: steps 1. Step 1: another digest" in caplog.text


def test_weights_that_cannot_be_published_do_not_end_the_training(tmp_path):
    evaluation = Evaluation(tmp_path, period=1)
    evaluation.publish_error = WeightSyncError("too many open files")
    evaluation.running.offer(1)
    evaluation.publish_error = None
    evaluation.finish(2)
    assert evaluation.results.content["not_evaluated"][0]["reason"] == "failed: too many open files"
    assert evaluation.results.steps == {2}


def test_stopped_evaluation_records_no_failure(tmp_path):
    evaluation = Evaluation(tmp_path, period=1)
    evaluation.running.offer(1)
    assert evaluation.begun.acquire(timeout=30)
    evaluation.error = RuntimeError("the worker was stopped")
    evaluation.running.stop()
    evaluation.released.release()
    evaluation.running.join()
    assert not (tmp_path / "scores.json").exists()


def test_resumed_run_keeps_the_scores_up_to_its_checkpoint(tmp_path):
    results = EvalResults(tmp_path)
    for step in (0, 2, 4, 6):
        results.add(record(step), [ProblemScore("math", 0, None, {"accuracy": 0.5})])
    results.leave_out(3, "skipped")
    results.leave_out(5, "skipped")
    resumed = EvalResults(tmp_path)
    resumed.keep_until(4)
    assert resumed.steps == {0, 2, 4}
    assert [pair["model"] for pair in resumed.content["differences"]] == ["step_2", "step_4"]
    assert [skipped["step"] for skipped in resumed.content["not_evaluated"]] == [3]
    evaluation = Evaluation(tmp_path, period=2)
    evaluation.running.offer(4)  # evaluated before the interruption
    assert evaluation.published == []
    evaluation.finish(6)


def test_evaluation_inherits_the_job_and_changes_what_is_configured():
    config = load_config(
        MasterConfig,
        None,
        [
            "eval.period=10",
            "eval.num_generations=4",
            "eval.generation.num_threads=1",
            "eval.data.validation.path=test.jsonl",
            "data.prompt_template='{problem}='",
            "policy.generation.max_new_tokens=20",
            "policy.generation.num_workers=2",
            "cluster.cpu_workers_per_node=2",
            "env.math.answer_format=whole",
        ],
    )
    evaluation = evaluation_of(config)
    assert evaluation is not None
    generation = evaluation.policy.generation
    assert (generation.max_new_tokens, generation.num_threads, generation.num_workers) == (20, 1, None)
    assert (evaluation.eval.num_generations, evaluation.data.validation.path) == (4, "test.jsonl")
    assert evaluation.data.prompt_template == "{problem}="
    assert (evaluation.env.math.answer_format, evaluation.cluster.num_workers) == ("whole", 1)
    assert evaluation_of(MasterConfig()) is None


@pytest.mark.parametrize("schema", [DPOJobConfig, DistillationJobConfig, SFTJobConfig])
def test_other_algorithms_are_evaluated(schema):
    assert evaluation_of(schema()) is None
    assert evaluation_of(load_config(schema, None, ["eval.period=5"])) is not None


def test_reward_model_generates_nothing_to_evaluate():
    assert evaluation_of(RewardModelJobConfig()) is None
    with pytest.raises(ConfigError, match="eval"):
        load_config(RewardModelJobConfig, None, ["eval.period=5"])


def test_nemo_rl_eval_of_a_run_evaluates_what_its_background_evaluated():
    config = load_config(SFTJobConfig, None, ["eval.period=5", "eval.max_num_problems=7", "eval.seed=3"])
    again = EvalConfig.model_validate(from_training(config.model_dump(mode="json")))
    assert again == evaluation_of(config)
    assert (again.eval.max_num_problems, again.eval.seed) == (7, 3)


def test_other_generation_backend_has_its_own_python_and_options():
    content = {
        "grpo": {},
        "policy": {"generation": {"py_executable": "x", "max_new_tokens": 9}},
        "eval": {"period": 1, "generation": {"backend": "vllm"}},
    }
    assert from_training(content)["policy"]["generation"] == {"max_new_tokens": 9, "backend": "vllm"}


def test_evaluation_data_need_no_train_problems():
    datasets = {name: {"class": "math", "data": {"validation": {"path": f"{name}.jsonl"}}} for name in ("easy", "hard")}
    config = MasterConfig(eval={"period": 1, "env": datasets})
    evaluation = evaluation_of(config)
    assert evaluation is not None
    assert [entry.data.validation.path for entry in evaluation.env.entries().values() if entry.data] == [
        "easy.jsonl",
        "hard.jsonl",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.generation.bakcend=vllm", "did you mean policy.generation.backend"),
        ("eval.generation.max_new_tokens=200", "exceeds policy.max_sequence_length"),
        ("eval.generation.num_workers=3", "only 1 workers fit"),
        ("eval.data.validaton.path=x.jsonl", "eval: unknown key data.validaton; did you mean data.validation"),
        ("eval.env.nim.clas=a.b", "env.nim: an environment needs the key class"),
    ],
)
def test_invalid_evaluation_is_refused_before_a_job_starts(override, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(load_config(MasterConfig, None, ["eval.period=10", override]))


def test_plan_shows_the_workers_of_the_evaluation():
    plan = make_plan(load_config(MasterConfig, None, ["eval.period=10", "eval.cluster.cpu_workers_per_node=2"]))
    assert [role.name for role in plan.roles][-2:] == ["evaluation generation", "evaluation environment"]
    assert [place.workers for place in plan.placements if place.bundle.startswith("evaluation ")] == [
        "evaluation generation-0",
        "evaluation generation-1",
    ]
