import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import (
    check_model_name,
    check_weight_files,
    context_length,
    count_parameters,
    ensure_model,
    load_model_config,
    parameters_in_name,
    prepare_model,
)
from nemo_rl.jobs.plan import make_plan
from nemo_rl.jobs.roles import job_roles
from nemo_rl.models.policy.config import PolicyConfig
from nemo_rl.utils.config import load_config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.5e9),
        ("meta-llama/Llama-3.1-8B", 8e9),
        ("HuggingFaceTB/SmolLM2-135M", 135e6),
        ("gpt2", None),
        ("models/base", None),
    ],
)
def test_size_in_model_name(name, expected):
    assert parameters_in_name(name) == expected


@pytest.mark.parametrize("name", ["/no/such/model", "./no/such/model", "~/no-such-model", "a/b/c"])
def test_missing_model_path_is_refused(name):
    with pytest.raises(ConfigError, match="policy.model_name: there is no directory"):
        check_model_name(PolicyConfig(model_name=name))


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        check_model_name(PolicyConfig(model_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["embedded", "gpt2", "Qwen/Qwen2.5-1.5B-Instruct"])
def test_hub_names_and_embedded_model_are_accepted(name):
    check_model_name(PolicyConfig(model_name=name))


def test_tied_parameters_count_once():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    assert count_parameters(config) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.max_sequence_length=513"], "policy.max_sequence_length=513 exceeds the context of embedded, 512"),
        (["policy.generation.stop_token_ids=[7, 100]"], "embedded has no token 100; the last is 99"),
        (["policy.lora.target_modules=[q_prj]"], "has no linear layer 'q_prj'. Did you mean 'q_proj'"),
        (
            ["policy.backend=megatron", "policy.options.tensor_parallel_size=3", "cluster.cpu_workers_per_node=3"],
            "tensor_parallel_size=3 must divide the 4 attention heads",
        ),
        (
            ["policy.backend=megatron", "policy.options.pipeline_parallel_size=4", "cluster.cpu_workers_per_node=4"],
            "pipeline_parallel_size=4 must divide the 2 layers",
        ),
        (
            [
                "policy.generation.backend=vllm",
                "policy.generation.options.tensor_parallel_size=3",
                "cluster.cpu_workers_per_node=3",
                "grpo.num_prompts_per_step=3",
            ],
            "policy.generation.options.tensor_parallel_size=3 must divide the 4 attention heads",
        ),
        (
            ["policy.generation.backend=vllm", "policy.generation.options.max_num_batched_tokens=4"],
            "max_num_batched_tokens=4 must be at least max_num_seqs, which is 1024",
        ),
    ],
)
def test_unfit_model_is_refused_before_it_is_created(tmp_path, monkeypatch, overrides, expected):
    monkeypatch.setenv("NEMO_RL_CACHE_DIR", str(tmp_path))
    config = load_config(MasterConfig, None, overrides)
    with pytest.raises(ConfigError, match=expected):
        prepare_model(config.policy)
    with pytest.raises(ConfigError, match=expected):
        make_plan(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.generation.num_workers=5"], "num_workers=5, but only 1 workers fit"),
        (
            ["policy.generation.backend=vllm", "policy.generation.options.tensor_parallel_size=2"],
            r"\[1\] per node, cannot be divided into replicas of 2 workers",
        ),
    ],
)
def test_too_many_generation_workers_are_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        job_roles(load_config(MasterConfig, None, overrides))


def model_directory(directory: Path, **changes) -> str:
    """Write the files of a tiny model: configuration, weights that fill one file, tokenizer."""
    from nemo_rl.models.embedded import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "model_type": "llama",
    } | changes
    (directory / "config.json").write_text(json.dumps(values))
    save_file({"x": torch.zeros(8)}, directory / "model.safetensors")
    return str(directory)


VLLM = ("policy.generation.backend=vllm",)
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({"head_dim": 48}, VLLM, r"attention heads of size 48; on CPUs, vLLM supports 32, 64, .*backend=torch"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, VLLM, "attention heads of size 8; on CPUs"),
        (
            {"num_hidden_layers": 4096, "head_dim": 256, "max_position_embeddings": 4096},
            (*VLLM, "policy.max_sequence_length=4096"),
            r"cpu_kv_cache_gib=1 is less than one sequence of 4096 tokens .*: 64 GiB",
        ),
        (
            {"num_key_value_heads": 1, "num_attention_heads": 4},
            (*VLLM, "policy.generation.options.tensor_parallel_size=3"),
            "must divide the 4 attention heads",
        ),
        ({}, ("policy.max_sequence_length=257",), "exceeds the context of .*, 256 tokens"),
        ({"rope_parameters": ROPE}, ("policy.max_sequence_length=1025",), "exceeds the context of .*, 1024 tokens"),
        ({}, ("policy.generation.stop_token_ids=[100]",), "has no token 100; the last is 99"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            (),
            "is not a causal language model: it is a LlamaForSequenceClassification",
        ),
        ({"architectures": ["LlamaModel"]}, (), "is not a causal language model: it is a LlamaModel"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            (),
            "model type t5.* it has an encoder",
        ),
        ({"model_type": "gpt2"}, ("policy.backend=megatron",), "does not support the model family 'gpt2'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, (), r"are quantized \(gptq\)"),
        ({"vocab_size": 0}, (), "the padding token of .* is 0, but the last token"),
        ({"model_type": "no_such_model"}, (), "cannot be loaded"),
        ({"hidden_size": "wide"}, (), "cannot be loaded"),
    ],
)
def test_limits_in_the_configuration_of_a_model(tmp_path, changes, overrides, expected):
    name = model_directory(tmp_path, **changes)
    config = load_config(MasterConfig, None, [f"policy.model_name={name}", *overrides])
    with pytest.raises(ConfigError, match=expected) as caught:
        prepare_model(config.policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({}, ()),
        ({}, VLLM),
        ({"rope_parameters": ROPE}, ("policy.max_sequence_length=1024",)),
        ({"architectures": None}, ()),
        ({"head_dim": 48}, (*VLLM, "policy.generation.py_executable=/other/python")),
    ],
)
def test_models_within_the_limits(tmp_path, changes, overrides):
    name = model_directory(tmp_path, **changes)
    config = load_config(MasterConfig, None, [f"policy.model_name={name}", *overrides])
    check_model_name(config.policy)
    assert prepare_model(config.policy).pad_token_id == 0
    assert ensure_model(config.policy) == name


def test_any_head_size_is_accepted_on_gpus(tmp_path):
    config = load_config(MasterConfig, None, [f"policy.model_name={model_directory(tmp_path, head_dim=48)}", *VLLM])
    prepare_model(config.policy, use_gpus=True)


def shards(directory: Path, index: str = "model.safetensors.index.json") -> None:
    """Replace the weights by two shards and an index."""
    (directory / "model.safetensors").unlink()
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    for tensor, file in names.items():
        save_file({tensor: torch.zeros(8)}, directory / file)
    (directory / index).write_text(json.dumps({"weight_map": names}))


def test_weights_in_shards_are_accepted(tmp_path):
    name = model_directory(tmp_path)
    shards(tmp_path)
    check_weight_files(name, "policy.model_name")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda d: (d / "model.safetensors").unlink(),
            "has no weights: neither model.safetensors nor pytorch_model.bin",
        ),
        (
            lambda d: (shards(d), (d / "model-2-of-2.safetensors").unlink()),
            "model-2-of-2.safetensors, which .* lists, is missing",
        ),
        (lambda d: (shards(d), (d / "model.safetensors.index.json").write_text("{")), "index.json cannot be read"),
        (lambda d: (shards(d), (d / "model.safetensors.index.json").write_text("[]")), "index.json cannot be read"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
            r"is incomplete \(\d+ bytes\)",
        ),
        (
            lambda d: (d / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"
            ),
            "git lfs pull",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), r"is incomplete \(0 bytes\)"),
    ],
)
def test_missing_weights_are_reported(tmp_path, change, expected):
    name = model_directory(tmp_path)
    check_weight_files(name, "policy.model_name")
    change(tmp_path)
    with pytest.raises(ConfigError, match=f"policy.model_name: .*{expected}"):
        check_weight_files(name, "policy.model_name")


def test_context_length():
    assert context_length(LlamaConfig(max_position_embeddings=100)) == 100
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert context_length(LlamaConfig(max_position_embeddings=100, rope_parameters=scaled)) == 200
    # Llama 3.1 gives the extended context.
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    assert context_length(LlamaConfig(max_position_embeddings=131072, rope_parameters=llama3)) == 131072
    assert context_length(AutoConfig.for_model("mamba")) is None


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": 5}', '{"model_type": "llama", "num_attention_heads": 0}']
)
def test_damaged_configurations_are_reported(tmp_path, content):
    model_directory(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"the model {tmp_path} cannot be loaded: [^\n]*Check the name"):
        load_model_config(str(tmp_path))
