"""Names and conflicts of runtime_env fields."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from ray.runtime_env import RuntimeEnv

from nemo_rl.distributed.workers.runtime_env_fields import RUNTIME_ENV_FIELDS, checked_env_vars, checked_runtime_env
from nemo_rl.errors import RuntimeEnvError

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
