"""Variables of workers on CPUs."""

from __future__ import annotations

import pytest

from nemo_rl.models.cpu_threads import cpu_env_vars

KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "30000"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNELS | WAITING:
        monkeypatch.delenv(name, raising=False)


def test_all_are_set_if_the_user_sets_none() -> None:
    assert cpu_env_vars() == NO_GPU | WAITING | KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_a_variable_of_the_user_replaces_both_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1024")
    assert cpu_env_vars() == NO_GPU | WAITING


@pytest.mark.parametrize("name", WAITING)
def test_a_variable_of_the_user_replaces_both_kinds_of_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ACTIVE")
    assert cpu_env_vars() == NO_GPU | KERNELS
