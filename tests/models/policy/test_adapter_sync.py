"""Adapters sent to generation: equal to merged weights to the last bit, exact bytes, and the routes that send them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import advantage_loss, make_batch, make_model, make_worker
from transformers import GPT2Config, GPT2LMHeadModel

from nemo_rl.models.backends import GENERATION_BACKENDS, Backend
from nemo_rl.models.embedded import make_tokenizer
from nemo_rl.models.generation.config import GenerationConfig
from nemo_rl.models.generation.generator import GeneratorSpec
from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.torch.generator import TorchGenerator
from nemo_rl.models.policy.config import LoraConfig, PolicyConfig
from nemo_rl.models.policy.policy import _sends_adapters
from nemo_rl.models.policy.torch_policy_worker import TorchPolicyWorker
from nemo_rl.models.weights.interfaces import BaseWeights, WeightUpdate
from nemo_rl.models.weights.receiver import receive
from nemo_rl.models.weights.routes import Route

PROMPTS = (torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([3, 3]))


def save_gpt2(directory: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(make_tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def save_model(directory: Path, family: str, *, bfloat16: bool = False, **config: Any) -> Path:
    """Save a model with a tokenizer. `bfloat16`: its weights are representable in bfloat16."""
    if family == "gpt2":
        return save_gpt2(directory)
    tokens = {"vocab_size": len(make_tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    make_model(directory, family, **(tokens | {"num_hidden_layers": 2} | config))
    if bfloat16:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_generator(model: Path, dtype: str = "float32") -> TorchGenerator:
    generation = GenerationConfig(max_new_tokens=12, num_threads=1)
    return TorchGenerator(GeneratorSpec(str(model), generation, 64, default_precision=dtype))


def adapted_worker(model: Path, targets: Any = "all-linear", **config: Any) -> TorchPolicyWorker:
    """Return a worker whose adapters have an effect."""
    worker = make_worker(model, lora={"rank": 4, "alpha": 12, "target_modules": targets, "seed": 5}, **config)
    train(worker)
    return worker


def train(worker: TorchPolicyWorker) -> None:
    worker.train(make_batch(), advantage_loss)


def publish_adapters(
    worker: TorchPolicyWorker, version: int, dtype: str = "float32"
) -> tuple[WeightUpdate, BaseWeights]:
    update = worker.publish_adapters(version, dtype)
    assert update is not None
    assert update.base is not None
    return update, update.base


def adapter_bytes(worker: TorchPolicyWorker) -> int:
    return sum(p.numel() * 4 for p in worker._model.module.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "targets", "config"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {}),  # q, k, v are fused by a copy
        ("qwen2", "all-linear", {"tied": True}),
        ("gpt2", ["c_attn", "c_proj"], {}),  # transposed weights, transformers' forward pass
        ("llama", ["lm_head", "o_proj"], {}),
    ],
)
def test_generator_with_adapters_equals_one_with_merged_weights(
    tmp_path: Path, family: str, targets: Any, config: dict[str, Any], dtype: str
) -> None:
    model = save_model(tmp_path / "m", family, **config)
    worker = adapted_worker(model, targets)
    by_adapters, by_weights = make_generator(model, dtype), make_generator(model, dtype)
    digests = set()
    for version in (1, 2):
        update, _ = publish_adapters(worker, version, dtype)
        assert sum(bucket.num_bytes for bucket in update.buckets) == adapter_bytes(worker)
        digests.add(by_adapters.update_weights(update))
        assert update.digest in digests
        merged = worker.publish_weights(version, dtype)
        assert merged is not None
        by_weights.update_weights(merged)
        tensors = dict(by_adapters.decoder.named_tensors())
        for name, tensor in by_weights.decoder.named_tensors():
            assert torch.equal(tensors[name], tensor), name
            assert tensors[name].dtype == tensor.dtype == getattr(torch, dtype)
        first, second = (
            generator.generate(GenerationRequest(*PROMPTS, seed=0)) for generator in (by_adapters, by_weights)
        )
        assert torch.equal(first.output_ids, second.output_ids)
        assert torch.equal(first.logprobs, second.logprobs)
        train(worker)
    assert len(digests) == 2


def test_base_weights_take_the_precision_that_represents_them(tmp_path: Path) -> None:
    """They are sent once per precision: in bfloat16 if that changes nothing, else in float32."""
    for bfloat16, expected in ((True, {"bfloat16"}), (False, {"bfloat16", "float32"})):
        model = save_model(tmp_path / str(bfloat16), "llama", bfloat16=bfloat16)
        worker = adapted_worker(model)
        update, base = publish_adapters(worker, 1, "bfloat16")
        dtypes = {spec.name: spec.dtype for bucket in base.buckets for spec in bucket.tensors}
        assert set(dtypes.values()) == expected
        assert dtypes["model.embed_tokens.weight"] == "bfloat16"
        assert {spec.dtype for spec in update.tensors} == {"bfloat16"}
        merged = worker.publish_weights(1, "bfloat16")
        assert merged is not None
        served = dict(receive(merged))
        for name, tensor in receive(update):
            assert torch.equal(tensor, served[name]), name
        assert publish_adapters(worker, 2, "bfloat16")[1].buckets is base.buckets
        assert publish_adapters(worker, 2, "float32")[1].digest != base.digest


def test_checkpoint_continues_with_the_same_base(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama")
    worker = adapted_worker(model)
    update, base = publish_adapters(worker, 1)
    worker.save_checkpoint(tmp_path / "c")
    resumed = make_worker(model, lora={"rank": 4, "alpha": 12, "seed": 5})
    assert publish_adapters(resumed, 0)[0].digest != update.digest
    resumed.load_checkpoint(tmp_path / "c")
    again, base_again = publish_adapters(resumed, 1)
    assert (again.digest, base_again.digest) == (update.digest, base.digest)


def test_offloaded_policy_sends_the_same(tmp_path: Path) -> None:
    worker = adapted_worker(save_model(tmp_path / "m", "llama"))
    update, _ = publish_adapters(worker, 1)
    for keep_weights in (False, True):
        worker.offload(keep_weights=keep_weights)
        assert publish_adapters(worker, 1)[0].digest == update.digest
        assert publish_adapters(worker, 1, "bfloat16")[0].digest != update.digest


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")
def test_generators_share_the_base_in_shared_memory(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", "llama")
    config = PolicyConfig(model_name=str(model), num_threads=1, max_sequence_length=64, lora=LoraConfig(rank=2))
    worker = TorchPolicyWorker(config, total_steps=2, seed=3, device_type="cpu", weight_transport="shared_memory")
    update, _ = publish_adapters(worker, 1)
    generators = [make_generator(model) for _ in range(2)]
    for generator in generators:
        generator.update_weights(update)
    first, second = (dict(generator.decoder.named_tensors()) for generator in generators)
    shared = {name for name in first if first[name].data_ptr() == second[name].data_ptr()}
    assert shared == {name for name in first if "_proj" not in name}


def test_route_decides_what_is_sent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(GENERATION_BACKENDS, "mine", Backend("somewhere.Worker"))
    on_cpu, on_gpu = Route("shared_memory", "shared_memory"), Route("shared_memory", "cuda_ipc")

    def sends(route: Route, backend: str = "torch", **lora: Any) -> bool:
        section = LoraConfig(**lora) if lora.pop("used", True) else None
        return _sends_adapters(PolicyConfig(lora=section, generation={"backend": backend}), route)

    with caplog.at_level("INFO"):
        assert sends(on_cpu)
        assert sends(on_cpu, "vllm")
        assert sends(Route())
        assert sends(on_gpu, sync="adapter")
        assert not sends(on_cpu, sync="merged")
        assert not sends(on_cpu, used=False)
        assert not caplog.records
        assert not sends(on_gpu)
        assert not sends(on_cpu, "mine", sync="adapter")
    messages = [record.getMessage() for record in caplog.records]
    assert "go from GPU to GPU (cuda_ipc); policy.lora.sync=adapter" in messages[0]
    assert "policy.generation.backend=mine cannot load adapters" in messages[1]
