"""A language model as a judge, on a real HTTP server in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from episode_replies import next_replies
from judge_server import Answer, JudgeServer, completion, refusal

from nemo_rl.environments.config import EnvironmentConfig, EnvironmentEntry
from nemo_rl.environments.episode_calls import Reply, Request
from nemo_rl.environments.episode_host import EpisodeHost
from nemo_rl.environments.judge import read_score
from nemo_rl.environments.registry import entry_runtime_env
from nemo_rl.environments.scoring_config import JudgeConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.roles import environment_roles
from nemo_rl.utils.config import validate

JUDGE = "nemo_rl.environments.judge.Judge"
KEY = "key-of-the-judge-8141"
PROBLEM = {"seed": 40, "prompt": "What is 5 + 3?", "answer": "8"}
TEMPLATE = '{problem} | {answer} | {reference} | answer as {"score": 0.5}'


class Script:
    """Answers requests in turn with `answers`; when one is left, with this one."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.server = JudgeServer(lambda request: self.answers.pop(0) if self.answers[1:] else self.answers[0])
        self.requests = self.server.requests

    def says(self, *texts: str) -> None:
        self.answers = [completion(text) for text in texts]


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.server.close()


@pytest.fixture
def play(script: Script) -> Iterator[Callable[..., Reply]]:
    """Return a function that judges one answer."""
    hosts: list[EpisodeHost] = []

    def judge(answer: str, problem: dict[str, Any] = PROBLEM, **config: Any) -> Reply:
        settings = {
            "base_url": script.server.url,
            "model": "gpt",
            "template": TEMPLATE,
            "json_field": "score",
            **config,
        }
        hosts.append(EpisodeHost(JUDGE, settings))
        hosts[-1].submit([Request(0, "reset", problem), Request(0, "step", answer)])
        return next_replies(hosts[-1], 2)[1]

    yield judge
    for host in hosts:
        host.shutdown()


def test_judge_reads_the_template_and_its_score_is_the_reward(script: Script, play) -> None:
    script.says('I think {"score": 0.1}. No: {"score": 0.75, "why": "right"}')
    reply = play("<think>5 + 3</think> It is {reference}.", options={"temperature": 0}, scale=2.0)
    assert reply.value is not None, reply.details
    assert (reply.value["reward"], reply.value["done"]) == (1.5, True)
    assert reply.value["info"] == {"asks": 1.0, "score": 0.75}
    assert [message["role"] for message in reply.value["messages"]] == ["judge"]
    assert "No: " in reply.value["messages"][0]["content"]
    [request] = script.requests
    [message] = request.pop("messages")
    assert message["content"] == 'What is 5 + 3? | It is {reference}. | 8 | answer as {"score": 0.5}'
    assert request == {"model": "gpt", "seed": 40, "temperature": 0}


def test_unreadable_answers_are_asked_again_and_never_a_reward(script: Script, play) -> None:
    script.says("It is right.", '{"score": 7}', '{"score": 1}')
    reply = play("8")
    assert reply.value is not None, reply.details
    assert (reply.value["reward"], reply.value["info"]["asks"]) == (1.0, 3.0)
    assert [request["seed"] for request in script.requests] == [40, 41, 42]
    script.says('{"score": 7}')
    reply = play("8", max_asks=2)
    assert reply.value is None
    assert str(reply.failure).endswith("the judge gpt gave no score in 2 answers: 7 is outside of score_range, 0 to 1")
    assert len(script.requests) == 5


def test_busy_servers_and_lost_connections_are_tried_again(script: Script, play) -> None:
    script.answers = [refusal(429), refusal(503), (0, None, {}), completion('{"score": 1}')]
    reply = play("8")
    assert reply.value is not None, reply.details
    assert (reply.value["reward"], reply.value["info"]["asks"], len(script.requests)) == (1.0, 1.0, 4)


def test_refusal_of_the_server_is_a_failure_without_the_key(script: Script, play, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    script.answers = [refusal(401, f"the key {KEY} is not valid")]
    reply = play("8", api_key_variable="JUDGE_KEY")
    assert script.server.authorizations == [f"Bearer {KEY}"]  # and no second try
    assert reply.value is None
    assert f"the judge at {script.server.url} does not answer: Error code: 401" in str(reply.failure)
    assert "the key ******** is not valid" in str(reply.failure)
    assert KEY not in f"{reply.failure}{reply.details}"
    script.answers = [refusal(500)]
    assert "Error code: 500" in str(play("8", max_retries=1).failure)
    assert len(script.requests) == 3


def test_server_that_does_not_exist_is_a_failure(play) -> None:
    failure = str(play("8", base_url="http://127.0.0.1:9/v1", max_retries=0).failure)
    assert "the judge at http://127.0.0.1:9/v1 does not answer: Connection error." in failure


def test_conversation_of_another_environment(script: Script, play) -> None:
    script.says("Verdict: No", "Verdict: Yes")
    config = {"template": "{conversation}", "json_field": None, "pattern": r"Verdict: (\w+)"}
    verdicts = {"yes": 1.0, "no": -1.0}
    environment = {"class": "nemo_rl.environments.games.GuessNumber", "config": {"max_guesses": 1}}
    reply = play("ten", {"seed": 1}, **config, verdicts=verdicts, environment=environment, sends_seed=False)
    assert reply.value is not None, reply.details
    assert reply.value["reward"] == -1.0
    assert reply.value["info"] == {"won": 0.0, "guesses": 1.0, "asks": 1.0, "score": -1.0, "environment_reward": 0.0}
    [request] = script.requests
    assert request["messages"][0]["content"] == "user: Guess a number from 1 to 20\n\nassistant: ten"
    assert "seed" not in request
    assert play("8", **config, verdicts=verdicts).value["reward"] == 1.0


def test_reference_that_is_missing_is_a_failure(script: Script, play) -> None:
    script.says('{"score": 1}')
    reply = play("8", {"seed": 1, "prompt": "5 + 3"})
    assert "the template has {reference}, but the problem has no expected answer" in str(reply.failure)
    assert script.requests == []


def judge_config(**keys: Any) -> JudgeConfig:
    return JudgeConfig(base_url="http://localhost/v1", model="judge", template="{answer}", **keys)


@pytest.mark.parametrize(
    ("keys", "verdict", "expected"),
    [
        ({"json_field": "score"}, '```json\n{"score": "0.5"}\n```', 0.5),
        ({"json_field": "score"}, '<think>{"score": 1}</think>{"score": 0}', 0.0),
        ({"json_field": "score"}, '{"a": {"score": 1}}', "a JSON object with the field 'score' is not in"),
        ({"json_field": "score"}, '{"score": 1', "a JSON object with the field 'score' is not in"),
        ({"json_field": "score"}, '{"score": true}', "'True' is no number"),
        ({"json_field": "score"}, '{"score": NaN}', "nan is outside of score_range, 0 to 1"),
        ({"json_field": "score"}, '{"a":' * 5000, "is not in"),
        ({"json_field": "right", "verdicts": {"true": 1, "false": 0}}, '{"right": false}', 0.0),
        ({"pattern": r"\[\[(.+?)\]\]", "score_range": [1, 10]}, "[[3]] or [[8.5]]", 8.5),
        ({"pattern": r"\[\[(.+?)\]\]", "score_range": [1, 10]}, "[[0]]", "0 is outside of score_range, 1 to 10"),
        ({"pattern": "([ABC])$", "verdicts": {"A": 1, "B": 0}}, "C", "'C' is none of A, B"),
        ({"pattern": "score (.)"}, "", "the pattern 'score (.)' is not in ''"),
    ],
)
def test_scores_are_read_from_the_last_verdict(keys: dict[str, Any], verdict: str, expected: float | str) -> None:
    if isinstance(expected, float):
        assert read_score(judge_config(**keys), verdict) == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_score(judge_config(**keys), verdict)


RIGHT = {"base_url": "http://localhost/v1", "model": "judge", "template": "{answer}", "pattern": "(.)"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"template": "{anwser}"}, "template: there is no placeholder {anwser}; did you mean 'answer'?"),
        ({"template": "{problem}"}, "template: it has neither {answer} nor {conversation}"),
        ({"pattern": "(.", "json_field": None}, "pattern: it is no regular expression: missing ), unterminated"),
        ({"pattern": "."}, "pattern: it has 0 groups; put the score, and only it, into parentheses"),
        ({"verdicts": yaml.safe_load("{yes: 1, no: 0}")}, "verdicts: the word True is no text; write it in quotes"),
        ({"json_field": "score"}, "set either pattern or json_field"),
        ({"base_url": "localhost:8000"}, "base_url: an address begins with http:// or https://"),
        ({"score_range": [1, 1]}, "score_range: give two finite numbers, the lower one first"),
        ({"api_key_variable": "NO_SUCH_KEY"}, "env.graded.config.api_key_variable: the variable NO_SUCH_KEY is not s"),
        ({"temperature": 0}, "unknown key temperature"),
    ],
)
def test_what_a_job_refuses_before_it_starts(keys: dict[str, Any], expected: str) -> None:
    env = validate(EnvironmentConfig, {"graded": {"class": "judge", "config": {**RIGHT, **keys}}}, "env")
    with pytest.raises(ConfigError) as caught:
        environment_roles(env)
    assert str(caught.value).startswith("env.graded.config")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_receive_the_key_and_the_configuration_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    keys = {**RIGHT, "api_key_variable": "JUDGE_KEY"}
    env = validate(
        EnvironmentConfig,
        {"graded": {"class": "judge", "config": keys, "runtime_env": {"env_vars": {"A": "1"}}}},
        "env",
    )
    [role] = environment_roles(env)
    assert (role.name, role.fqn) == ("environment graded", JUDGE)
    entry = env.entries()["graded"]
    assert entry_runtime_env("env.graded", entry) == {"env_vars": {"JUDGE_KEY": KEY, "A": "1"}}
    assert KEY not in repr(env)
    plain = EnvironmentEntry(class_="judge", config=RIGHT)
    assert entry_runtime_env("env.graded", plain) is None
