"""Ray's actor options and runtime_env fields, merged by precedence."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl import settings
from nemo_rl.distributed.workers.runtime_env import (
    ConfiguredWorker,
    WorkerOptions,
    merged_runtime_env,
)
from nemo_rl.errors import WorkerStartError

ENV_VARS = st.dictionaries(st.sampled_from("ABC"), st.text(max_size=3), max_size=3)


LAYERS = st.fixed_dictionaries({}, optional={"env_vars": ENV_VARS, "working_dir": st.text(max_size=2)})


@given(st.lists(LAYERS, max_size=4))
def test_merging_is_per_field_and_per_variable(layers: list[dict[str, Any]]) -> None:
    copies = [{k: dict(v) if isinstance(v, dict) else v for k, v in layer.items()} for layer in layers]
    merged = merged_runtime_env(*layers)
    for name in "ABC":
        values = [layer["env_vars"][name] for layer in layers if name in layer.get("env_vars", {})]
        assert merged.get("env_vars", {}).get(name) == (values[-1] if values else None)
    dirs = [layer["working_dir"] for layer in layers if "working_dir" in layer]
    assert merged.get("working_dir") == (dirs[-1] if dirs else None)
    assert layers == copies


def test_higher_layer_replaces_the_choice_of_python() -> None:
    assert merged_runtime_env({"pip": ["a"], "py_executable": "p"}, {"conda": "c"}) == {"conda": "c"}
    assert merged_runtime_env({"pip": ["a"]}, {"uv": ["b"]}) == {"uv": ["b"]}
    assert merged_runtime_env({"pip": ["a"]}, {"py_executable": "p"}) == {"pip": ["a"], "py_executable": "p"}


def test_configure_worker_logs_the_options_it_overrides(caplog: pytest.LogCaptureFixture) -> None:
    options = WorkerOptions(
        ray={"num_cpus": 2, "name": "n"}, runtime_env={"env_vars": {"A": "user", "A_TOKEN": "hidden-1", "B": "user"}}
    )
    configured = ({"num_cpus": 1}, {"A": "class", "A_TOKEN": "hidden-2"}, {"seed": 3}, {"working_dir": "s3://b/a.zip"})
    with caplog.at_level(logging.WARNING):
        result = options.with_configured(ConfiguredWorker.from_result(configured, "module.Class"), "module.Class")
    assert result.ray == {"num_cpus": 1, "name": "n"}
    assert result.runtime_env["env_vars"] == {"A": "class", "A_TOKEN": "hidden-2", "B": "user"}
    assert result.runtime_env["working_dir"] == "s3://b/a.zip"
    assert result.init_kwargs == {"seed": 3}
    assert "overrides num_cpus=2 with 1" in caplog.text
    assert "overrides env_vars.A='user' with 'class'" in caplog.text
    assert f"overrides env_vars.A_TOKEN={settings.MASK!r}" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.parametrize("configured", [None, (), ({},), ([], {}, {}, {}), ({}, {}, {}, "x")])
def test_invalid_result_of_configure_worker(configured: Any) -> None:
    with pytest.raises(WorkerStartError, match=r"module\.Class\.configure_worker"):
        ConfiguredWorker.from_result(configured, "module.Class")
