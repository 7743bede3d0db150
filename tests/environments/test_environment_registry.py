from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest

from nemo_rl.environments.config import EnvironmentConfig, MathEnvironmentConfig
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn
from nemo_rl.environments.registry import ENVIRONMENTS, environment_fqn
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import validate


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_every_registered_environment_can_be_built(name: str) -> None:
    module, _, attribute = environment_fqn(name).rpartition(".")
    cls = getattr(importlib.import_module(module), attribute)
    assert issubclass(cls, EnvironmentInterface)
    inspect.signature(cls).bind(**EnvironmentConfig(name=name).actor_kwargs())


def test_unknown_environment_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'math'"):
        environment_fqn("maths")


def test_other_environment_gets_its_options() -> None:
    assert EnvironmentConfig(name="chess", options={"depth": 3}).actor_kwargs() == {"depth": 3}


@pytest.mark.parametrize("wrong", [{"num_workers": 0}, {"timeout_s": 0}, {"answer_format": "boxd"}, {"timeout": 1}])
def test_invalid_settings_are_rejected(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        validate(MathEnvironmentConfig, wrong, where="env.math")


def test_fields_of_a_result_need_one_length() -> None:
    ones = np.ones(2)
    with pytest.raises(ValueError, match="status"):
        EnvironmentReturn(ones.astype(np.float32), ones.astype(bool), ["1", "2"], ["ok"], ones)
