from __future__ import annotations

import pytest
import torch

from nemo_rl.models.policy import logprob_forward
from nemo_rl.models.policy.logprob_forward import group_logprobs, token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("chunk_elements", [1, 50, 2**24])
def test_token_logprobs_match_log_softmax(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, temperature: float
) -> None:
    monkeypatch.setattr(logprob_forward, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    logits = (torch.randn(13, 17) * 5).requires_grad_()
    tokens, weights = torch.randint(0, 17, (13,)), torch.randn(13)
    before = logits.detach().clone()
    result = token_logprobs(logits, tokens, temperature)
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(result, expected)
    (of_result,) = torch.autograd.grad((result * weights).sum(), logits)
    (of_expected,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(of_result, of_expected)
    assert torch.equal(logits, before), "the logits must not be changed in place"


def test_bfloat16_logits_are_normalized_in_float32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1000).bfloat16().requires_grad_()
    tokens = torch.randint(0, 1000, (6,))
    result = token_logprobs(logits, tokens)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.log_softmax(logits.float(), -1).gather(-1, tokens[:, None])[:, 0])
    result.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_token_logprobs_without_rows() -> None:
    assert token_logprobs(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long)).shape == (0,)


def of_groups(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute `group_logprobs` in float64, by masks over the vocabulary."""
    logprobs = torch.log_softmax(logits.double() / temperature, dim=-1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
    rest = logprobs.masked_fill(~others, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), rest], dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk_elements", [1, 50, 2**24])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_group_logprobs_equal_float64(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int, temperature: float, scale: float
) -> None:
    """With the large scale, all other tokens together have a probability far below the resolution of float32."""
    monkeypatch.setattr(logprob_forward, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    logits = (torch.randn(13, 17) * scale).requires_grad_()
    ids, weights = logits.detach().topk(4).indices, torch.randn(13, 5)
    before = logits.detach().clone()
    result, expected = group_logprobs(logits, ids, temperature), of_groups(logits, ids, temperature)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    (of_result,) = torch.autograd.grad((result * weights).sum(), logits)
    (of_expected,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(of_result, of_expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before), "the logits must not be changed in place"
