"""`nemo-rl rollouts` on the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nemo_rl.cli.app import app
from nemo_rl.errors import ConfigError
from nemo_rl.observability.rollout_files import RolloutFiles


def sample(number: int, environment: str, *replies: str, reward: float | None = 0.0, **values: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{environment} {number}"}]
    for reply in replies:
        messages.append({"role": "assistant", "content": reply, "reward": 0.5})
        messages.append({"role": "tool", "content": "next"})
    return {
        "environment": environment,
        "problem": "7",
        "sample": number,
        "group": 0,
        "num_tokens": 10 * len(replies),
        "turns": len(replies),
        "reward": reward,
        "advantage": 0.25,
        "end": "done",
        "outcome": "trained",
        "failure": "",
        "attempts": 1,
        "messages": messages,
        "weights_version": 4,
        **values,
    }


@pytest.fixture
def run(tmp_path: Path) -> str:
    files = RolloutFiles(tmp_path, limit_mb=10, resume_step=None)
    for step in (1, 2, 3, 4):
        samples = [
            sample(0, "nim", "take 2", f"take\n{step} Stones\x1b[2J", reward=1.0),
            sample(1, "nim", "take 1", reward=0.0, outcome="masked", end="max_turns"),
            sample(2, "shop", "buy tea", reward=None, outcome="masked", end="failed", failure="the server is gone"),
            sample(3, "shop", "buy 2", reward=0.5, outcome="replaced: its group has no learning signal", group=None),
        ]
        files.write(step, samples)
    return str(tmp_path)


def rollouts(*words: str) -> Result:
    return CliRunner().invoke(app, ["rollouts", *words])


def test_show_prints_the_last_step(run: str) -> None:
    result = rollouts("show", run, "--environment", "nim", "--sample", "0")
    assert result.exit_code == 0
    assert result.stdout == (
        "=== step 4  nim  sample 0  problem 7  group 0\n[user]\nnim 0\n[assistant]  reward 0.5\ntake 2\n[tool]\nnext\n"
        "[assistant]  reward 0.5\ntake\n4 Stones�[2J\n[tool]\nnext\n"
        "--- reward 1, advantage 0.25; end: done; trained; 2 turns, 20 tokens; weights of step 4\n\n"
    )


def test_show_selects(run: str) -> None:
    masked = rollouts("show", run, "--step", "2", "--outcome", "masked", "--json")
    assert [(row["step"], row["sample"]) for row in json.loads(masked.stdout)] == [(2, 1), (2, 2)]
    failed = rollouts("show", run, "--sample", "2")
    assert "--- no reward, advantage 0.25; end: failed; masked" in failed.stdout
    assert "failure: the server is gone" in failed.stdout
    limited = rollouts("show", run, "--limit", "1")
    assert limited.stdout.count("===") == 1
    assert "3 more samples; --limit 0 shows all" in limited.stderr
    assert rollouts("show", run, "--limit", "0").stdout.count("===") == 4
    nothing = rollouts("show", run, "--sample", "9")
    assert (nothing.exit_code, nothing.stdout, nothing.stderr) == (1, "", "no sample matches\n")


def test_grep_prints_matching_lines(run: str) -> None:
    result = rollouts("grep", r"^\d stones", run, "-i")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"step {n}  nim  sample 0  assistant: {n} Stones�[2J" for n in (1, 2, 3, 4)]
    found = json.loads(rollouts("grep", "buy", run, "--step", "3", "--outcome", "replaced", "--json").stdout)
    assert found == [
        {"step": 3, "environment": "shop", "sample": 3, "message": 1, "role": "assistant", "line": "buy 2"}
    ]
    assert rollouts("grep", r"take\n\d", run, "--step", "1").stdout.endswith("assistant: take\n1 Stones�[2J\n")
    nothing = rollouts("grep", "stones", run)
    assert (nothing.exit_code, nothing.output) == (1, "")


def test_stats_of_environments_and_ranges(run: str) -> None:
    result = rollouts("stats", run, "--ranges", "2")
    assert result.stdout.splitlines() == [
        "environment  steps  episodes  reward  turns  tokens  masked  failed  replaced  ends",
        "nim          1-2    4         0.500   1.5    15.0    2       0       0         done 2, max_turns 2",
        "nim          3-4    4         0.500   1.5    15.0    2       0       0         done 2, max_turns 2",
        "shop         1-2    2                                2       2       2         failed 2",
        "shop         3-4    2                                2       2       2         failed 2",
    ]
    steps = json.loads(rollouts("stats", run, "--environment", "nim", "--json").stdout)
    assert [row["steps"] for row in steps] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "RUN", "--step", "5"], r"--step 5: the run has kept the rollouts of steps 1 to 4"),
        (["stats", "RUN", "--environment", "nin"], r"--environment nin: .* did you mean 'nim'\?"),
        (["show", "RUN", "--outcome", "mask"], r"unknown outcome; did you mean 'masked'\?"),
        (["grep", "(", "RUN"], r"'\(' is not a regular expression: missing \)"),
        (["show", "RUN/rollouts"], r"neither config.yaml nor rollouts"),
        (["stats", "RUN/nowhere"], r"nowhere is not a directory"),
    ],
)
def test_errors_are_one_sentence(run: str, words: list[str], message: str) -> None:
    result = rollouts(*(word.replace("RUN", run) for word in words))
    assert isinstance(result.exception, ConfigError)
    assert "\n" not in str(result.exception)
    with pytest.raises(ConfigError, match=message):
        raise result.exception
