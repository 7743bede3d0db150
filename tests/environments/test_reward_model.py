"""A reward model as an environment, compared with a direct forward pass of transformers."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from episode_replies import next_replies
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from nemo_rl.environments.config import EnvironmentConfig
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.environments.reward_model import RewardModelScorer
from nemo_rl.environments.scoring import Conversation
from nemo_rl.environments.scoring_config import RewardModelConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.roles import environment_roles
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.policy.config import EMBEDDED_CHAT_MODEL
from nemo_rl.utils.config import validate

REWARD_MODEL = "nemo_rl.environments.reward_model.RewardModel"
ANSWERS = ["8", "12 or 13", "", "I cannot compute this.", "<think>no</think> 7"]
MULTIPLICATION = "nemo_rl.environments.games.Multiplication"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a reward model with random weights, and return its directory."""
    directory = tmp_path_factory.mktemp("reward_model")
    tokenizer = make_tokenizer(EMBEDDED_CHAT_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def changed(model: Path, tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """Return a function that copies the model and changes keys of one of its JSON files."""

    def change(file: str, keys: dict[str, Any]) -> Path:
        copy = shutil.copytree(model, tmp_path / "changed")
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | keys))
        return copy

    return change


@pytest.fixture
def start() -> Iterator[Callable[..., EpisodeHost]]:
    hosts = []

    def make(**config: Any) -> EpisodeHost:
        hosts.append(EpisodeHost(REWARD_MODEL, config))
        return hosts[-1]

    yield make
    for host in hosts:
        host.shutdown()


def play(host: EpisodeHost, problem: dict[str, Any], *actions: str) -> list[Reply]:
    """Play one episode; return the replies to its actions."""
    host.submit([Request(0, "reset", problem), *(Request(0, "step", action) for action in actions)])
    return next_replies(host, 1 + len(actions))[1:]


def direct_score(model: Path, messages: list[dict[str, Any]], last: int | None = None, **variables: Any) -> float:
    """Return the score of one conversation, of its `last` tokens, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    input_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -(last or 0) :]
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(model)(input_ids=input_ids).logits.item()


def conversation(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def in_threads(scorer: RewardModelScorer, score: Callable[[str], None], answers: list[str]) -> None:
    """Call `score` for each answer in a thread, so that all answers wait for the model together."""
    threads = [threading.Thread(target=score, args=[answer]) for answer in answers]
    with scorer._lock:  # as if the model were busy
        for thread in threads:
            thread.start()
        while len(scorer._waiting) < len(answers):
            time.sleep(0.01)
    for thread in threads:
        thread.join()


def test_scores_of_a_batch_equal_those_of_transformers(model: Path) -> None:
    scorer = RewardModelScorer(RewardModelConfig(model=str(model), batch_size=2))
    sizes: list[int] = []
    scorer._model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores: dict[str, float] = {}

    def score(answer: str) -> None:
        scores[answer] = scorer.score(Conversation({}, conversation("5+3", answer), 1)).value

    in_threads(scorer, score, ANSWERS)
    assert sizes == [2, 2, 1]
    expected = {answer: direct_score(model, conversation("5+3", answer)) for answer in ANSWERS}
    assert len(set(expected.values())) == len(ANSWERS)
    assert scores == pytest.approx(expected, abs=1e-6)


def test_reward_is_the_scaled_and_clamped_score(model: Path, start) -> None:
    expected = direct_score(model, conversation("5+3", "8"))
    [reply] = play(start(model=str(model), scale=-2.0, offset=0.5), {"seed": 1, "prompt": "5+3"}, "8")
    assert reply.value is not None, reply.details
    assert (reply.value["done"], reply.value["truncated"]) == (True, False)
    assert reply.value["reward"] == pytest.approx(0.5 - 2.0 * expected, abs=1e-6)
    assert reply.value["info"] == {"score": pytest.approx(expected, abs=1e-6)}
    [reply] = play(start(model=str(model), offset=100.0, clamp=[-1.0, 3.0]), {"seed": 1, "prompt": "5+3"}, "8")
    assert reply.value is not None
    assert reply.value["reward"] == 3.0


def test_prompt_may_be_chat_messages(model: Path, start) -> None:
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "5+3"}]
    [reply] = play(start(model=str(model)), {"seed": 1, "prompt": prompt}, "8")
    expected = direct_score(model, [*prompt, {"role": "assistant", "content": "8"}])
    assert reply.value is not None, reply.details
    assert reply.value["reward"] == pytest.approx(expected, abs=1e-6)


def test_long_conversations_fail_or_lose_their_beginning(model: Path, start) -> None:
    problem, answer = {"seed": 1, "prompt": "5+3"}, "12345678"
    [reply] = play(start(model=str(model), max_length=10), problem, answer)
    assert reply.failure is not None
    assert "the conversation has 15 tokens, and the reward model reads at most 10" in reply.failure
    [reply] = play(start(model=str(model), max_length=10, too_long="truncate"), problem, answer)
    assert reply.value is not None, reply.details
    expected = direct_score(model, conversation("5+3", answer), last=10)
    assert reply.value["reward"] == pytest.approx(expected, abs=1e-6)
    [reply] = play(start(model=str(model)), problem, "1" * 300)  # the context of the model
    assert "reads at most 256" in str(reply.failure)


def test_score_that_is_not_a_number_is_a_failure(model: Path, start, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "nan")
    broken = LlamaForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    broken.save_pretrained(copy)
    [reply] = play(start(model=str(copy), clamp=[0.0, 1.0]), {"seed": 1, "prompt": "5+3"}, "8")
    assert reply.value is None
    assert "the score is nan; it must be finite" in str(reply.failure)


def test_scores_the_episodes_of_another_environment(model: Path, start) -> None:
    environment = {"class": MULTIPLICATION, "reward_weight": 0.25}
    call = '<tool_call>{"name": "calculator", "arguments": {"expression": "337*86"}}</tool_call>'
    host = start(model=str(model), environment=environment)
    host.submit([Request(0, "reset", {"seed": 1}), Request(0, "step", call), Request(0, "step", "28982")])
    first, second, third = (reply.value for reply in next_replies(host, 3))
    assert first is not None
    assert first["messages"] == [{"role": "user", "content": "337*86"}]
    assert second is not None
    assert (second["reward"], second["done"], second["info"]["tool_calls"]) == (0.0, False, 1.0)
    messages = [*first["messages"], {"role": "assistant", "content": call}, *second["messages"]]
    expected = direct_score(model, [*messages, {"role": "assistant", "content": "28982"}], tools=first["tools"])
    assert third is not None
    assert third["reward"] == pytest.approx(expected + 0.25, abs=1e-6)
    assert third["info"]["environment_reward"] == 1.0
    assert third["info"]["tool_calls"] == 1.0


def test_tokenizer_without_chat_template(model: Path, start, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "plain")
    (copy / "chat_template.jinja").unlink()
    [reply] = play(start(model=str(copy)), {"seed": 1, "prompt": "5+3="}, "8")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokens = [*tokenizer("5+3=8")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(model)(input_ids=torch.tensor([tokens])).logits
    assert reply.value is not None, reply.details
    assert reply.value["reward"] == pytest.approx(logits.item(), abs=1e-6)


def test_without_a_prompt_there_is_nothing_to_score(model: Path, start) -> None:
    host = start(model=str(model))
    host.submit([Request(0, "reset", {"seed": 1, "prompt": ""})])
    assert "the problem has no prompt" in str(next_replies(host, 1)[0].failure)


def test_model_without_a_trained_score_is_refused(model: Path, changed) -> None:
    weights = changed("config.json", {"architectures": None})
    LlamaForCausalLM(LlamaConfig.from_pretrained(weights)).save_pretrained(weights)
    with pytest.raises(ConfigError, match=r"has no weights for score\.weight"):
        RewardModelScorer(RewardModelConfig(model=str(weights)))


def test_what_a_job_refuses_before_it_starts(model: Path, changed) -> None:
    def refused(config: dict[str, Any]) -> str:
        env = validate(EnvironmentConfig, {"liked": {"class": "reward_model", "config": config}}, "env")
        with pytest.raises(ConfigError) as caught:
            environment_roles(env)
        return str(caught.value)

    assert refused({"model": str(model), "batchsize": 2}) == (
        "env.liked.config: unknown key batchsize; did you mean batch_size?"
    )
    assert refused({"model": "./none"}).startswith("env.liked.config.model: there is no directory ./none")
    assert "clamp: give two finite numbers" in refused({"model": str(model), "clamp": [1, 0]})
    assert refused({"model": str(model), "environment": {"class": "nemo_rl.environments.games.Chess"}}).startswith(
        "env.liked.config.environment.class=nemo_rl.environments.games.Chess: "
    )
    directory = changed("config.json", {"architectures": ["LlamaForCausalLM"]})
    assert f"env.liked.config.model: {directory} is a LlamaForCausalLM" in refused({"model": str(directory)})
    config = json.loads((directory / "config.json").read_text())
    labels = {"0": "bad", "1": "good", "2": "better"}
    (directory / "config.json").write_text(json.dumps({**config, "architectures": None, "id2label": labels}))
    assert f"{directory} has 3 labels; a reward model has one" in refused({"model": str(directory)})


def test_has_a_section_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"write env\.reward_model\.class=reward_model"):
        environment_roles(EnvironmentConfig(name="reward_model"))


def test_agents_cannot_be_scored(model: Path, start) -> None:
    with pytest.raises(ConfigError, match="is an agent, which has several conversations"):
        start(model=str(model), environment={"class": "nemo_rl.environments.agent.Agent"})


def test_error_of_a_batch_reaches_all_its_conversations(model: Path) -> None:
    scorer = RewardModelScorer(RewardModelConfig(model=str(model)))

    def run_out_of_memory(module: Any, args: Any) -> None:
        raise RuntimeError("out of memory")

    hook = scorer._model.register_forward_pre_hook(run_out_of_memory)
    errors: list[str] = []

    def score(answer: str) -> None:
        try:
            scorer.score(Conversation({}, conversation("5+3", answer), 1))
        except RuntimeError as error:
            errors.append(str(error))

    in_threads(scorer, score, ANSWERS)
    assert errors == ["out of memory"] * len(ANSWERS)
    hook.remove()
    score("8")
    assert len(errors) == len(ANSWERS)
