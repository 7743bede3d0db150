"""Loading and validation of configurations."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import check_key, dump_yaml, iter_keys, load_config


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_default_config_round_trip(tmp_path):
    config = load_config(MasterConfig)
    assert load_config(MasterConfig, write(tmp_path / "c.yaml", dump_yaml(config))) == config


def test_precedence_of_overrides_file_and_defaults(tmp_path):
    write(tmp_path / "base.yaml", "grpo: {seed: 1, max_num_steps: 7, num_prompts_per_step: 4}")
    path = write(tmp_path / "job.yaml", "defaults: base.yaml\ngrpo: {seed: 2, max_num_steps: 8}")
    grpo = load_config(MasterConfig, path, ["grpo.seed=3"]).grpo
    assert (grpo.seed, grpo.max_num_steps, grpo.num_prompts_per_step) == (3, 8, 4)


def test_interpolation_is_resolved(tmp_path):
    path = write(
        tmp_path / "c.yaml", "logger: {log_dir: /runs/a}\ncheckpointing: {checkpoint_dir: '${logger.log_dir}/c'}"
    )
    assert load_config(MasterConfig, path).checkpointing.checkpoint_dir == "/runs/a/c"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("grpo.num_prompt_per_step=8", "did you mean grpo.num_prompts_per_step?"),
        ("gpro.seed=1", "did you mean grpo?"),
        ("grpo.seed=abc", "grpo.seed: input should be a valid integer.*got 'abc'"),
        ("grpo.seed.deeper=1", "grpo.seed is a value and has no key 'deeper'"),
        ("policy.optimizer.lr=-1", "policy.optimizer.lr: input should be greater than 0, got -1"),
        ("policy.precision=float16", "policy.precision.*'float32' or 'bfloat16'"),
        ("data.max_prompt_length=500", "exceeds policy.max_sequence_length"),
        ("policy.train_global_batch_size=7", "not a multiple of policy.train_global_batch_size"),
        ("cluster.cpu_workers_per_node=3", "cannot be split evenly over 3 data-parallel workers"),
        ("grpo.num_generations_per_prompt=1", "needs num_generations_per_prompt of at least 2"),
        ("policy.batching={mode: packed, max_tokens: 64}", "max_tokens .64. is less than one sequence"),
        ("nonsense", "is not of the form section.key=value"),
        ("=1", "is not of the form section.key=value"),
        ("logger.log_dir=${nowhere}", "nowhere"),
    ],
)
def test_override_error_is_one_line(override, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(MasterConfig, None, [override])
    assert "\n" not in str(caught.value)


def test_unknown_key_names_file_and_known_keys(tmp_path):
    path = write(tmp_path / "job.yaml", "policy: {optimizer: {learning_rate: 1}}")
    with pytest.raises(
        ConfigError, match=r"job.yaml: unknown key policy.optimizer.learning_rate; known here: lr, betas"
    ):
        load_config(MasterConfig, path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [", "not valid YAML"), ("- 1", "must contain a mapping"), ("defaults: c.yaml", "leads back to itself")],
)
def test_invalid_yaml_is_refused(tmp_path, content, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(MasterConfig, write(tmp_path / "c.yaml", content))


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00grpo")
    with pytest.raises(ConfigError, match="UTF-8|YAML"):
        load_config(MasterConfig, tmp_path / "c.yaml")


def test_missing_file_suggests_a_name(tmp_path):
    write(tmp_path / "grpo_math.yaml", "")
    with pytest.raises(ConfigError, match="did you mean grpo_math.yaml"):
        load_config(MasterConfig, tmp_path / "grpo_maths.yaml")


def test_every_key_is_documented_and_addressable():
    keys = list(iter_keys(MasterConfig))
    assert len(keys) == len({key.name for key in keys})
    for key in keys:
        assert key.help, key.name
        check_key(MasterConfig, key.name, where="test")


@given(st.text(max_size=40))
def test_fuzz_overrides(text):
    with contextlib.suppress(ConfigError):
        load_config(MasterConfig, None, [text])


@given(st.sampled_from([key.name for key in iter_keys(MasterConfig)]), st.text(max_size=12))
def test_fuzz_values(key, value):
    with contextlib.suppress(ConfigError):
        load_config(MasterConfig, None, [f"{key}={value}"])


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda v: st.dictionaries(st.text(max_size=8), v)))
def test_fuzz_yaml_documents(tmp_path_factory, content):
    import yaml

    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_config(MasterConfig, path)


def test_config_loads_neither_torch_nor_ray():
    code = (
        "import sys; from nemo_rl.algorithms.config import MasterConfig; from nemo_rl.utils.config import load_config;"
        "load_config(MasterConfig); print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
