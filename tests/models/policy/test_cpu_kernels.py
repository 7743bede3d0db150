from __future__ import annotations

import pytest
import torch
from tiny_policy import make_llama
from transformers import AutoModelForCausalLM

from nemo_rl.models.policy import cpu_kernels
from nemo_rl.models.policy.cpu_kernels import CpuRMSNorm, use_cpu_kernels


@pytest.fixture(params=["causal", "padded on the left", "longer than short"])
def case(request, tmp_path, monkeypatch):
    """A model, and token ids with a mask (None: all tokens count)."""
    make_llama(tmp_path)
    if request.param == "longer than short":
        monkeypatch.setattr(cpu_kernels, "MAX_SHORT_LENGTH", 4)
    torch.manual_seed(0)
    mask = None
    if request.param == "padded on the left":
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, :4] = 0
    return tmp_path, torch.randint(1, 16, (3, 9)), mask


def test_cpu_kernels_match_transformers(case) -> None:
    directory, ids, mask = case
    results = []
    for changed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        names = [name for name, _ in model.named_parameters()]
        if changed:
            use_cpu_kernels(model)
            assert [name for name, _ in model.named_parameters()] == names
            assert any(isinstance(module, CpuRMSNorm) for module in model.modules())
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if mask is not None:
            logits = logits * mask[..., None]
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_eager_attention_is_kept(tmp_path) -> None:
    make_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    use_cpu_kernels(model)
    assert model.config._attn_implementation == "eager"
