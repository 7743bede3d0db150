"""Imports without garbage collection."""

from __future__ import annotations

import gc
import weakref

import pytest

from nemo_rl.utils.garbage import gc_paused


class Node:
    """Refers to itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.myself = self


def test_block_is_not_collected_and_then_frozen() -> None:
    before = gc.get_freeze_count()
    with gc_paused():
        assert not gc.isenabled()
        alive, unreachable = Node(), weakref.ref(Node())
        assert unreachable() is not None
    try:
        assert gc.isenabled()
        assert unreachable() is None
        assert gc.get_freeze_count() > before
        assert not any(item is alive for item in gc.get_objects())
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_collector_state_is_restored(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), gc_paused():
            raise KeyError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
