"""Placement of workers on bundles."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rl.distributed.workers.layout import place_workers
from nemo_rl.errors import ConfigError


def placements(*args: Any) -> list[tuple[int, int, int, int, int, bool]]:
    return [(p.rank, p.node_idx, p.bundle, p.local_rank, p.tied_group, p.is_leader) for p in place_workers(*args)]


def test_one_worker_per_bundle() -> None:
    assert placements([2, 1], None, None) == [
        (0, 0, 0, 0, 0, True),
        (1, 0, 1, 1, 1, True),
        (2, 1, 2, 0, 2, True),
    ]


def test_workers_per_node() -> None:
    assert placements([2, 2], 1, None) == placements([2, 2], [1, 1], None)
    assert placements([2, 2], [1, 2], None) == [
        (0, 0, 0, 0, 0, True),
        (1, 1, 2, 0, 1, True),
        (2, 1, 3, 1, 2, True),
    ]


def test_tied_groups_on_and_across_nodes() -> None:
    assert placements([2, 2], None, [(1, [1, 0]), (0, [0])]) == [
        (0, 1, 3, 0, 0, True),
        (1, 1, 2, 1, 0, False),
        (2, 0, 0, 0, 1, True),
    ]
    assert [p.node_idx for p in place_workers([2, 2], None, [(0, [0, 1, 2, 3])])] == [0, 0, 1, 1]
    assert [p.local_rank for p in place_workers([2, 2], None, [(0, [0, 1, 2, 3])])] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("workers_per_node", "bundle_indices_list", "message"),
    [
        (3, None, "3 workers on node 0, which has 2"),
        (0, None, "0 workers"),
        (True, None, "True workers"),
        ([1], None, "1 entries for 2 nodes"),
        (1, [(0, [0])], "not both"),
        (None, [(2, [0])], "names node 2; there are 2 nodes"),
        (None, [(1, [2])], "bundle 2 of node 1"),
        (None, [(0, [-1])], "bundle -1"),
        (None, [(0, [0, 0])], "twice"),
        (None, [(0, [2]), (1, [0])], "twice"),
        (None, [(0, [])], "names no bundles"),
    ],
)
def test_invalid_layouts(workers_per_node: Any, bundle_indices_list: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_workers([2, 2], workers_per_node, bundle_indices_list)
