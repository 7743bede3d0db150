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


def test_several_defaults_are_merged_in_order(tmp_path):
    write(tmp_path / "a.yaml", "grpo: {seed: 1, max_num_steps: 7, num_prompts_per_step: 4}")
    write(tmp_path / "b.yaml", "grpo: {seed: 2, max_num_steps: 8}\nlogger: {log_dir: /runs/b}")
    path = write(tmp_path / "job.yaml", "defaults: [a.yaml, b.yaml]\ngrpo: {seed: 3}")
    config = load_config(MasterConfig, path)
    assert (config.grpo.seed, config.grpo.max_num_steps, config.grpo.num_prompts_per_step) == (3, 8, 4)
    assert config.logger.log_dir == "/runs/b"
    write(tmp_path / "job.yaml", "defaults:\n- b.yaml\n- a.yaml")
    assert load_config(MasterConfig, path).grpo.max_num_steps == 7


def test_defaults_of_defaults_may_share_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "grpo: {seed: 1, max_num_steps: 7}")
    write(tmp_path / "sub" / "a.yaml", "defaults: ../base.yaml\ngrpo: {seed: 2}")
    write(tmp_path / "b.yaml", "defaults: [base.yaml]\ngrpo: {max_num_steps: 9}")
    path = write(tmp_path / "job.yaml", "defaults: [sub/a.yaml, b.yaml]")
    grpo = load_config(MasterConfig, path).grpo
    assert (grpo.seed, grpo.max_num_steps) == (1, 9)


def test_interpolation_over_several_defaults(tmp_path):
    write(tmp_path / "a.yaml", "checkpointing: {checkpoint_dir: '${logger.log_dir}/c'}")
    write(tmp_path / "b.yaml", "logger: {log_dir: /runs/b}")
    path = write(tmp_path / "job.yaml", "defaults: [a.yaml, b.yaml]")
    assert load_config(MasterConfig, path).checkpointing.checkpoint_dir == "/runs/b/c"


@given(st.lists(st.dictionaries(st.sampled_from(["seed", "max_num_steps"]), st.integers(1, 9)), max_size=5))
def test_defaults_equal_one_merged_file(tmp_path_factory, layers):
    folder = tmp_path_factory.mktemp("layers")
    names = [write(folder / f"{i}.yaml", f"grpo: {layer}").name for i, layer in enumerate(layers)]
    merged = {key: value for layer in layers for key, value in layer.items()}
    path = write(folder / "job.yaml", f"defaults: {names}")
    assert load_config(MasterConfig, path) == load_config(
        MasterConfig, None, [f"grpo.{key}={value}" for key, value in merged.items()]
    )


@pytest.mark.parametrize("value", ["", "[]", "null"])
def test_empty_defaults_extend_nothing(tmp_path, value):
    path = write(tmp_path / "c.yaml", f"defaults: {value}\ngrpo: {{seed: 5}}")
    assert load_config(MasterConfig, path).grpo.seed == 5


@pytest.mark.parametrize("value", ["{a: b}", "5", "true", "''", "[a.yaml, 3]", "[[a.yaml]]", "[null]"])
def test_defaults_of_another_type_are_refused(tmp_path, value):
    write(tmp_path / "a.yaml", "")
    with pytest.raises(ConfigError, match="c.yaml: `defaults` must be a file name or a list of file names, got"):
        load_config(MasterConfig, write(tmp_path / "c.yaml", f"defaults: {value}"))


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


def test_token_bound_of_dynamic_batching_is_one_sequence():
    size = load_config(MasterConfig).policy.max_sequence_length
    batching = f"max_tokens: {size}, length_multiple: {size - 1}"
    load_config(MasterConfig, None, [f"policy.batching={{mode: dynamic, {batching}}}"])
    with pytest.raises(ConfigError, match=f"less than one sequence.*{2 * (size - 1)} tokens"):
        load_config(MasterConfig, None, [f"policy.batching={{mode: packed, {batching}}}"])


def test_unknown_key_names_file_and_known_keys(tmp_path):
    path = write(tmp_path / "job.yaml", "policy: {optimizer: {learning_rate: 1}}")
    with pytest.raises(
        ConfigError, match=r"job.yaml: unknown key policy.optimizer.learning_rate; known here: lr, betas"
    ):
        load_config(MasterConfig, path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "must contain a mapping"),
        ("defaults: c.yaml", "leads back to itself"),
        ("defaults: [c.yaml]", "leads back to itself"),
        ("defaults: [d.yaml]", "d.yaml does not exist"),
    ],
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


def test_hydra_prefixes_are_accepted(tmp_path):
    path = write(tmp_path / "job.yaml", "grpo: {seed: 2, max_num_steps: 8, num_prompts_per_step: 4}")
    config = load_config(MasterConfig, path, ["+grpo.seed=3", "++grpo.max_num_steps=9", "~grpo.num_prompts_per_step"])
    default = load_config(MasterConfig).grpo.num_prompts_per_step
    assert (config.grpo.seed, config.grpo.max_num_steps, config.grpo.num_prompts_per_step) == (3, 9, default)
    assert load_config(MasterConfig, path, ["~grpo"]) == load_config(MasterConfig)
    assert load_config(MasterConfig, path, ["~grpo.seed", "grpo.seed=5"]).grpo.seed == 5
    assert load_config(MasterConfig, None, ["~grpo.validation.period"]) == load_config(MasterConfig)


@pytest.mark.parametrize(
    "override", ["+grpo.sede=1", "++grpo.sede=1", "~grpo.sede", "~", "+=1", "+grpo.seed", "grpo.seed"]
)
def test_invalid_hydra_override_is_refused(override):
    with pytest.raises(ConfigError, match="override"):
        load_config(MasterConfig, None, [override])
