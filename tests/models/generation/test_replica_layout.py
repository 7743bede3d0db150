"""The bundles of replicas."""

from __future__ import annotations

import pytest

from nemo_rl.errors import ConfigError
from nemo_rl.models.generation.replica_layout import replica_bundles


def test_workers_are_distributed_evenly_over_nodes() -> None:
    def per_node(*arguments: object) -> list[int]:
        places = [node for node, _ in replica_bundles(*arguments, size=1)]
        return [places.count(node) for node in (0, 1)]

    assert per_node([2, 2], None) == [2, 2]
    assert per_node([2, 2], 2) == [1, 1]
    assert per_node([1, 4], 4) == [1, 3]
    with pytest.raises(ConfigError, match="num_workers=5, but only 4 workers fit"):
        replica_bundles([2, 2], 5, 1)


def test_replica_stays_on_one_node() -> None:
    assert replica_bundles([4, 2], None, 2) == [(0, [0, 1]), (0, [2, 3]), (1, [0, 1])]
    assert replica_bundles([3, 3], 4, 2) == [(0, [0, 1]), (1, [0, 1])]
    with pytest.raises(ConfigError, match=r"\[3, 3\] per node, cannot be divided into replicas of 2"):
        replica_bundles([3, 3], None, 2)
    with pytest.raises(ConfigError, match="num_workers=3 cannot be divided into replicas of 2"):
        replica_bundles([4], 3, 2)
    with pytest.raises(ConfigError, match="num_workers=8, but only 4 workers fit"):
        replica_bundles([3, 3], 8, 2)
