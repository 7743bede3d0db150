import itertools
import math

import numpy as np
import pytest
import torch

from nemo_rl.algorithms.rollouts import Rollout, collect, concatenate, draw_seed, pass_at_k, select, training_batch
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.interfaces import EnvironmentReturn
from nemo_rl.models.generation.interfaces import GenerationResult
from nemo_rl.observability.timer import Timer


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (4, 1, 2), (5, 2, 3), (6, 6, 6), (6, 0, 6), (7, 3, 1)])
def test_pass_at_k_equals_subset_count(n, c, k):
    outcomes = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    assert math.isclose(pass_at_k(n, c, k), sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(2, 1, 3), (2, 1, 0), (2, 3, 1), (2, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_seeds_depend_on_every_part():
    seeds = {draw_seed(a, b, c) for a in range(3) for b in ("train", "validation") for c in range(3)}
    assert len(seeds) == 18
    assert draw_seed(1, "train", 2) == draw_seed(1, "train", 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(1, 23) != draw_seed(12, 3)


def test_training_batch_masks_completion_tokens():
    result = GenerationResult(
        output_ids=torch.tensor([[5, 6, 7, 8, 0], [5, 7, 0, 0, 0]]),
        output_lengths=torch.tensor([4, 2]),
        prompt_lengths=torch.tensor([2, 1]),
        logprobs=torch.full((2, 5), -2.0),
        sampling_logprobs=torch.full((2, 5), -1.0),
        truncated=torch.tensor([False, True]),
        texts=["a", "b"],
        weights_version=0,
    )
    batch = training_batch(result)
    assert batch["token_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert batch["sample_mask"].tolist() == [1, 1]
    assert torch.equal(batch["generation_logprobs"], result.logprobs)
    assert torch.equal(batch["sampling_logprobs"], result.sampling_logprobs)


def make_rollout(rewards: list[float], length: int, group_size: int) -> Rollout:
    count = len(rewards)
    batch = BatchedDataDict(
        input_ids=torch.ones(count, length, dtype=torch.long),
        token_mask=torch.ones(count, length),
        group=torch.arange(count // group_size).repeat_interleave(group_size),
        rewards=torch.tensor(rewards),
    )
    texts = [str(i) for i in range(count)]
    return Rollout(batch, torch.zeros(count, dtype=torch.bool), texts, texts, {"accuracy": sum(rewards) / count})


def test_concatenate_pads_and_separates_groups():
    rollout = concatenate([make_rollout([1, 0], 3, 2), make_rollout([1, 1, 0, 0], 5, 2)], pad_token_id=9)
    assert rollout.batch["group"].tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.batch["input_ids"][0].tolist() == [1, 1, 1, 9, 9]
    assert rollout.batch["token_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert rollout.metrics["accuracy"] == pytest.approx(0.5)
    assert rollout.completions == ["0", "1", "0", "1", "2", "3"]


def test_select_keeps_texts_and_tensors_aligned():
    chosen = select(make_rollout([1, 0, 1, 0], 2, 2), torch.tensor([False, False, True, True]))
    assert chosen.completions == ["2", "3"]
    assert chosen.batch["rewards"].tolist() == [1, 0]


class Echo:
    """Completes prompt p with p + 1 tokens of value 10 p + completion index; streams the prompts in `chunks`."""

    def __init__(self, chunks: list[list[int]]) -> None:
        self.chunks = chunks

    def generate(self, prompts, *, seed, num_generations, greedy, sampling, chosen=None) -> GenerationResult:
        ids = prompts["input_ids"][:, 0].tolist() if chosen is None else chosen
        rows = [(p, 10 * p + g) for p in ids for g in range(num_generations)]
        width = 2 + max(p for p, _ in rows)
        output = torch.tensor([[p] + [value] * (p + 1) + [0] * (width - p - 2) for p, value in rows])
        return GenerationResult(
            output_ids=output,
            output_lengths=torch.tensor([p + 2 for p, _ in rows]),
            prompt_lengths=torch.ones(len(rows), dtype=torch.long),
            logprobs=-output.float(),
            sampling_logprobs=-output.float(),
            truncated=torch.tensor([value % 2 == 1 for _, value in rows]),
            texts=[str(value) for _, value in rows],
            weights_version=0,
        )

    def stream(self, prompts, **options):
        for chunk in self.chunks:
            yield chunk, self.generate(prompts, **options, chosen=chunk)


class Grader:
    def step(self, completions, metadata) -> EnvironmentReturn:
        values = [int(text) for text in completions]
        assert [m["ground_truth"] for m in metadata] == [f"a{v // 10}" for v in values]
        count = len(values)
        return EnvironmentReturn(
            np.array(values, np.float32), np.ones(count, bool), [*completions], ["ok"] * count, np.array(values, float)
        )

    def global_post_process_and_metrics(self, result):
        return result, {"last": float(result.rewards[-1])}


@pytest.mark.parametrize("chunks", [[[2], [0, 1]], [[1], [2], [0]], [[2, 1, 0]]])
def test_streamed_rollout_equals_batch_rollout(chunks):
    problems = BatchedDataDict(
        input_ids=torch.tensor([[0], [1], [2]]),
        input_lengths=torch.ones(3, dtype=torch.long),
        prompt=["p0", "p1", "p2"],
        answer=["a0", "a1", "a2"],
        metadata=[{}] * 3,
    )
    batch_rollout, streamed = (
        collect(problems, Echo(chunks), Grader(), num_generations=2, seed=0, timer=Timer(), streaming=streaming)
        for streaming in (False, True)
    )
    assert streamed.completions == batch_rollout.completions == ["0", "1", "10", "11", "20", "21"]
    assert streamed.prompts == batch_rollout.prompts
    assert streamed.metrics == batch_rollout.metrics == {"last": 21.0}
    assert torch.equal(streamed.truncated, batch_rollout.truncated)
    for key, value in batch_rollout.batch.items():
        assert torch.equal(streamed.batch[key], value), key
