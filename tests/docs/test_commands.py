"""Every command on the pages is run: here for real but cheaply, by a named test elsewhere, or it says why not.

A command that is not run is in a block behind `<!-- not run: why -->`. A new one fails here until it is one of these.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest
from typer.testing import CliRunner

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.cli.app import app
from nemo_rl.data.datasets import load_datasets
from nemo_rl.utils.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- not run: ([^>]*) -->\n)?^ *```(bash|console|sh|shell)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL
)
PLACEHOLDERS = {"FILE": "examples/configs/grpo_math_embedded.yaml", "section.key=value": "grpo.seed=1"}

# Beginning of a command -> (file, words in it that show that it runs the command).
ELSEWHERE: dict[str, tuple[str, str]] = {
    "pip install uv": (".ci/run", "python3 -m pip install --quiet uv"),
    "uv run --group test pytest": (".ci/run", "uv run --group test pytest"),
    "uv run examples/backends/run_with_transformers_generation.py": (
        "tests/functional/test_own_backend.py",
        "run_with_transformers_generation.py",
    ),
    "uv pip install --no-deps examples/plugin": ("tests/examples/test_plugin.py", '"pip", "install"'),
    "uv run python examples/plugin/run_shorten.py": ("tests/examples/test_plugin.py", '"plugin/run_shorten.py"'),
    "uv run python examples/plugin/run_distance.py": ("tests/examples/test_plugin.py", '"plugin/run_distance.py"'),
    "uv run examples/run_grpo_math.py env.name=reverse": ("tests/examples/test_plugin.py", '"env.name=reverse"'),
    "uv run examples/run_curate_math.py --config examples/configs/curate_arithmetic.yaml": (
        "tests/jobs/test_curate_math.py",
        '"examples/configs/curate_arithmetic.yaml"',
    ),
    "uv run examples/run_grpo_math.py data.train.path=results/curate_arithmetic": (
        "tests/jobs/test_curate_math.py",
        "data.train.path={out / 'problems.parquet'}",
    ),
    "nemo-rl venvs why nemo_rl_plugin.": ("tests/examples/test_plugin.py", '"venvs", "why"'),
    "nemo-rl venvs why my.workers.": ("tests/cli/test_venvs_commands.py", '"why", OLD, "Alpha", "--and", NEW'),
    "nemo-rl venvs build vllm-cpu": ("tests/cli/test_venvs_commands.py", '"build"'),
    "nemo-rl venvs build --offline --from-bundle": ("tests/venvs/transfer/test_bundle.py", '"--from-bundle"'),
    "nemo-rl venvs bundle": ("tests/venvs/transfer/test_bundle.py", '"bundle", "base"'),
    "nemo-rl status": ("tests/jobs/test_submission.py", '"status"'),
    "nemo-rl logs": ("tests/jobs/test_submission.py", '"logs"'),
    "nemo-rl stop": ("tests/jobs/test_submission.py", '"stop"'),
}


@dataclass(frozen=True)
class Command:
    """A command of a page; `why_not` is the page's reason for one that no test runs."""

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


def run_script_without_starting_it(words: list[str]) -> None:
    """A job's script, with `--dry-run`: reads and checks the configuration, and plans. Local data are opened, too."""
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


def run_command_line(words: list[str]) -> None:
    """`nemo-rl ...`; a submission only as far as its report of what would travel."""
    if words[0] == "submit":
        words[1:1] = ["--dry-run", "--working-dir", str(REPOSITORY)]
    result = CliRunner().invoke(app, words)
    # `doctor` ends with 1 where a machine is not fit, which is no fault of the command.
    assert result.exit_code == 0 or (words[0] == "doctor" and result.exit_code == 1), (result.output, result.exception)


RUNNERS: dict[str, Callable[[list[str]], None]] = {
    "uv run examples/run_": run_script_without_starting_it,
    "nemo-rl doctor": run_command_line,
    "nemo-rl plan": run_command_line,
    "nemo-rl submit": run_command_line,
    "nemo-rl venvs list": run_command_line,
}


def runner_of(command: Command) -> Callable[[list[str]], None] | None:
    found = [runner for start, runner in RUNNERS.items() if command.text.startswith(start)]
    return found[0] if found and not elsewhere(command) else None


def elsewhere(command: Command) -> tuple[str, str] | None:
    return next((where for start, where in ELSEWHERE.items() if command.text.startswith(start)), None)


EVERY = sorted(set(commands()), key=str)


def test_no_command_is_left_out() -> None:
    assert len(EVERY) > 30
    lost = [str(c) for c in EVERY if c.why_not is None and not elsewhere(c) and not runner_of(c)]
    assert not lost, "\n".join(["Run these here, in a named test, or mark them `<!-- not run: why -->`:", *lost])


def test_what_is_run_elsewhere_is_run_there() -> None:
    for start, (path, words) in ELSEWHERE.items():
        assert any(command.text.startswith(start) for command in EVERY), f"no page has {start!r} any more"
        assert words in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path} does not run {start!r}"


def test_uv_runs_scripts_in_this_project() -> None:
    """For `uv run SCRIPT` uv takes the project above the script: one in the plugin would not have nemo_rl."""
    scripts = {c.text.split()[2] for c in EVERY if re.match(r"uv run \S+\.py\b", c.text)}
    assert scripts
    for script in scripts:
        assert next(p for p in (REPOSITORY / script).parents if (p / "pyproject.toml").is_file()) == REPOSITORY, script


def test_reasons_are_reasons() -> None:
    assert all(len(command.why_not.split()) > 3 for command in EVERY if command.why_not)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the repository, with data files such as the pages speak of."""
    for name in ("examples", "nemo_rl", "docs", "pyproject.toml", "uv.lock", ".git"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    row = {"problem": "1+1", "question": "1+1", "answer": "That is #### 2", "solution": "2"}
    for name in ("train.jsonl", "test.jsonl", "problems.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    pandas.DataFrame([row]).to_parquet(tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.mark.parametrize("command", [c for c in EVERY if c.why_not is None and runner_of(c)], ids=str)
@pytest.mark.usefixtures("workplace")
def test_the_command_works(command: Command) -> None:
    runner = runner_of(command)
    assert runner is not None
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command.text)]
    runner(words[1:] if words[0] == "nemo-rl" else words[2:])
