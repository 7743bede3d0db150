import os
import subprocess
import sys

import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.observability.report import write_report
from nemo_rl.utils.config import load_config


def config_with(*overrides):
    return load_config(MasterConfig, None, list(overrides))


def test_unfinished_numbered_run_is_resumed(tmp_path):
    config = config_with()
    first = open_run_directory(config, "job", tmp_path)
    assert first.path == tmp_path / "job" / "001"
    assert first.is_new
    first.close()

    again = open_run_directory(config, "job", tmp_path)
    assert again.path == first.path
    assert not again.is_new
    again.finish(3, "done")
    again.close()

    assert open_run_directory(config, "job", tmp_path).path == tmp_path / "job" / "002"


def test_other_configuration_gets_a_new_number(tmp_path):
    open_run_directory(config_with(), "job", tmp_path).close()
    assert open_run_directory(config_with("grpo.seed=7"), "job", tmp_path).path.name == "002"


def test_numbered_run_does_not_join_a_running_one(tmp_path):
    holder = open_run_directory(config_with(), "job", tmp_path)
    assert open_run_directory(config_with(), "job", tmp_path).path.name == "002"
    holder.close()


def test_directory_in_use_error_names_the_process(tmp_path):
    config = config_with(f"logger.log_dir={tmp_path / 'run'}")
    holder = open_run_directory(config, "job")
    with pytest.raises(ConfigError, match=r"in use by process \d+ on "):
        open_run_directory(config, "job")
    holder.close()
    open_run_directory(config, "job").close()


def test_killed_process_releases_the_directory(tmp_path):
    code = f"""
import os, signal
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.jobs.run_directory import open_run_directory
from nemo_rl.utils.config import load_config
from nemo_rl.observability.report import write_report
run = open_run_directory(load_config(MasterConfig, None, ["logger.log_dir={tmp_path / "run"}"]), "job")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not open_run_directory(config_with(f"logger.log_dir={tmp_path / 'run'}"), "job").is_new


def test_directory_of_another_run_is_refused(tmp_path):
    directory = f"logger.log_dir={tmp_path / 'run'}"
    open_run_directory(config_with(directory), "job").close()
    with pytest.raises(ConfigError, match=r"policy\.optimizer\.lr: 1e-06 -> 0\.5"):
        open_run_directory(config_with(directory, "policy.optimizer.lr=0.5"), "job")
    # Limits may change.
    open_run_directory(config_with(directory, "grpo.max_num_steps=500"), "job").close()


def test_unusable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be used.*logger\.log_dir"):
        open_run_directory(config_with(f"logger.log_dir={tmp_path / 'file' / 'run'}"), "job")


def test_configured_secrets_stay_private(tmp_path):
    config = config_with("logger.mlflow.tracking_uri=https://me:hunter2@host", "env.options={api_key: sesame}")
    run = open_run_directory(config, "job", tmp_path)
    (run.path / "metrics.jsonl").write_text("")
    page = write_report(run.path).read_text()
    assert "tracking_uri" in page
    assert "hunter2" not in page
    assert "sesame" not in page
    assert (run.path / "config.yaml").stat().st_mode & 0o077 == 0
    run.close()
    other = config_with(f"logger.log_dir={run.path}", "env.options={api_key: open}")
    with pytest.raises(ConfigError, match="env.options.api_key") as caught:
        open_run_directory(other, "job", tmp_path)
    assert "sesame" not in str(caught.value)
    plain = open_run_directory(config_with(), "plain", tmp_path)
    assert (plain.path / "config.yaml").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def test_unwritable_checkpoint_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    taken = f"checkpointing.checkpoint_dir={tmp_path / 'file'}"
    with pytest.raises(ConfigError, match="no checkpoint can be written to .*file.*checkpointing.checkpoint_dir"):
        open_run_directory(config_with(taken), "job", tmp_path)
    open_run_directory(config_with(taken, "checkpointing.enabled=false"), "job", tmp_path).close()


def test_start_is_kept_with_the_run(tmp_path):
    directory = f"logger.log_dir={tmp_path / 'run'}"
    first = open_run_directory(config_with(directory), "job")
    first.close()
    again = open_run_directory(config_with(directory), "job")
    again.close()
    assert again.started == first.started
    other = open_run_directory(config_with(f"logger.log_dir={tmp_path / 'other'}"), "job")
    assert other.started > first.started
    for damaged in ("", "{}", '"2026-11-29"', '{"local_time": "yesterday"}', '{"local_time": 5}'):
        (tmp_path / "run" / "started.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"started\.json cannot be read .* write the time at which the run began"):
            open_run_directory(config_with(directory), "job")
    (tmp_path / "run" / "started.json").write_text('{"local_time": "2026-11-29T00:00:00"}')
    open_run_directory(config_with(directory), "job").close()  # the failed calls did not keep the lock
