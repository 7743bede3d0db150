import pytest

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import check_model_name, count_parameters, parameters_in_name, prepare_model
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
