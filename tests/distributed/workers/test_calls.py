"""Calls of worker groups: which worker receives which part of the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.distributed.workers.calls import (
    check_list_lengths,
    check_nested_lengths,
    pick,
    plan_sharded_call,
    ranks_called,
)

SHARDING = NamedSharding(np.arange(12).reshape(2, 3, 2), ["pipe", "data", "tensor"])


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    roles=st.lists(st.sampled_from(["sharded", "replicated", "free"]), min_size=3, max_size=3),
    dummies=st.booleans(),
)
def test_every_worker_has_exactly_one_role(shape: list[int], roles: list[str], dummies: bool) -> None:
    names = ["a", "b", "c"][: len(shape)]
    sharding = NamedSharding(np.arange(int(np.prod(shape))).reshape(shape), names)
    names_of = {role: [n for n, r in zip(names, roles) if r == role] for role in ("sharded", "replicated", "free")}
    call = plan_sharded_call(sharding, names_of["sharded"], names_of["replicated"], None, dummies)
    idle = {r for r in range(sharding.size) if any(sharding.get_worker_coords(r)[n] for n in names_of["free"])}
    assert set(call.called) == set(range(sharding.size)) - idle
    assert set(call.dummies) == (idle if dummies else set())
    assert call.returning == call.called
    for rank in call.called:
        coords = sharding.get_worker_coords(rank)
        assert call.slice_of[rank] == tuple(coords[name] for name in names_of["sharded"])


def test_replicated_output_keeps_index_zero() -> None:
    call = plan_sharded_call(SHARDING, ["data"], ["pipe", "tensor"], ["pipe", "tensor"], False)
    assert call.called == list(range(12))
    assert call.returning == [0, 2, 4]


@pytest.mark.parametrize(
    ("sharded", "replicated", "output", "message"),
    [
        (["data"], ["data"], None, r"\['data'\] are given as sharded and as replicated"),
        (["date"], None, None, r"Unknown axis 'date'.*Did you mean 'data'"),
        (None, ["x"], None, "Unknown axis 'x'"),
        (None, None, ["x"], "Unknown axis 'x'"),
        (["data", "data"], None, None, "twice"),
        ("data", None, None, "not the string 'data'"),
    ],
)
def test_invalid_axes(sharded: list[str], replicated: list[str], output: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sharded_call(SHARDING, sharded, replicated, output, False)


def test_nested_lengths_are_checked_at_every_level() -> None:
    good = [[1, 2], [3, 4], [5, 6]]
    check_nested_lengths("x", good, ["data", "tensor"], SHARDING)
    assert pick(good, (2, 1)) == 6
    with pytest.raises(ValueError, match=r"x has 2 entries, but axis 'data' has 3 workers"):
        check_nested_lengths("x", good[:2], ["data", "tensor"], SHARDING)
    with pytest.raises(ValueError, match=r"x\[1\] has 1 entries, but axis 'tensor' has 2 workers"):
        check_nested_lengths("x", [[1, 2], [3], [5, 6]], ["data", "tensor"], SHARDING)
    with pytest.raises(ValueError, match=r"x\[0\] must be a list .* not ndarray"):
        check_nested_lengths("x", list(np.zeros((3, 2))), ["data", "tensor"], SHARDING)


def test_rank_0_only_axes() -> None:
    assert ranks_called(None, 3, None) == [0, 1, 2]
    assert ranks_called(SHARDING, 12, ["pipe", "tensor"]) == [0, 2, 4]
    with pytest.raises(ValueError, match="needs a worker group with sharding_annotations"):
        ranks_called(None, 3, ["pipe"])


def test_list_lengths() -> None:
    check_list_lengths({"x": [1, 2]}, [0, 1])
    with pytest.raises(ValueError, match="y has 3 entries, but 2 workers are called"):
        check_list_lengths({"x": [1, 2], "y": (1, 2, 3)}, [0, 1])
    with pytest.raises(ValueError, match="x must be a list .* not dict"):
        check_list_lengths({"x": {}}, [0, 1])
