"""Branches of an episode: their transcripts, and the training batch that has them."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
import torch
from fake_grpo import build
from test_episodes import TOKENIZER, Scripted, problems
from test_episodes import collect as collect  # a fixture

from nemo_rl.algorithms.branches import training_rows
from nemo_rl.algorithms.rollout_pipeline import StepRollout, _from_plain, _to_plain
from nemo_rl.algorithms.rollouts import Rollout, concatenate, select
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.agent import Agent, Model
from nemo_rl.environments.config import EpisodeLimits


def ask(model: Model, messages: list[dict[str, Any]]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{model.base_url}/chat/completions",
        json.dumps({"messages": messages}).encode(),
        {"Authorization": f"Bearer {model.api_key}"},
    )
    with urllib.request.urlopen(request) as response:
        message: dict[str, Any] = json.load(response)["choices"][0]["message"]
    return message


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Tree(Agent):
    """With an odd seed: continues its first answer twice, and begins a second conversation. The reward is the seed.

    ::

        start: ── 1 ── a: ── 2
                  └─── b: ── 3
        fresh: ── 4
    """

    def run(self, problem: dict[str, Any], model: Model) -> float:
        start = [user("start:")]
        first = ask(model, start)
        ask(model, [*start, first, user("a:")])
        if problem["seed"] % 2:
            ask(model, [*start, first, user("b:")])
            ask(model, [user("fresh:")])
        return float(problem["seed"])


def numbered() -> Scripted:
    return Scripted(lambda text: {"start:": "1", "a:": "2", "b:": "3", "fresh:": "4"}[text.split("1")[-1]])


def texts(batch: BatchedDataDict) -> list[tuple[str, str]]:
    """Return each row, and the part of it that is trained on."""
    rows = zip(batch["input_ids"], batch["input_lengths"], batch["token_mask"].bool(), strict=True)
    return [(TOKENIZER.decode(ids[:length]), TOKENIZER.decode(ids[mask])) for ids, length, mask in rows]


def test_each_action_is_trained_once(collect) -> None:
    rollout = collect(problems(3, 2), Tree, numbered())
    assert texts(rollout.batch) == [("start:1<eos>a:2<eos>", "1<eos>2<eos>")] * 2
    assert texts(rollout.branches) == [("start:1<eos>b:3<eos>", "3<eos>"), ("fresh:4<eos>", "4<eos>")]
    assert rollout.branches["sample"].tolist() == [0, 0]
    assert rollout.branches["turn_index"].max(dim=1).values.tolist() == [3, 4]
    assert rollout.batch["num_turns"].tolist() == [4, 2]
    assert rollout.num_completion_tokens.tolist() == [8, 4]
    assert rollout.rewards.tolist() == [3, 2]
    assert rollout.metrics["transcripts"] == 2
    # The log-probabilities that `Scripted` makes up tell the row of the draw: turn times samples, plus sample.
    branch, mask = rollout.branches["generation_logprobs"][0], rollout.branches["token_mask"][0].bool()
    torch.testing.assert_close(branch[mask], torch.tensor([-5.0, -5.01]))
    assert not branch[~mask].any()
    messages = rollout.episodes[0]["messages"]
    assert [message.get("branch") for message in messages if message["role"] == "user"] == [
        None,
        None,
        "continues turn 1",
        "a new conversation",
    ]


def test_limit_of_turns_counts_all_branches(collect) -> None:
    rollout = collect(problems(1), Tree, numbered(), limits=EpisodeLimits(max_turns=3, truncated="mask"))
    assert rollout.episodes[0]["end"] == "max_turns"
    assert texts(rollout.branches)[0][1] == "3<eos>"
    assert len(rollout.branches["sample"]) == 1
    rows = training_rows(rollout, num_parts=1, multiple_of=1, pad_token_id=0)
    assert rows.batch["sample_mask"].tolist() == [0, 0]


@pytest.mark.parametrize("multiple_of", [1, 3])
def test_rows_of_several_optimizer_steps(collect, multiple_of: int) -> None:
    """Samples 0 and 1 are one step, 2 and 3 the other; a step is padded to the size of the larger one."""
    rollout = collect(problems(2, 3, 4, 6), Tree, numbered())
    rows = training_rows(rollout, num_parts=2, multiple_of=multiple_of, pad_token_id=0)
    size = {1: 4, 3: 6}[multiple_of]
    assert rows.batch.size == 2 * size
    assert rows.samples[:size].tolist() == [0, 1, 1, 1, *[0] * (size - 4)]
    assert rows.samples[size:].tolist() == [2, 3, *[2] * (size - 2)]
    assert rows.batch["sample_mask"].view(2, size).sum(dim=1).tolist() == [4, 2]
    assert rows.batch["rewards"][:4].tolist() == [2, 3, 3, 3]
    trained = [text for _, text in texts(rows.batch)]
    assert trained[:4] == ["1<eos>2<eos>", "1<eos>2<eos>", "3<eos>", "4<eos>"]
    assert trained[4:size] == [""] * (size - 4)
    assert trained[size + 2 :] == [""] * (size - 2)
    assert rows.turn_index[1:4].amax(dim=1).tolist() == [2, 3, 4]


def test_without_branches_the_batch_stays_as_it_is(collect) -> None:
    rollout = collect(problems(2, 4), Tree, numbered())
    assert rollout.branches is None
    rows = training_rows(rollout, num_parts=1, multiple_of=8, pad_token_id=0)
    assert rows.samples.tolist() == [0, 1]
    for key, value in rows.batch.items():
        assert torch.equal(value, rollout.batch[key])


def test_branches_follow_their_samples(collect) -> None:
    one = collect(problems(2, 3, 5), Tree, numbered())
    kept = select(one, torch.tensor([2, 0]))
    assert kept.branches["sample"].tolist() == [0, 0]
    assert select(one, torch.tensor([True, False, False])).branches is None
    both = concatenate([kept, one], pad_token_id=0)
    assert both.branches["sample"].tolist() == [0, 0, 3, 3, 4, 4]
    plain = _to_plain(StepRollout(1, 0, both, 1, {}))
    read = _from_plain(plain).rollout
    assert torch.equal(read.branches["input_ids"], both.branches["input_ids"])


@pytest.mark.parametrize("level", ["episode", "turn"])
def test_step_trains_on_all_branches(collect, level: str) -> None:
    rollout = collect(problems(1, 2), Tree, numbered(), num_generations=2)
    rollout.batch["rewards"] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    rollout.batch["turn_rewards"] = torch.zeros(4, 4)
    rollout.batch["turn_rewards"][0, 3] = 1.0
    job = build(
        "grpo.max_num_steps=1",
        "grpo.validation.at_start=false",
        "grpo.validation.at_end=false",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=2",
        "grpo.advantage.normalize_std=false",
        f"grpo.advantage.level={level}",
        "env.tree.class=test_branches.Tree",
        "grpo.logprob_check.period=1",
    )
    give(job, rollout)
    job.run()
    [batch] = job.policy.batches
    assert batch.size == 4 + 4
    assert batch["rewards"].tolist() == [0, 1, 0, 0, 0, 0, 1, 1]
    advantages = batch["advantages"]
    if level == "episode":
        assert advantages.tolist() == [-1, 1, 0, 0, -1, -1, 1, 1]
    else:
        # Only the fourth turn of the first episode has a reward; without a discount all its turns have this return.
        assert advantages.shape == batch["input_ids"].shape
        means = [float(row[mask].mean()) for row, mask in zip(advantages, batch["token_mask"].bool(), strict=True)]
        assert means == [1, -1, 0, 0, 1, 1, -1, -1]
        assert not advantages[batch["token_mask"] == 0].any()
    [(_, records)] = job.recorder.rollouts
    assert [(record["sample"], record["branch"]) for record in records] == [
        *[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
        *[(2, 0), (3, 0)],
    ]
    assert [TOKENIZER.decode(record["tokens"][record["token_mask"]]) for record in records][:3] == [
        "1<eos>2<eos>",
        "3<eos>",
        "4<eos>",
    ]


def give(job: Any, rollout: Rollout) -> None:
    """Let the next step of a job train on this rollout."""
    job._pipeline._collect = lambda *args, **options: rollout
