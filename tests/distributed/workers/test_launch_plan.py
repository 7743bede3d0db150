"""The runtime_env of workers, without a cluster."""

from __future__ import annotations

import json

import pytest

from nemo_rl.distributed.workers.launch_plan import WorkerPython, ray_runtime_env

SECRET = "a-value-that-must-stay-secret"
FORWARDED = {
    "HTTPS_PROXY": f"http://user:{SECRET}@proxy:8080",
    "http_proxy": f"http://{SECRET}@proxy:8080",
    "MLFLOW_TRACKING_URI": f"https://user:{SECRET}@mlflow.example",
    "HF_ENDPOINT": f"https://hub.example/?token={SECRET}",
    "HF_TOKEN": SECRET,
}


def test_credentials_do_not_reach_the_runtime_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FORWARDED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:8080")
    given = {"INDEX": f"https://user:{SECRET}@host/simple", "PLAIN": "https://host/simple"}
    runtime_env, host_env_vars = ray_runtime_env(WorkerPython(), {"env_vars": given})
    assert SECRET not in json.dumps(runtime_env)
    assert runtime_env["env_vars"]["PLAIN"] == given["PLAIN"]
    assert runtime_env["env_vars"]["HTTP_PROXY"] == "http://proxy:8080"
    assert host_env_vars.items() >= {**FORWARDED, "INDEX": given["INDEX"]}.items()
