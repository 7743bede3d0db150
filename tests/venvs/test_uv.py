"""Calls of uv."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl.errors import VenvBuildError
from nemo_rl.venvs.uv import BuildLog, run_uv


def test_a_log_that_cannot_be_looked_for_does_not_hide_what_uv_says(tmp_path: Path) -> None:
    # No name may be so long: writing and looking fail, as they do in a directory that this user may not enter.
    with pytest.raises(VenvBuildError, match="no-such-command") as caught:
        run_uv(["no-such-command"], what="Trying", log=BuildLog(tmp_path / ("x" * 300)))
    assert caught.value.log_path == ""
