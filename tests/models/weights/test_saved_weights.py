"""Weights read from a saved model equal those that a policy publishes, in names, order and digest."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_rl.errors import ModelError
from nemo_rl.models.weights.saved_weights import check_saved_weights, saved_weights
from nemo_rl.models.weights.sender import publish


def make(directory: Path, *, tied: bool = False, layers: int = 2, width: int = 32, **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory, **options)
    return model


def shapes(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_digest_is_that_of_the_policy(tmp_path, tied, dtype, options):
    model = make(tmp_path, tied=tied, **options)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(options)
    check_saved_weights(str(tmp_path), shapes(model))
    published = publish(model.named_parameters(), version=1, dtype=dtype, transport="local")
    read = publish(saved_weights(str(tmp_path), shapes(model)), version=1, dtype=dtype, transport="local")
    assert read.digest == published.digest


def test_other_names_are_renamed_as_transformers_does(tmp_path):
    model = make(tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, tensor), (other, parameter) in zip(
        saved_weights(str(tmp_path), shapes(model)), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, parameter)


def test_weights_of_another_width_are_refused(tmp_path):
    make(tmp_path)
    other = make(tmp_path / "other", width=64)
    with pytest.raises(ModelError, match=r"of another model: model.embed_tokens.weight has the shape \[40, 32\], and"):
        check_saved_weights(str(tmp_path), shapes(other))


def test_missing_parameters_are_refused(tmp_path):
    make(tmp_path)
    deeper = make(tmp_path / "deeper", layers=3)
    (tmp_path / "config.json").write_bytes((tmp_path / "deeper" / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"of another model: they lack model.layers.2."):
        list(saved_weights(str(tmp_path), shapes(deeper)))


def test_damaged_file_is_an_error(tmp_path):
    model = make(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"cannot be read .*download"):
        check_saved_weights(str(tmp_path), shapes(model))
