"""The key by which the vLLM backend knows the job's rows. These tests do not need vLLM."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.models.generation.config import SamplingConfig
from nemo_rl.models.generation.interfaces import GenerationRequest
from nemo_rl.models.generation.sampling import Sampler
from nemo_rl.models.generation.vllm.draws import ROW, Draws, JobRow, draw_rows, job_row

VOCABULARY = 11
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


def draws(seed: int, num_rows: int = 4) -> Draws:
    request = GenerationRequest(
        torch.ones(num_rows, 3, dtype=torch.int64), torch.full((num_rows,), 3), seed, num_generations=1
    )
    return Draws(request, num_tokens=5, sampler=Sampler(SamplingConfig(), greedy=False))


@given(st.none() | st.dictionaries(st.text() | st.just(ROW), JSON, max_size=3))
def test_no_json_names_a_row(extra_args: dict | None) -> None:
    assert job_row(json.loads(json.dumps(extra_args))) is None


def test_requests_of_the_job_carry_their_row() -> None:
    row = JobRow(draws(0), 2)
    assert job_row({ROW: row, "other": 1}) is row


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_row_cannot_be_duplicated(duplicate) -> None:
    """A vLLM that copied the parameters of a request would otherwise fill a copy's log-probabilities."""
    with pytest.raises(TypeError, match="cannot be copied"):
        duplicate(JobRow(draws(0), 2))


def test_rows_of_several_requests_in_one_batch() -> None:
    """Each row is drawn as if its request were alone, and its log-probability is stored with its request."""
    torch.manual_seed(0)
    logits = torch.randn(6, VOCABULARY)
    both = draws(1), draws(2)
    places = [(0, 3), (1, 0), (0, 1), (1, 3), (1, 1), (0, 0)]  # which request, which row
    columns = [0, 1, 0, 2, 0, 1]
    tokens = draw_rows(logits, [JobRow(both[which], index) for which, index in places], columns)
    for which in (0, 1):
        alone = draws(which + 1)
        mine = [place for place, (owner, _) in enumerate(places) if owner == which]
        rows = [JobRow(alone, places[place][1]) for place in mine]
        assert torch.equal(draw_rows(logits[mine], rows, [columns[place] for place in mine]), tokens[mine])
        for index in range(4):
            assert torch.equal(torch.stack(both[which].logprobs(index, 5)), torch.stack(alone.logprobs(index, 5)))
    expected = logits.log_softmax(-1)[torch.arange(6), tokens]
    stored = [both[which].logprobs(index, 5)[0][column] for (which, index), column in zip(places, columns)]
    assert torch.allclose(torch.stack(stored), expected, atol=1e-6)
