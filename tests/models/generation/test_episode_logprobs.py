"""Episodes with a real generator: log-probabilities of every turn, and draws that do not depend on the waves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch

from nemo_rl.algorithms.episodes import EpisodeCollector
from nemo_rl.algorithms.rollouts import Rollout
from nemo_rl.data.config import DataConfig
from nemo_rl.data.transcripts import TranscriptRenderer
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.environments.agent import Agent, Model
from nemo_rl.environments.config import EpisodeLimits
from nemo_rl.environments.episode import Environment, Turn
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.observability.timer import Timer

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Echo(Environment):
    """Repeats the length of each action; `delay_s` of the problem's number per step."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def reset(self, problem: dict[str, Any]) -> str:
        self.seed, self.turn = problem["seed"], 0
        return f"say {self.seed}"

    def step(self, action: str) -> Turn:
        time.sleep(self.delay_s * self.seed)
        self.turn += 1
        return Turn(float(len(action)), f"{len(action)} letters", done=self.turn > self.seed % 3)


class EchoAgent(Agent):
    """The same game, played by requests to the model; asks two questions more, which branch off, if `branches`."""

    def __init__(self, delay_s: float = 0.0, *, branches: bool = False) -> None:
        self.game, self.branches = Echo(delay_s), branches

    def run(self, problem: dict[str, Any], model: Model) -> float:
        with openai.OpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0) as api:

            def ask(messages: list[Any]) -> Any:
                return api.chat.completions.create(model=model.name, messages=messages).choices[0].message

            messages: list[Any] = [{"role": "user", "content": self.game.reset(problem)}]
            messages.append(ask(messages))
            first, reward, done = messages[:], 0.0, False
            while not done:
                turn = self.game.step(messages[-1].content)
                reward, done = reward + turn.reward, turn.done
                if not done:
                    messages.append({"role": "user", "content": turn.observation})
                    messages.append(ask(messages))
            if self.branches:
                ask([*first, {"role": "user", "content": "again"}])
                ask([{"role": "user", "content": "summary"}])
        return reward


@dataclass
class InProcess:
    """The streaming interface of generation, on one engine in this process."""

    generator: TorchGenerator
    max_concurrent_calls = 1

    def stream(self, prompts: BatchedDataDict, *, rows: list[int], **options: Any) -> Iterator:
        yield from self.generator.stream(GenerationRequest.for_prompts(prompts, rows=rows, **options))


def collect(model: Any, *, chat: bool, environment: type = Echo, **config: Any) -> Rollout:
    model.tokenizer.chat_template = CHATML if chat else None
    generator = model.generator(max_new_tokens=6, max_sequence_length=200)
    host = EpisodeHost(f"{__name__}.{environment.__name__}", config)
    collector = EpisodeCollector(
        {"echo": host},
        {"echo": EpisodeLimits()},
        InProcess(generator),
        TranscriptRenderer(model.tokenizer, DataConfig(), has_turns=True),
        max_sequence_length=200,
        pad_token_id=0,
    )
    seeds = [1, 2, 3]
    problems = BatchedDataDict(
        input_ids=torch.zeros(3, 1, dtype=torch.int64),
        input_lengths=torch.zeros(3, dtype=torch.int64),
        problem_index=torch.tensor(seeds),
        question=[""] * 3,
        answer=[""] * 3,
        metadata=[{"seed": seed} for seed in seeds],
    )
    try:
        return collector.collect(problems, num_generations=2, seed=5, timer=Timer())
    finally:
        collector.close()
        host.shutdown()
        model.tokenizer.chat_template = None


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logprobs_of_all_turns_match_one_forward_pass(tiny, name: str, chat: bool) -> None:
    model = tiny(name)
    batch = collect(model, chat=chat).batch
    assert len(set(batch["input_lengths"].tolist())) > 1
    assert_logprobs_match(model, batch)


def assert_logprobs_match(model: Any, batch: BatchedDataDict) -> None:
    """Compare the log-probabilities of generation with those of one forward pass over each row."""
    for ids, length, mask, logprobs in zip(
        batch["input_ids"], batch["input_lengths"], batch["token_mask"], batch["generation_logprobs"], strict=True
    ):
        ids, sampled = ids[:length], mask[:length].bool()
        with torch.no_grad():
            expected = model.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        expected = expected.gather(1, ids[1:, None])[:, 0][sampled[1:]]
        torch.testing.assert_close(logprobs[:length][sampled], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("chat", [True, False])
def test_agent_plays_as_an_environment_does(tiny, chat: bool) -> None:
    """Requests of an agent have the tokens, draws and log-probabilities of the same game as an environment."""
    model = tiny("llama")
    played, driven = collect(model, chat=chat), collect(model, chat=chat, environment=EchoAgent)
    assert driven.completions == played.completions
    assert driven.rewards.tolist() == played.rewards.tolist()
    assert driven.branches is None
    for key in ("input_ids", "token_mask", "turn_index", "generation_logprobs"):
        torch.testing.assert_close(driven.batch[key], played.batch[key])


def test_logprobs_of_branches_match_one_forward_pass(tiny) -> None:
    model = tiny("llama")
    rollout = collect(model, chat=True, environment=EchoAgent, branches=True)
    assert rollout.branches is not None
    # In a game with one turn, "again" follows the last action, so it is no branch.
    assert rollout.branches["sample"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
    assert (rollout.branches["token_mask"].sum(dim=1) > 0).all()
    assert_logprobs_match(model, rollout.batch)
    assert_logprobs_match(model, rollout.branches)


def test_waves_do_not_change_the_draws(tiny) -> None:
    """With slow steps the episodes of different problems are sampled in other waves."""
    model = tiny("llama")
    fast, slow = (collect(model, chat=True, delay_s=delay_s) for delay_s in (0.0, 0.1))
    assert fast.completions == slow.completions
    assert len(set(fast.completions)) > 3
    torch.testing.assert_close(fast.batch["input_ids"], slow.batch["input_ids"])
