"""The HTML report of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_rl.errors import ConfigError
from nemo_rl.observability import report
from nemo_rl.observability.logger import EPISODES_FILE, METRICS_FILE, SAMPLES_FILE, Logger
from nemo_rl.observability.logger_config import LoggerConfig
from nemo_rl.observability.report_conversations import accounts, conversations
from nemo_rl.observability.report_figures import (
    environment_curves,
    environment_names,
    phase_names,
    series,
    smoothed,
)
from nemo_rl.observability.timer import FIRST_STEP, Timeline
from nemo_rl.utils.jsonl import read_jsonl

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[2J{{ 7*7 }}"


class Page(HTMLParser):
    """Parses a page: its sections, its text outside SVG, and everything that a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "img", "link", "path", "use", "rect", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.text = ""
        self.active: list[str] = []
        self.fetched: list[str] = []
        self.num_svgs = 0
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self._open.append(tag)
        self.num_svgs += tag == "svg"
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on") or tag in ("script", "iframe", "object", "embed"):
                self.active.append(f"{tag} {name}")
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.fetched.append(value or "")
        if tag in ("script", "iframe", "object", "embed", "link"):
            self.active.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"svg", "style", "script"} & set(self._open):
            self.text += data


def make_run(directory: Path, num_steps: int = 30) -> None:
    """Write the files of a run with the real writers."""
    timeline = Timeline(directory)
    timeline.record("ray", 100.0, 104.0)
    timeline.record("import torch", 104.5, 109.0, process="policy-0", node="node-7")
    timeline.record(FIRST_STEP, 110.0, 110.0)
    with Logger(directory, LoggerConfig(tensorboard=False)) as log:
        log.log_metrics(0, {"val/accuracy": 0.25, "timing/validation_s": 1.0})
        log.log_samples(0, [{"prompt": "1+1=", "completion": "7", "reward": 0.0}])
        for step in range(1, num_steps + 1):
            log.log_metrics(
                step,
                {
                    "train/reward": step / num_steps,
                    "train/kl": float("nan") if step == 3 else 0.001 * step,
                    "train/completion_length": 4.0,
                    "perf/samples_per_s": 1234.0,
                    "timing/generation_s": 0.5,
                    "timing/train_s": 0.25,
                    "timing/step_s": 20.0 if step == 1 else 1.0,
                },
            )
        log.log_metrics(num_steps, {"val/accuracy": 0.75, "timing/validation_s": 1.0})
        samples = [
            {"prompt": "1+1=", "completion": "2", "reward": 1.0},
            {"prompt": HOSTILE, "completion": HOSTILE * 200, "reward": -0.5},
        ]
        log.log_samples(num_steps, samples)
    worker = {"fqn": "a.b.Worker", "venv_digest": "0123456789abcdef", "python": "3.11.7", "ray": "2.60.0", "pid": 42}
    attestation: dict[str, Any] = {
        "policy": [{**worker, "hostname": "node-7", "verdict": "ok"}, {**worker, "verdict": "python: expected 3.12"}]
    }
    (directory / "attestation.json").write_text(json.dumps(attestation))
    (directory / "config.yaml").write_text("grpo:\n  seed: 7\nhub:\n  api_key: topsecret\n")
    (directory / "finished.json").write_text(json.dumps({"step": num_steps, "reason": "all 30 steps are done"}))


def test_report_of_a_complete_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    for section in ("learning", "time", "health", "startup", "samples", "workers", "config"):
        assert section in page.ids
    assert page.num_svgs == 4
    for text in (
        "finished: all 30 steps are done",
        "0.250 → 0.750",
        "1,234",
        "Start-up: 10.0 s",
        "import torch",
        "not recorded",
        "seed: 7",
        "0123456789ab",
        "python: expected 3.12",
    ):
        assert text in page.text
    assert "topsecret" not in path.read_text()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_report_is_self_contained_and_inert(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = report.write_report(tmp_path).read_text()
    page = Page(text)
    assert page.active == []
    assert page.fetched == []
    assert "@import" not in text
    assert "url(http" not in text
    # Hostile text is shown as text and shortened.
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in text
    assert "\x00" not in text
    assert len(page.text) < 30_000


def test_svg_ids_are_unique(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = report.write_report(tmp_path).read_text()
    clip_paths = [line for line in text.splitlines() if "<clipPath" in line]
    assert clip_paths
    assert len(clip_paths) == len(set(clip_paths))


def episode(environment: str, **values: Any) -> dict[str, Any]:
    call = '<tool_call>{"name": "price", "arguments": {"item": "tea"}}</tool_call>'
    messages = [
        {"role": "system", "content": "You buy tea."},
        {"role": "user", "content": [{"type": "text", "text": "Go."}]},
        {"role": "assistant", "content": f"Let me see.\n{call}", "reward": 0.25},
        {"role": "tool", "name": "price", "content": "3.5"},
        {"role": "assistant", "content": "3.5", "reward": 1.0},
    ]
    known = {"environment": environment, "messages": messages, "end": "done", "outcome": "trained", "failure": ""}
    return {"prompt": "all of it", "completion": "as text", "reward": 1.25, **known, **values}


def test_evaluations_in_the_background_have_curves_and_reasons(tmp_path: Path) -> None:
    make_run(tmp_path)
    score = {"low": 0.1, "high": 0.9, "num_problems": 8}
    scores = {"accuracy": {"value": 0.5, **score}, "pass@2": {"value": 0.7, **score}, "completion_length": score}
    models = [{"step": step, "scores": scores} for step in (0, 20)]
    content = {"models": models, "not_evaluated": [{"step": 10, "reason": f"failed: {HOSTILE}"}]}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text(json.dumps(content))
    text = report.render(tmp_path)
    page = Page(text)
    assert "evaluation" in page.ids
    assert "pass@2" in text
    assert "failed: </div><script>" in page.text
    assert not page.active


def make_run_with_environments(directory: Path) -> None:
    """Write the files of a run with two environments with turns, as `nemo_rl.algorithms.grpo` logs them."""
    with Logger(directory, LoggerConfig(tensorboard=False)) as log:
        for step in range(21):
            metrics = {}
            for index, name in enumerate(("nim", "shop")):
                metrics |= {
                    f"env_{name}/reward": step / 20 + index,
                    f"env_{name}/turns": 3.0,
                    f"env_{name}/failed": 0.0,
                }
            part = "val" if step % 10 == 0 else "train"
            log.log_metrics(step, {f"{part}/{name}": value for name, value in metrics.items()})
        log.log_episodes(1, [episode("nim"), episode("nim", attempts=2, failure="a timeout")])
        limit = episode("nim", outcome="masked", end="max_turns")
        lost = episode("shop", outcome="masked", end="failed", failure=f"the server is gone {HOSTILE}", attempts=3)
        log.log_episodes(2, [limit, limit, lost, episode("shop", outcome="replaced: its group has no signal")])
        log.log_samples(0, [episode("nim"), episode("shop", end="max_turns", outcome="masked")])
        log.log_samples(10, [episode("nim", messages=[{"role": "user", "content": "of a step in between"}])])
        failed = episode("shop", end="failed", outcome="masked", failure=f"the server is gone {HOSTILE}")
        hostile = [{"role": HOSTILE, "name": HOSTILE, "content": HOSTILE * 200}] * 70
        log.log_samples(20, [failed, episode(HOSTILE, messages=hostile, end=HOSTILE), episode("nim", reward=-0.5)])


def test_conversations_of_every_environment(tmp_path: Path) -> None:
    make_run_with_environments(tmp_path)
    page = Page(report.render(tmp_path))
    assert {"environments", "conversations"} <= set(page.ids)
    assert "samples" not in page.ids
    assert page.num_svgs == 1
    text = " ".join(page.text.split())
    for expected in (
        "1.25 nim, step 0: 2 turns, ended by the environment",
        "1.25 shop, step 0: 2 turns, cut off at max_turns masked: cut off at max_turns",
        "none shop, step 20: 2 turns, failed masked: the server is gone",
        "-0.5 nim, step 20: 2 turns, ended by the environment",
        'assistant 0.25 Let me see.<tool_call>{"name": "price", "arguments": {"item": "tea"}}</tool_call>',
        "tool price 3.5",
        '[{"type": "text", "text": "Go."}]',
        "10 more messages",
        "cut off at max_turns (2)",
    ):
        assert expected in text
    assert "of a step in between" not in text
    assert text.index("nim, step 0") < text.index("nim, step 20") < text.index("shop, step 0")


def test_conversations_are_inert_but_for_the_search(tmp_path: Path) -> None:
    make_run_with_environments(tmp_path)
    text = report.render(tmp_path)
    page = Page(text)
    assert page.active == ["script"]
    assert page.fetched == []
    [script] = re.findall(r"<script>.*?</script>", text, re.DOTALL)
    assert "alert" not in script
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x1b" not in text
    assert "\x00" not in text
    assert 'class="search" hidden' in text  # until the script runs


def test_accounts_of_training_episodes(tmp_path: Path) -> None:
    make_run_with_environments(tmp_path)
    nim, shop = accounts(read_jsonl(tmp_path / EPISODES_FILE))
    assert (nim.environment, nim.num_episodes, nim.num_repeated) == ("nim", 4, 1)
    assert (nim.outcomes, nim.reasons_text) == ({"trained": 2, "masked": 2}, "cut off at max_turns (2)")
    assert (shop.num_episodes, shop.num_repeated, shop.outcomes) == (2, 1, {"masked": 1, "replaced": 1})
    assert shop.reasons_text.startswith("the server is gone")


def test_tool_calls_are_marked() -> None:
    listed = {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}
    cut = {"role": "assistant", "content": '<tool_call>{"name"'}
    quoted = {"role": "user", "content": "Write <tool_call>{}</tool_call>."}
    [group] = conversations([{"step": 1, "environment": "a", "messages": [listed, cut, quoted]}])
    parts = [[(part.text, part.is_call) for part in message.parts] for message in group.episodes[0].messages]
    assert parts == [
        [('{"name": "now"}', True)],
        [('<tool_call>{"name"', True)],
        [("Write <tool_call>{}</tool_call>.", False)],
    ]


def test_environment_names_in_metrics() -> None:
    records = [{"train/env_b/reward": 1.0, "train/env_reward": 1.0}, {"val/env_a/turns": 1.0, "timing/env_c/x": 1.0}]
    assert environment_names(records) == ["a", "b"]
    assert environment_curves([{"step": 1, "train/env_reward": 1.0}]) is None


SECTIONS_OF_FILE = {
    METRICS_FILE: {"learning", "time", "health"},
    SAMPLES_FILE: {"samples"},
    "timeline.jsonl": {"startup"},
    "attestation.json": {"workers"},
    "config.yaml": {"config"},
}


@pytest.mark.parametrize("missing", SECTIONS_OF_FILE)
def test_missing_file_omits_its_section(tmp_path: Path, missing: str) -> None:
    make_run(tmp_path, num_steps=2)
    (tmp_path / missing).unlink()
    sections = set().union(*SECTIONS_OF_FILE.values())
    assert sections - set(Page(report.render(tmp_path)).ids) == SECTIONS_OF_FILE[missing]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_give_a_report(tmp_path: Path, share: float) -> None:
    make_run(tmp_path, num_steps=4)
    (tmp_path / "finished.json").unlink()
    for name in SECTIONS_OF_FILE:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    assert "not finished; last logged step:" in Page(report.render(tmp_path)).text


def test_single_step_can_be_plotted(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(
        '{"step": 1, "train/reward": 0.5, "timing/step_s": 1.0}\n{"step": 1, "val/accuracy": 0.5}\n'
    )
    page = Page(report.render(tmp_path))
    assert {"learning", "time"} <= set(page.ids)


def test_supervised_training_is_reported_by_its_losses(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(
        '{"step": 0, "val/loss": 0.5}\n{"step": 1, "train/loss": 0.25}\n{"step": 1, "val/loss": 0.125}\n'
    )
    page = Page(report.render(tmp_path))
    assert "learning" in page.ids
    assert "0.5 → 0.125" in page.text
    assert "validation loss" in page.text


def test_report_command_line(tmp_path: Path) -> None:
    make_run(tmp_path)
    command = [sys.executable, "-m", "nemo_rl.observability.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "report.html"))
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([*command, str(empty)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_report_needs_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither"):
        report.write_report(tmp_path / "nowhere")


def test_series_and_phases() -> None:
    records = [
        {"step": 1, "train/kl": 1.0, "timing/a_s": 1.0, "timing/b_s": 2.0, "timing/b/c_s": 2.0, "timing/step_s": 3.0},
        {"step": 2, "train/kl": None},
        {"step": 3, "train/kl": 2.0},
    ]
    assert series(records, "train/kl").steps == [1, 3]
    assert phase_names(records) == ["b", "a"]
    assert smoothed([5.0]) == [5.0]
    assert smoothed(list(range(40)))[:3] == [0.5, 1.0, 2.0]
