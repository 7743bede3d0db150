"""Scores and intervals against formulas written in plain Python."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from nemo_rl.algorithms.eval_config import EvalConfig, from_training
from nemo_rl.algorithms.evaluation import (
    ProblemScore,
    differences,
    groups_of,
    majority_vote,
    mean_score,
    score_problems,
    summarize,
)
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import load_config


def rollout_of(rewards, answers=None, failed=None) -> Rollout:
    count = len(rewards)
    batch = BatchedDataDict(rewards=torch.tensor(rewards), token_mask=torch.ones(count, 3))
    return Rollout(
        batch=batch,
        truncated=torch.tensor([False] * count),
        prompts=["?"] * count,
        completions=["!"] * count,
        metrics={},
        failed=None if failed is None else torch.tensor(failed),
        answers=answers,
    )


def problems_of(count, metadata=None, environments=None) -> BatchedDataDict:
    batch = BatchedDataDict(problem_index=torch.arange(count) + 10, metadata=metadata or [{}] * count)
    if environments is not None:
        batch["environment"] = environments
    return batch


def config_of(**evaluation) -> EvalConfig:
    return EvalConfig(eval=evaluation)


def test_interval_is_that_of_the_mean_of_problems():
    values = [random.Random(seed).random() for seed in range(20)]
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n * (n - 1)))
    score = mean_score(values)
    assert score.value == pytest.approx(mean, abs=1e-12)
    assert (score.low, score.high) == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error), abs=1e-6)
    assert score.num_problems == n


def test_interval_covers_the_truth_in_19_of_20_evaluations():
    generator, covered = random.Random(1), 0
    for _ in range(2000):
        # Problems differ in difficulty; each is completed four times. The mean of their difficulties is 0.5.
        rates = [generator.random() for _ in range(100)]
        score = mean_score([sum(generator.random() < rate for _ in range(4)) / 4 for rate in rates])
        covered += score.low <= 0.5 <= score.high
    assert 0.93 < covered / 2000 < 0.97


def test_more_samples_of_the_same_problems_do_not_shrink_the_interval_to_nothing():
    once = score_problems(rollout_of([1.0, 0.0, 1.0, 0.0]), problems_of(4), config_of())
    often = score_problems(
        rollout_of([1.0] * 50 + [0.0] * 50 + [1.0] * 50 + [0.0] * 50), problems_of(4), config_of(num_generations=50)
    )
    assert summarize(often)["accuracy"] == summarize(once)["accuracy"]


def test_one_problem_has_no_interval():
    score = mean_score([1.0])
    assert (score.value, score.low, score.high) == (1.0, None, None)


def test_values_of_a_problem():
    [first, second] = score_problems(
        rollout_of([1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0], answers=["4", " 5", "5", None, "1", "2", "3", "4"]),
        problems_of(2, metadata=[{"topic": "sums"}, {}]),
        config_of(num_generations=4, subject_key="topic"),
    )
    # All pairs of the four samples, and those with a correct one.
    pairs = list(itertools.combinations([True, False, False, True], 2))
    assert first.values == pytest.approx(
        {
            "accuracy": 0.5,
            "reward": 0.375,
            "pass@1": 0.5,
            "pass@2": sum(map(any, pairs)) / len(pairs),
            "pass@4": 1.0,
            "maj@4": 0.0,
            "completion_length": 3.0,
            "truncated": 0.0,
        }
    )
    assert (first.problem, first.subject, second.subject) == (10, "sums", "(none)")
    assert second.values["pass@4"] == 0.0


def test_vote_only_where_an_environment_returns_answers():
    rollout = dataclasses.replace(
        rollout_of([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], answers=["8", None, None, None, None, None]), episodes=[{}] * 6
    )
    problems = problems_of(3, environments=["tools", "game", "tools"])
    scores = score_problems(rollout, problems, config_of(num_generations=2))
    assert [score.values.get("maj@2") for score in scores] == [1.0, None, 0.0]
    # One that scores batches would have returned them.
    scores = score_problems(dataclasses.replace(rollout, episodes=None), problems, config_of(num_generations=2))
    assert [score.values.get("maj@2") for score in scores] == [1.0, 0.0, 0.0]


def test_failed_samples_are_left_out():
    scores = score_problems(
        rollout_of([1.0, 0.0, 0.0, 0.0], failed=[False, True, True, True]), problems_of(2), config_of(num_generations=2)
    )
    assert scores[0].values["accuracy"] == 1.0
    assert "pass@2" not in scores[0].values
    assert scores[1].values == {}
    assert summarize(scores)["accuracy"].num_problems == 1


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["4", "4", "5"], [True, True, False], 1.0),
        (["4", "5", "5"], [True, False, False], 0.0),
        (["4", "5"], [True, False], 0.5),  # a tie
        (["4", None, None], [True, False, False], 1.0),  # no answer is no vote
        ([None, None], [False, False], 0.0),
        (["x  y", "x y ", "z"], [True, True, False], 1.0),  # white space
    ],
)
def test_majority_vote(answers, correct, expected):
    assert majority_vote(answers, correct) == expected


def test_vote_of_ties_is_the_mean_over_random_draws():
    answers, correct = ["1", "2", "3", "2", "1"], [True, False, False, False, True]
    generator = random.Random(0)
    draws = [generator.choice(["1", "2"]) == "1" for _ in range(20_000)]
    assert majority_vote(answers, correct) == pytest.approx(sum(draws) / len(draws), abs=0.02)


def scores_of(values, environment="math", subject=None):
    return [ProblemScore(environment, index, subject, {"accuracy": value}) for index, value in enumerate(values)]


def test_differences_are_paired_by_problem():
    a, b = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    score = differences(reversed(scores_of(a)), scores_of(b))["accuracy"]
    gaps = [x - y for x, y in zip(a, b)]
    mean = sum(gaps) / 4
    error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 12)
    assert score.value == mean
    assert score.low == pytest.approx(mean - 1.959964 * error, abs=1e-6)
    assert score.high - score.low < (mean_score(a).high - mean_score(a).low) + (mean_score(b).high - mean_score(b).low)


def test_problems_without_a_partner_are_left_out_of_differences():
    assert differences(scores_of([1.0, 1.0]), scores_of([0.0]))["accuracy"].num_problems == 1
    assert differences(scores_of([1.0]), scores_of([0.0], environment="nim")) == {}


def test_groups_are_sorted():
    scores = [*scores_of([1.0], subject="b"), *scores_of([0.0, 1.0], subject="a"), *scores_of([0.0])]
    assert {name: len(group) for name, group in groups_of(scores, "subject").items()} == {"a": 2, "b": 1}
    assert list(groups_of(scores, "subject")) == ["a", "b"]


@pytest.mark.parametrize(("given", "ks"), [({}, []), ({"num_generations": 6}, [1, 2, 4]), ({"k": [1]}, [1])])
def test_default_ks(given, ks):
    assert config_of(**given).eval.ks == ks


def test_k_above_the_number_of_completions_is_an_error():
    with pytest.raises(ConfigError, match=r"pass@8 needs k from 1 to eval.num_generations=4"):
        load_config(EvalConfig, None, ["eval.num_generations=4", "eval.k=[8]"])


def test_grpo_configuration_becomes_that_of_its_validation(tmp_path):
    file = tmp_path / "grpo.yaml"
    file.write_text(
        "grpo: {seed: 7, max_num_steps: 3, validation: {num_generations: 4, max_num_problems: 9, period: 2}}\n"
        "loss: {kl_coef: 0.1}\n"
        "policy: {model_name: embedded, max_sequence_length: 200, optimizer: {lr: 0.1}, generation: {top_k: 5}}\n"
        "cluster: {num_nodes: 1, gpus_per_node: 4, generation: {num_nodes: 2, gpus_per_node: 8}}\n"
        "env: {math: {answer_format: whole}}\n"
        "logger: {log_dir: results/train}\n"
        "checkpointing: {save_period: 5}\n"
    )
    config = load_config(EvalConfig, file, ["eval.num_generations=8"], convert=from_training)
    assert (config.eval.seed, config.eval.num_generations, config.eval.max_num_problems) == (7, 8, 9)
    assert (config.policy.max_sequence_length, config.policy.generation.top_k) == (200, 5)
    assert (config.cluster.num_nodes, config.cluster.gpus_per_node) == (2, 8)
    assert config.env.math.answer_format == "whole"
    assert config.logger.log_dir is None


def test_training_keys_are_unknown(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key policy.optimizer"):
        load_config(EvalConfig, None, ["policy.optimizer.lr=1"])
