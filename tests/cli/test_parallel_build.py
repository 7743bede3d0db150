"""Tests builders that fail with an operating system error."""

from __future__ import annotations

import pytest

from nemo_rl.cli import parallel_build
from nemo_rl.cli.targets import Target


def test_os_error_is_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def ensure(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/shut/venvs")

    monkeypatch.setattr(parallel_build, "ensure", ensure)
    (outcome,) = parallel_build.build_all(
        [Target("base", "uv run")], force=False, jobs=1, on_event=lambda name, event: None
    )
    assert "'base' cannot be built" in str(outcome.error)
    assert "Permission denied: '/shut/venvs'" in str(outcome.error)
