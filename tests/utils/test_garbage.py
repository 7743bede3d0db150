"""Start-up without garbage collection."""

from __future__ import annotations

import gc
import weakref

import pytest

from nemo_rl.utils.garbage import without_collecting


class Node:
    """Refers to itself, so that only the collector finds out that nobody uses it."""

    def __init__(self) -> None:
        self.own = self


def test_nothing_is_collected_meanwhile_and_what_stays_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    with without_collecting():
        assert not gc.isenabled()
        kept, dropped = Node(), weakref.ref(Node())
        assert dropped() is not None
    try:
        assert gc.isenabled()
        assert dropped() is None
        assert gc.get_freeze_count() > before
        assert not any(item is kept for item in gc.get_objects())
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_left_as_it_was(was_enabled: bool) -> None:
    if not was_enabled:
        gc.disable()
    try:
        with pytest.raises(KeyError), without_collecting():
            raise KeyError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
