"""Making venvs ready: identity, sharing, sealing, rebuilding."""

from __future__ import annotations

import os
from pathlib import Path

from sample_projects import Project, run_in

from nemo_rl import venvs
from nemo_rl.venvs import Store


def test_returns_the_named_interpreter_with_what_was_asked_for(project: Project, store: Store) -> None:
    python = venvs.create_local_venv(project.command("--extra", "one"), "some.module.Worker")

    assert python == str(store.root / "some.module.Worker" / "bin" / "python")
    assert run_in(python, "import alpha, beta, gamma; print(alpha.VERSION, beta.VERSION)") == "1.0 1.0"
    assert (
        run_in(python, "import importlib.util as u; print(u.find_spec('delta'), u.find_spec('epsilon'))") == "None None"
    )


def test_a_warm_call_builds_nothing_and_calls_no_uv(project: Project, monkeypatch) -> None:
    first = venvs.ensure(project.command(), "A")
    monkeypatch.setenv("NEMO_RL_UV", "/nowhere/uv")
    second = venvs.ensure(project.command(), "A")

    assert first.built
    assert not second.built
    assert (second.python, second.path, second.digest) == (first.python, first.path, first.digest)


def test_equal_digests_share_one_venv(project: Project, store: Store) -> None:
    ready = [venvs.ensure(project.command("--extra", "one"), f"worker.Class{i}") for i in range(8)]

    assert sum(venv.built for venv in ready) == 1
    assert len({venv.path for venv in ready}) == 1
    assert len({os.path.realpath(Path(venv.python).parent) for venv in ready}) == 1
    assert len(store.digests()) == 1
