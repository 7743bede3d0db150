"""The command line of the main job: help, plans, and invalid input.

These commands stop before they start anything. Most of their time is the import of torch, so one process runs them one
after another.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grpo_jobs import ROOT, SCRIPT, orphans, wait_for

CONFIGS = sorted((ROOT / "examples" / "configs").glob("grpo_*.yaml"))
INVALID = [
    (["grpo.num_prompt_per_step=8"], "did you mean grpo.num_prompts_per_step?"),
    (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
    (["policy.backend=torhc"], "torch"),
    (["policy.model_name=/no/such/model"], "/no/such/model"),
    (["env.name=maths"], "math"),
    (["data.train.path=/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["data.max_prompt_length=2"], "data.max_prompt_length"),
    (
        ["grpo.num_prompts_per_step=3", "cluster.cpu_workers_per_node=2", "grpo.num_generations_per_prompt=3"],
        "evenly",
    ),
    (["policy.max_sequence_length=100000"], "max_sequence_length"),
    (["cluster.cpu_workers_per_node=512", "grpo.num_prompts_per_step=512"], "CPU"),
]
# What a configuration needs that another job makes first.
MADE_BEFORE = {"grpo_reward_model": ["env.product.config.model=organization/reward-model"]}
# Runs each command line of a JSON list on standard input, and prints [exit code, standard output, standard error] of
# each. File descriptors are redirected, not `sys.stderr`, because logging keeps the stream that it started with.
_RUN_COMMANDS = """
import json, os, sys, tempfile
commands, terminal = json.load(sys.stdin), os.dup(1)
sys.path.insert(0, sys.argv[1])
from run_grpo_math import main
results = []
for arguments in commands:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush(), sys.stderr.flush()
        out.seek(0), err.seek(0)
        results.append((code or 0, out.read(), err.read()))
os.write(terminal, json.dumps(results).encode())
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def results(directory: Path) -> list[Any]:
    """Results of `--help`, then of a plan of each configuration, then of each invalid input."""
    commands = [
        ["--help"],
        *(["--config", str(config), "--dry-run", *MADE_BEFORE.get(config.stem, [])] for config in CONFIGS),
        *([*arguments, f"logger.log_dir={directory / str(i)}"] for i, (arguments, _) in enumerate(INVALID)),
    ]
    (directory / "plans").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN_COMMANDS, str(SCRIPT.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory / "plans",
    )
    output, _ = process.communicate(json.dumps(commands), timeout=800)
    assert process.returncode == 0
    wait_for(lambda: not orphans(process.pid), None, seconds=300)
    return json.loads(output)


def test_help_lists_the_keys(results):
    code, output, _ = results[0]
    assert code == 0
    assert "grpo.num_prompts_per_step" in output


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=[config.stem for config in CONFIGS])
def test_every_configuration_has_a_plan(results, directory, index):
    code, output, errors = results[1 + index]
    assert code == 0, errors[-3000:]
    assert "policy" in output
    assert not list((directory / "plans").iterdir())


@pytest.mark.parametrize("index", range(len(INVALID)), ids=[" ".join(arguments) for arguments, _ in INVALID])
def test_invalid_input_is_one_sentence_and_leaves_no_process(results, index):
    code, _, errors = results[1 + len(CONFIGS) + index]
    assert code == 2, errors[-3000:]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert INVALID[index][1] in last
    assert "Traceback" not in errors
