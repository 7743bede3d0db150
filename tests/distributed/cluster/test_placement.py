"""Assignment of a job's nodes to Ray nodes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.distributed.cluster.placement import STRATEGIES, capacity, plan


def test_capacity_is_limited_by_the_scarcest_resource() -> None:
    assert capacity({"CPU": 7.5, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}) == 4
    assert capacity({"CPU": 3.9, "GPU": 4.0}, {"CPU": 1.0, "GPU": 1.0}) == 3
    assert capacity({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}) == 0


def test_capacity_tolerates_rounding_errors() -> None:
    assert capacity({"CPU": 2.9999999999}, {"CPU": 1.0}) == 3


@pytest.mark.parametrize(
    ("capacities", "counts", "strategy", "chosen"),
    [
        ([8, 8], [2, 2], "SPREAD", [0, 1]),
        ([8], [2, 2], "SPREAD", [0, 0]),
        ([2, 8], [8, 2], "SPREAD", [1, 0]),
        ([8, 2], [2, 2, 2], "SPREAD", [1, 0, 0]),
        ([8], [2, 2], "STRICT_SPREAD", None),
        ([8, 8], [2, 2], "STRICT_SPREAD", [0, 1]),
        ([4, 8], [2, 2], "PACK", [1, 1]),
        ([2, 2], [2, 2], "PACK", [0, 1]),
        ([3, 4], [2, 2], "STRICT_PACK", [1, 1]),
        ([3, 3], [2, 2], "STRICT_PACK", None),
        ([1, 1], [2], "SPREAD", None),
        ([], [1], "SPREAD", None),
    ],
)
def test_plan(capacities: list[int], counts: list[int], strategy: str, chosen: list[int] | None) -> None:
    assert plan(capacities, counts, strategy) == chosen


@given(
    st.lists(st.integers(0, 8), max_size=6),
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.sampled_from(STRATEGIES),
)
def test_plan_never_overfills_a_node(capacities: list[int], counts: list[int], strategy: str) -> None:
    chosen = plan(capacities, counts, strategy)
    if chosen is None:
        return
    assert len(chosen) == len(counts)
    load = Counter[int]()
    for index, count in zip(chosen, counts, strict=True):
        load[index] += count
    assert all(load[index] <= capacities[index] for index in load)
    if strategy == "STRICT_SPREAD":
        assert len(load) == len(counts)
    if strategy == "STRICT_PACK":
        assert len(load) == 1


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_spread_finds_distinct_nodes_if_they_exist(counts: list[int], random) -> None:
    """Each node is just large enough for one of the counts, in any order."""
    capacities = list(counts)
    random.shuffle(capacities)
    for strategy in ("SPREAD", "STRICT_SPREAD"):
        chosen = plan(capacities, counts, strategy)
        assert chosen is not None
        assert sorted(chosen) == list(range(len(counts)))
