"""Tests that every command on the pages is run.

A command runs in this file without side effects, in the test that `RUN_ELSEWHERE` names, or in CI. A command that
cannot run is in a block after `<!-- not run: why -->`. A new command fails here until one of these holds.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.cli.app import app
from nemo_rl.data.conversations import load_conversations
from nemo_rl.data.datasets import load_datasets
from nemo_rl.data.preferences import load_preferences
from nemo_rl.observability.rollout_files import RolloutFiles
from nemo_rl.utils.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- not run: ([^>]*) -->\n)?^ *```(bash|console|sh|shell)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)
PLACEHOLDERS = {"FILE": "examples/configs/grpo_math_embedded.yaml", "section.key=value": "grpo.seed=1"}


class Value(Enum):
    """Stands for a command line argument whose value differs between a page and the test that runs the command."""

    ANY = auto()


ANY = Value.ANY


@dataclass(frozen=True)
class Evidence:
    """Names the test that runs a command of the pages.

    Attributes:
        command: the command as on the pages. ANY stands for a file, venv, worker or job of the page.
        test: `path::function`. The function contains the arguments of the command in order, in one list or call.
        program: number of leading words of `command` that the test replaces by its own program.
    """

    command: tuple[str | Value, ...]
    test: str
    program: int = 1

    def __str__(self) -> str:
        return " ".join("..." if word is ANY else str(word) for word in self.command)


PLUGIN = "tests/examples/test_plugin.py::"
SUBMISSION = "tests/jobs/test_submission.py::test_job_can_be_followed_and_stopped"
WARM_SESSION = "tests/functional/test_warm_session.py::"
FOREIGN = "tests/functional/test_foreign_project.py::"
BUNDLE = "tests/cli/test_venvs_commands.py::test_bundle_prints_the_build_command"
WORDS = "nemo_rl_plugin.words_dataset:WordsDataset"
REVERSE = ("uv", "run", "examples/run_grpo_math.py", "env.name=reverse", f"data.train.kind={WORDS}")

RUN_ELSEWHERE = [
    Evidence(
        ("uv", "run", "examples/hello_workers.py"),
        "tests/examples/test_hello_workers.py::test_pages_show_the_printed_output",
        program=2,
    ),
    Evidence(
        ("uv", "run", "examples/backends/run_with_transformers_generation.py", "grpo.max_num_steps=3"),
        "tests/functional/test_own_backend.py::test_backend_in_one_file_trains",
        program=2,
    ),
    Evidence(("uv", "pip", "install", "--no-deps", "examples/plugin"), PLUGIN + "site"),
    Evidence(
        ("uv", "run", "python", "examples/plugin/run_shorten.py", "texts.jsonl", "shortened"),
        PLUGIN + "test_stage_runs_in_a_venv_with_its_package",
        program=3,
    ),
    Evidence(
        ("uv", "run", "python", "examples/plugin/run_distance.py"),
        PLUGIN + "test_worker_runs_in_a_venv_with_its_package",
        program=3,
    ),
    Evidence(
        ("nemo-rl", "venvs", "why", "nemo_rl_plugin.distance_worker.DistanceWorker", "rapidfuzz"),
        PLUGIN + "test_worker_runs_in_a_venv_with_its_package",
    ),
    Evidence(
        (*REVERSE, "grpo.max_num_steps=2", "grpo.num_prompts_per_step=16"),
        PLUGIN + "test_job_trains_on_the_words_dataset",
        program=2,
    ),
    Evidence(
        (
            *REVERSE,
            f"data.validation.kind={WORDS}",
            "grpo.max_num_steps=2",
            "grpo.num_prompts_per_step=16",
            "grpo.validation.max_num_problems=16",
        ),
        PLUGIN + "test_job_validates_with_the_reverse_environment",
        program=2,
    ),
    Evidence(
        ("nemo-rl", "venvs", "why", ANY, ANY, "--and", ANY),
        "tests/cli/test_venvs_commands.py::test_why_explains_version_and_difference",
    ),
    Evidence(
        ("nemo-rl", "venvs", "build", ANY, ANY),
        "tests/cli/test_venvs_commands.py::test_build_path_list_verify_and_prune",
    ),
    Evidence(("nemo-rl", "venvs", "bundle", ANY, ANY, "--output", ANY), BUNDLE),
    Evidence(("nemo-rl", "venvs", "build", "--offline", "--from-bundle", ANY, ANY, ANY), BUNDLE),
    Evidence(("uvx", "--from", ANY, "nemo-rl", "init", "my-project"), FOREIGN + "project", program=0),
    Evidence(("uv", "run", "run.py"), FOREIGN + "test_new_project_runs_a_worker", program=0),
    Evidence(
        ("uv", "run", "--extra", "distance", "--group", "test", "pytest"),
        FOREIGN + "test_tests_of_the_project_pass",
        program=0,
    ),
    Evidence(("nemo-rl", "add", "mcore"), FOREIGN + "test_new_project_runs_a_worker"),
    Evidence(
        ("nemo-rl", "grpo", "--config", "configs/grpo.yaml", "env.name=exact", "grpo.max_num_steps=2"),
        FOREIGN + "test_job_trains_with_the_environment_of_the_project",
    ),
    Evidence(("nemo-rl", "session", "start"), WARM_SESSION + "session", program=2),
    Evidence(
        ("nemo-rl", "session", "status"), WARM_SESSION + "test_jobs_start_from_templates_and_train_alike", program=2
    ),
    Evidence(
        ("nemo-rl", "session", "stop"), WARM_SESSION + "test_jobs_start_from_templates_and_train_alike", program=2
    ),
    Evidence(("nemo-rl", "status"), SUBMISSION),
    Evidence(("nemo-rl", "logs", "-f", ANY), SUBMISSION),
    Evidence(("nemo-rl", "stop", ANY), SUBMISSION),
]
# Commands that CI runs in `.ci/run`, before or instead of the tests.
RUN_BY_CI = ("pip install uv", "uv run --group test pytest")


@dataclass(frozen=True)
class Command:
    """Holds a command of a page. `why_not` is the page's reason if no test can run it."""

    page: str
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> Iterator[Command]:
    for page in PAGES:
        for why_not, language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                is_output = language == "console" and not line.startswith("$ ")
                for part in [] if is_output else line.removeprefix("$ ").split(" && "):
                    text = " ".join(re.split(r"(?:^|\s)# ?(?=\S)", part, maxsplit=1)[0].split())
                    if text.startswith("uv run nemo-rl "):
                        text = text.removeprefix("uv run ")
                    if text:
                        yield Command(page.name, text, why_not or None)


def dry_run_script(words: list[str]) -> None:
    """Run a job script with `--dry-run`, which validates the configuration and plans the job. Load local data too."""
    script, *arguments = words
    if "--help" not in arguments and "--dry-run" not in arguments:
        arguments.append("--dry-run")
    sys.argv = [script, *arguments]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    assert ended.value.code in (0, None)
    overrides = [argument for argument in arguments if argument.startswith("data.")]
    if overrides and script.endswith("run_grpo_math.py"):
        assert len(load_datasets(load_config(MasterConfig, None, overrides).data)[0])
    if overrides and script.endswith("run_sft.py"):
        assert load_conversations(load_config(SFTJobConfig, None, overrides).data)[0][0]
    if overrides and script.endswith(("run_dpo.py", "run_reward_model.py")):
        assert load_preferences(load_config(DPOJobConfig, None, overrides).data)[0][0]


def run_command_line(words: list[str]) -> None:
    """Run a `nemo-rl` command. `submit` only lists the files to upload."""
    if words[0] == "submit":
        words[1:1] = ["--dry-run", "--working-dir", str(REPOSITORY)]
    result = CliRunner().invoke(app, words)
    # `doctor` exits with 1 if the machine has problems.
    assert result.exit_code == 0 or (words[0] == "doctor" and result.exit_code == 1), (result.output, result.exception)


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "uv run examples/run_": dry_run_script,
    "nemo-rl doctor": run_command_line,
    "nemo-rl plan": run_command_line,
    "nemo-rl rollouts": run_command_line,
    "nemo-rl submit": run_command_line,
    "nemo-rl venvs list": run_command_line,
}


def runner_of(command: Command) -> Callable[[list[str]], None] | None:
    """Find the function that runs a command in this file."""
    if command.text in RUN_BY_CI or evidence_for(command):
        return None
    return next((runner for start, runner in RUNNERS.items() if command.text.startswith(start)), None)


def evidence_for(command: Command) -> Evidence | None:
    """Find the evidence whose words equal those of a command. ANY matches one word that is not an option."""
    words = shlex.split(command.text)
    return next((evidence for evidence in RUN_ELSEWHERE if matches(evidence.command, words)), None)


def matches(pattern: Sequence[str | Value], words: Sequence[str | None]) -> bool:
    """Return whether each word equals its pattern, or the pattern is ANY and the word is not an option."""
    return len(pattern) == len(words) and all(
        not (word or "").startswith("-") if expected is ANY else word == expected
        for expected, word in zip(pattern, words)
    )


def argument_lists(function: ast.AST) -> Iterator[list[str | None]]:
    """Yield the elements of each list and tuple and the arguments of each call; None for values but strings."""
    for node in ast.walk(function):
        elements = node.elts if isinstance(node, (ast.List, ast.Tuple)) else getattr(node, "args", None)
        if isinstance(elements, list):
            yield [e.value if isinstance(e, ast.Constant) and isinstance(e.value, str) else None for e in elements]


def runs(test: str, arguments: Sequence[str | Value]) -> bool:
    """Return whether a test function contains `arguments` in order and without gaps, in one list or call."""
    path, _, name = test.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return any(
        matches(arguments, elements[start : start + len(arguments)])
        for elements in argument_lists(function)
        for start in range(len(elements))
    )


EVERY = sorted(set(commands()), key=str)


def test_every_command_is_run() -> None:
    assert len(EVERY) > 30
    not_run = [
        str(command)
        for command in EVERY
        if command.why_not is None
        and command.text not in RUN_BY_CI
        and not evidence_for(command)
        and not runner_of(command)
    ]
    assert not not_run, "\n".join(
        ["Run these here or in a named test, or mark them `<!-- not run: why -->`:", *not_run]
    )


@pytest.mark.parametrize("evidence", RUN_ELSEWHERE, ids=str)
def test_evidence_runs_the_command(evidence: Evidence) -> None:
    assert any(evidence_for(command) is evidence for command in EVERY), "no page has this command"
    assert runs(evidence.test, evidence.command[evidence.program :]), f"{evidence.test} does not run it"


@pytest.mark.parametrize("arguments", [("venvs", "build"), ("status", "--all"), ("stop", "long-two"), ("logs", "-f")])
def test_partial_or_other_arguments_are_no_evidence(arguments: tuple[str, ...]) -> None:
    assert not runs(SUBMISSION, (*arguments, "long-one", ANY))


def test_ci_runs_its_commands() -> None:
    lines = [line.split() for line in (REPOSITORY / ".ci" / "run").read_text().splitlines()]
    for command in RUN_BY_CI:
        assert any(each.text == command for each in EVERY), f"no page has {command!r}"
        words = command.split()
        assert any([word for word in line if word in words][-len(words) :] == words for line in lines), command


def test_uv_runs_scripts_in_this_project() -> None:
    """`uv run SCRIPT` uses the project that contains the script. A script in the plugin would not find nemo_rl."""
    scripts = {c.text.split()[2] for c in EVERY if re.match(r"uv run \S+\.py\b", c.text)}
    assert scripts
    for script in scripts:
        assert next(p for p in (REPOSITORY / script).parents if (p / "pyproject.toml").is_file()) == REPOSITORY, script


def test_reasons_have_several_words() -> None:
    assert all(len(command.why_not.split()) > 3 for command in EVERY if command.why_not)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory with the files of the repository and the data files that the pages use."""
    for name in ("examples", "nemo_rl", "docs", "pyproject.toml", "uv.lock", ".git"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    row = {"problem": "1+1", "question": "1+1", "answer": "That is #### 2", "solution": "2"}
    for name in ("train.jsonl", "test.jsonl", "problems.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    chat = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}
    for name in ("chats.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(json.dumps(chat) + "\n")
    for name in ("pairs.jsonl", "held_out_pairs.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": "1+1", "chosen": "2", "rejected": "3"}) + "\n")
    curated = tmp_path / "results" / "curate_arithmetic"
    curated.mkdir(parents=True)
    for path in (tmp_path / "train.parquet", curated / "problems.parquet", curated / "held_out.parquet"):
        pandas.DataFrame([row]).to_parquet(path)
    model = tmp_path / "results/grpo_math_embedded/001/checkpoints/step_000120/policy/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    tuned = tmp_path / "results/sft_embedded/001/checkpoints/step_000064/policy/model"
    tuned.mkdir(parents=True)
    (tuned / "config.json").write_text("{}")
    files = RolloutFiles(model.parents[3], limit_mb=1, resume_step=None)
    files.write(
        1,
        [
            {
                "environment": "math",
                "sample": 3,
                "reward": 0.0,
                "turns": 1,
                "num_tokens": 5,
                "end": "done",
                "outcome": "trained",
                "failure": "",
                "messages": [{"role": "assistant", "content": "-1"}],
            }
        ],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [c for c in EVERY if c.why_not is None and runner_of(c)], ids=str)
@pytest.mark.usefixtures("workplace")
def test_command_works(command: Command) -> None:
    runner = runner_of(command)
    assert runner is not None
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command.text)]
    runner(words[1:] if words[0] == "nemo-rl" else words[2:])
