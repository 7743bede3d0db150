"""Chooses the nodes of environment workers.

They reserve no resources by default, and Ray (2.60) puts such actors on any node, perhaps all on the same one.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter

from nemo_rl.distributed.cluster.nodes import worker_nodes

_lock = threading.Lock()
_groups: weakref.WeakSet[ReplicaNodes] = weakref.WeakSet()


class ReplicaNodes:
    """Distributes the replicas of a group evenly over the nodes, and then those of all groups of this process.

    Thread-safe. The object of a group counts until it is deleted.
    """

    def __init__(self) -> None:
        self._nodes: dict[int, str] = {}
        with _lock:
            _groups.add(self)

    def choose(self, index: int) -> str:
        """Return the id of the node on which a replica, or its replacement, is to start."""
        nodes = [node.node_id for node in worker_nodes()]
        with _lock:
            self._nodes.pop(index, None)
            of_group = Counter(self._nodes.values())
            of_all = Counter(node for group in _groups for node in group._nodes.values())
            self._nodes[index] = min(nodes, key=lambda node: (of_group[node], of_all[node]))
            return self._nodes[index]

    def record(self, index: int, node_id: str) -> None:
        """Note the node on which a replica runs."""
        with _lock:
            self._nodes[index] = node_id

    def is_lost(self, index: int) -> bool:
        """Return whether the node of a replica has left the cluster. False if it has none yet."""
        with _lock:
            node_id = self._nodes.get(index)
        return node_id is not None and node_id not in {node.node_id for node in worker_nodes()}
