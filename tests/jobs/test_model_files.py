import pytest

from nemo_rl.errors import ConfigError
from nemo_rl.jobs.model_files import check_model_name, count_parameters, parameters_in_name
from nemo_rl.models.policy.config import PolicyConfig


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
def test_sizes_stated_in_names(name, expected):
    assert parameters_in_name(name) == expected


@pytest.mark.parametrize("name", ["/no/such/model", "./no/such/model", "~/no-such-model", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_before_anything_is_imported(name):
    with pytest.raises(ConfigError, match="policy.model_name: there is no directory"):
        check_model_name(PolicyConfig(model_name=name))


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config.json"):
        check_model_name(PolicyConfig(model_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["embedded", "gpt2", "Qwen/Qwen2.5-1.5B-Instruct"])
def test_hub_names_and_the_embedded_model_pass(name):
    check_model_name(PolicyConfig(model_name=name))


def test_parameters_are_counted_with_tied_ones_once():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    assert count_parameters(config) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())
