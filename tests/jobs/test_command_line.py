import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError, DataError, EnvironmentFailure, NonFiniteError
from nemo_rl.jobs.command_line import run_command
from nemo_rl.utils.jsonl import append_text


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("grpo: {seed: 5}")
    return path


def test_job_receives_config_name_and_mode(config_file):
    received = []
    assert run_command(MasterConfig, config_file, received.append, ["--dry-run", "grpo.max_num_steps=3"]) == 0
    (arguments,) = received
    assert (arguments.config.grpo.seed, arguments.config.grpo.max_num_steps) == (5, 3)
    assert (arguments.name, arguments.dry_run) == ("job", True)


def test_options_and_overrides_can_be_mixed(config_file, tmp_path):
    received = []
    argv = ["grpo.seed=1", "--config", str(config_file), "grpo.max_num_steps=3", "--dry-run", "grpo.seed=2"]
    assert run_command(MasterConfig, tmp_path / "unused.yaml", received.append, argv) == 0
    assert (received[0].config.grpo.seed, received[0].config.grpo.max_num_steps) == (2, 3)


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("c"), 2), (DataError("d"), 2), (EnvironmentFailure("e"), 1)], ids=repr
)
def test_errors_are_one_sentence_and_an_exit_code(config_file, capsys, error, code):
    def job(arguments):
        raise error

    assert run_command(MasterConfig, config_file, job, []) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_worker_error_is_one_sentence(config_file, capsys):
    def job(arguments):
        raise RayTaskError("train", "a long traceback", NonFiniteError("the loss is nan")).as_instanceof_cause()

    assert run_command(MasterConfig, config_file, job, []) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_error_names_the_file(config_file, capsys):
    def job(arguments):
        append_text(Path("/dev/full"), "{}\n")

    assert run_command(MasterConfig, config_file, job, []) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 28] No space left on device: '/dev/full'; free space")
    assert error.count("\n") == 1


def test_unexpected_exception_keeps_its_traceback(config_file):
    def job(arguments):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command(MasterConfig, config_file, job, [])


def test_error_of_the_clean_up_does_not_hide_an_interrupt(config_file, capsys, caplog):
    def job(arguments):
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("a worker does not answer")

    assert run_command(MasterConfig, config_file, job, []) == 130
    assert "run the same command to resume" in capsys.readouterr().err
    assert "after the interrupt: OSError: a worker does not answer" in caplog.text


def test_unknown_key_does_not_start_the_job(config_file, capsys):
    received = []
    assert run_command(MasterConfig, config_file, received.append, ["grpo.sede=1"]) == 2
    assert "did you mean grpo.seed?" in capsys.readouterr().err
    assert not received


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_job_cleanly(config_file, signal_number):
    code = f"""
import sys, time
from pathlib import Path
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.command_line import run_command
from nemo_rl.utils.jsonl import append_text
def job(arguments):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
sys.exit(run_command(MasterConfig, Path({str(config_file)!r}), job, []))
"""
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "started\n"
    os.kill(job.pid, signal_number)
    output, errors = job.communicate(timeout=400)
    assert (job.returncode, output) == (130, "cleaned up\n")
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_help_lists_every_key(config_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(MasterConfig, config_file, lambda arguments: None, ["--help"])
    assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert "policy.generation.max_new_tokens  (int = 32)" in output
    assert "Longest completion in tokens." in output


def test_help_ends_silently_on_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    script = Path(__file__).resolve().parents[2] / "examples" / "run_grpo_math.py"
    done = subprocess.run([sys.executable, script, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")
