"""Progress and results of provisioning. Nodes that have only Ray import this module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nemo_rl.errors import NodeVenvError, VenvError
from nemo_rl.venvs import Progress


@dataclass(frozen=True)
class NodeProgress:
    """Describes one event of one venv on one node.

    Attributes:
        node_id: Ray's id of the node.
        node: IP address and host name, for messages.
        event: the event.
    """

    node_id: str
    node: str
    event: Progress


NodeProgressCallback = Callable[[NodeProgress], None]


@dataclass(frozen=True)
class NodeVenv:
    """Describes the result for one venv on one node.

    Attributes:
        venv: name of the venv.
        node_id: Ray's id of the node.
        node: address and host name, for messages.
        digest: digest of the content.
        python: `<venv dir>/<venv>/bin/python`, or the path of the requested interpreter.
        stable_python: the same interpreter by the path of the digest, which does not change with the lock.
        built: whether this call built the venv on this node.
        seconds: duration of each phase in this call.
        error: None if the venv is ready.
        received_from: the node that sent the venv in this call; empty if none did.
    """

    venv: str
    node_id: str
    node: str
    digest: str = ""
    python: str = ""
    stable_python: str = ""
    built: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    received_from: str = ""


@dataclass(frozen=True)
class NodeVenvReport:
    """Holds the results for every venv on every node.

    Attributes:
        entries: ordered by node (as `alive_nodes()`), then by venv (as in the call).
        seconds: duration of the call.
    """

    entries: tuple[NodeVenv, ...]
    seconds: float

    def of(self, venv: str) -> list[NodeVenv]:
        """Return the entries of one venv, one per node."""
        return [entry for entry in self.entries if entry.venv == venv]

    def digest(self, venv: str) -> str:
        """Return the venv's digest on the first node, that is, on the driver's platform."""
        return self.of(venv)[0].digest

    def agrees(self, venv: str) -> bool:
        """Return whether the venv has the same path and digest on every node."""
        return len({(entry.stable_python, entry.digest) for entry in self.of(venv)}) == 1

    def python(self, venv: str, node_id: str | None = None) -> str:
        """Return the interpreter for workers in this venv, on one node or on all nodes.

        It is the path of the digest, which survives a change of the lock, if that path is equal on the nodes. Otherwise
        it is the path of the venv's name; nodes of different platforms have different packages at that path.

        Args:
            node_id: default: all nodes.

        Raises:
            NodeVenvError: no path is valid on all nodes.
        """
        entries = [entry for entry in self.of(venv) if node_id in (None, entry.node_id)]
        for paths in ({entry.stable_python for entry in entries}, {entry.python for entry in entries}):
            if len(paths) == 1:
                return paths.pop()
        places = "; ".join(f"{entry.node}: {entry.python}" for entry in entries)
        raise NodeVenvError(
            f"the venv {venv} has different paths on the nodes ({places}). Set NEMO_RL_VENV_DIR to one path for all "
            "nodes."
        )

    def to_plain(self) -> list[dict[str, object]]:
        """Return the entries as plain data, for a run directory."""
        return [
            {
                "venv": entry.venv,
                "node": entry.node,
                "node_id": entry.node_id,
                "digest": entry.digest,
                "python": entry.python,
                "stable_python": entry.stable_python,
                "built": entry.built,
                "received_from": entry.received_from,
                "seconds": entry.seconds,
            }
            for entry in self.entries
        ]


class SharedFailureError(VenvError):
    """Another node failed to build a venv that this node needs."""


def raise_for_failures(entries: Iterable[NodeVenv]) -> None:
    """Raise `NodeVenvError` if a venv is not ready: which, on which node and why, and the results of the others.

    Its cause is the first error that is not the consequence of another.
    """
    entries = list(entries)
    # Causes precede their consequences.
    failed = sorted(
        (entry for entry in entries if entry.error is not None),
        key=lambda entry: isinstance(entry.error, SharedFailureError),
    )
    if not failed:
        return
    lines = [
        f"{len({entry.venv for entry in failed})} of {len({entry.venv for entry in entries})} venvs are not ready."
    ]
    lines += _summary(failed)
    succeeded = [entry for entry in entries if entry.error is None]
    if succeeded:
        lines += ["The others:", *_summary(succeeded)]
    raise NodeVenvError("\n".join(lines)) from failed[0].error


def _summary(entries: Iterable[NodeVenv]) -> list[str]:
    """Return one line per venv and outcome, with all its nodes."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        success = "built" if entry.built else "received" if entry.received_from else "ready"
        outcome = str(entry.error) if entry.error is not None else success
        duration = f" in {sum(entry.seconds.values()):.1f} s" if outcome in ("built", "received") else ""
        nodes.setdefault((entry.venv, outcome), []).append(f"{entry.node}{duration}")
    return [f"- {venv} on {', '.join(names)}: {outcome}" for (venv, outcome), names in nodes.items()]
