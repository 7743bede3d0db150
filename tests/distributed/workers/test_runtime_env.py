"""Ray's actor options and runtime_env fields, merged by precedence."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.runtime_env import RuntimeEnv

from nemo_rl import settings
from nemo_rl.distributed.workers.runtime_env import (
    RUNTIME_ENV_FIELDS,
    ConfiguredWorker,
    WorkerOptions,
    checked_env_vars,
    checked_runtime_env,
    merged_runtime_env,
)
from nemo_rl.errors import RuntimeEnvError, WorkerStartError

VALUES: dict[str, Any] = {
    "conda": "base",
    "container": {"image": "image"},
    "image_uri": "image",
    "pip": ["packaging"],
    "uv": ["packaging"],
    "py_executable": "/usr/bin/python3",
}
COMPATIBLE = {frozenset({"pip", "py_executable"}), frozenset({"uv", "py_executable"})}


@pytest.mark.parametrize("pair", list(itertools.combinations(VALUES, 2)))
def test_conflict_between_fields_names_both(pair: tuple[str, str]) -> None:
    runtime_env = {name: VALUES[name] for name in pair}
    if frozenset(pair) in COMPATIBLE:
        assert checked_runtime_env(runtime_env) == runtime_env
        return
    with pytest.raises(RuntimeEnvError, match=f"'{pair[0]}' and '{pair[1]}' cannot both be given"):
        checked_runtime_env(runtime_env)


def test_container_excludes_other_fields() -> None:
    assert checked_runtime_env({"container": {"image": "i"}, "env_vars": {"A": "1"}, "config": {}})
    with pytest.raises(RuntimeEnvError, match="'image_uri' and 'working_dir' cannot both be given"):
        checked_runtime_env({"image_uri": "i", "working_dir": "s3://bucket/a.zip"})


def test_fields_of_ray_runtime_env_are_kept() -> None:
    given = RuntimeEnv(
        working_dir="s3://bucket/a.zip",
        py_modules=["s3://bucket/b.zip"],
        env_vars={"A": "1"},
        config={"setup_timeout_seconds": 5},
        nsight="default",
        worker_process_setup_hook="package.module.hook",
        excludes=["*.bin"],
    )
    fields = checked_runtime_env(given)
    assert fields.keys() == {
        "working_dir",
        "py_modules",
        "env_vars",
        "config",
        "nsight",
        "worker_process_setup_hook",
        "excludes",
    }
    assert fields.keys() <= RUNTIME_ENV_FIELDS
    assert RuntimeEnv(**fields) == given


def test_malformed_fields() -> None:
    with pytest.raises(RuntimeEnvError, match="unknown field 'env_var'. Did you mean 'env_vars'"):
        checked_runtime_env({"env_var": {}})
    with pytest.raises(RuntimeEnvError, match=r"env_vars\['N'\] must be a string, not int"):
        checked_env_vars({"N": 1})  # type: ignore[dict-item]
    with pytest.raises(RuntimeEnvError, match="must be a mapping"):
        checked_runtime_env(["pip"])  # type: ignore[arg-type]


def test_secret_of_the_wrong_type_is_not_shown() -> None:
    with pytest.raises(RuntimeEnvError) as failure:
        checked_env_vars({"A_TOKEN": b"hidden"})  # type: ignore[dict-item]
    assert "hidden" not in str(failure.value)


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
