"""The runtime_env of workers, without a cluster."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl.distributed.workers import launch_plan, runtime_env
from nemo_rl.distributed.workers.launch_plan import LaunchPlan, WorkerPython, ray_runtime_env
from nemo_rl.errors import ClusterError

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
    fields, host_env_vars = ray_runtime_env(WorkerPython(), {"env_vars": given})
    assert SECRET not in json.dumps(fields)
    assert fields["env_vars"]["PLAIN"] == given["PLAIN"]
    assert fields["env_vars"]["HTTP_PROXY"] == "http://proxy:8080"
    assert host_env_vars.items() >= {**FORWARDED, "INDEX": given["INDEX"]}.items()


@pytest.mark.parametrize(
    ("fields", "program"),
    [
        ({"nsight": "default"}, "nsys"),
        ({"nsight": {"t": "cuda"}, "pip": ["packaging"]}, "nsys"),
        ({"rocprof_sys": "default"}, "rocprof-sys-python"),
        ({"conda": "base"}, "conda or mamba"),
        ({"image_uri": "image"}, "podman"),
    ],
)
def test_missing_program_is_reported_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], program: str
) -> None:
    node = SimpleNamespace(node_id="a", address="10.0.0.1")
    steps: list[str] = []
    monkeypatch.setattr(launch_plan, "alive_nodes", lambda: [node])
    monkeypatch.setattr(runtime_env, "alive_nodes", lambda: [node])
    monkeypatch.setattr(launch_plan, "distribute_source", lambda nodes: steps.append("source"))
    monkeypatch.setattr(launch_plan, "ensure_venvs_on_each_node", lambda *_, **__: steps.append("venv"))
    monkeypatch.setattr(runtime_env, "ask_nodes", lambda *_, **__: [(node, [])])
    with pytest.raises(ClusterError, match=rf"needs {program}, which is not on the PATH of 10.0.0.1. Install it"):
        launch_plan.prepare_python("package.Worker", fields)
    assert steps == ["source"]
    # A class's own runtime_env, or its configure_worker, may add the field later.
    plan = LaunchPlan("package.Worker", WorkerPython(), {}, {}, {}, SimpleNamespace(), None)  # type: ignore[arg-type]
    with pytest.raises(ClusterError, match=program):
        plan.with_fields(fields)
