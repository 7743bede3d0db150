"""Validates the cluster examples and the Dockerfile without a cluster or a Docker engine."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kuberay_fields import KINDS
from kubernetes_validate import latest_version, validate
from pydantic import ValidationError

from nemo_rl.distributed.cluster import ports
from nemo_rl.settings import is_secret

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTERS = REPOSITORY / "examples" / "clusters"
SECRET_VALUE = re.compile(r"hf_[A-Za-z0-9]{8,}|(?:TOKEN|PASSWORD|SECRET)=[A-Za-z0-9]{8,}")


def cluster_spec(name: str, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    manifest = manifest or yaml.safe_load((CLUSTERS / name).read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"])
def test_manifest_fields_are_valid(name: str) -> None:
    manifest = yaml.safe_load((CLUSTERS / name).read_text())
    KINDS[manifest["kind"]].model_validate(manifest)
    group = cluster_spec(name, manifest)["workerGroupSpecs"][0]
    for spoil in (
        lambda: group.update(replica=3),
        lambda: group.update(replicas=9),
        lambda: group["rayStartParams"].update({"num-gpus": 8}),
        lambda: group["template"]["spec"].pop("volumes"),
        lambda: group["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu=64),
    ):
        before = copy.deepcopy(group)
        spoil()
        with pytest.raises(ValidationError):
            KINDS[manifest["kind"]].model_validate(manifest)
        group.clear()
        group.update(before)


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"])
def test_pods_match_the_kubernetes_schema(name: str) -> None:
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": group["template"]["spec"]}
        assert set(group["template"]) == {"spec"}
        validate(pod, latest_version(), strict=True)
        container = group["template"]["spec"]["containers"][0]
        for spoiled in ({"imagee": "nemo-rl"}, {"securityContext": {"runAsUser": "nemo"}}, {"env": [{"value": "1"}]}):
            broken = {**pod, "spec": {**pod["spec"], "containers": [{**container, **spoiled}]}}
            with pytest.raises(kubernetes_validate.ValidationError):
                validate(broken, latest_version(), strict=True)


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"])
def test_manifest_has_one_image_without_root_and_locked_ray(name: str) -> None:
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers = [container for group in groups for container in group["template"]["spec"]["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for container in containers:
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["securityContext"]["runAsNonRoot"] is True
    locked = tomllib.loads((REPOSITORY / "uv.lock").read_text())["package"]
    assert spec["rayVersion"] == next(package["version"] for package in locked if package["name"] == "ray")


@pytest.mark.parametrize("name", ["kuberay-rayjob.yaml", "kuberay-raycluster.yaml"])
def test_manifest_secrets_are_references(name: str) -> None:
    spec = cluster_spec(name)
    # The operator passes the token to every container, including a RayJob's submitter.
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            for entry in container["env"]:
                assert not is_secret(entry["name"]) or "secretKeyRef" in entry["valueFrom"]
                assert not entry["name"].startswith("RAY_AUTH")


def test_manifest_entrypoint_exists() -> None:
    job = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    words = job["spec"]["entrypoint"].split()
    assert all((REPOSITORY / word).is_file() for word in words if word.endswith((".py", ".yaml")))


def test_examples_contain_no_secrets() -> None:
    for path in [*CLUSTERS.iterdir(), REPOSITORY / "docker" / "Dockerfile"]:
        assert not SECRET_VALUE.search(path.read_text()), path


@pytest.mark.parametrize("script", ["examples/clusters/slurm.sbatch", "tools/build_image.sh"])
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_ports_of_slurm_jobs_are_disjoint_and_below_those_of_worker_groups() -> None:
    script = (CLUSTERS / "slurm.sbatch").read_text()
    (base,) = re.findall(r"BASE_PORT=(\$\(\(.*?\)\))", script)
    offsets = [int(offset) for offset in re.findall(r"BASE_PORT \+ (\d+)", script)]
    command = f"for SLURM_JOB_ID in {{0..39}}; do echo {base}; done"
    lines = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout.split()
    bases = sorted({int(line) for line in lines})
    assert len(offsets) == len(set(offsets))
    assert min(offsets) > 0
    assert all(after - before > max(offsets) for before, after in pairwise(bases))
    assert bases[-1] + max(offsets) < ports._WINDOWS[0].start


def instructions() -> list[tuple[str, str]]:
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_dockerfile_targets_and_user() -> None:
    stages = [words[2] for words in (rest.split() for name, rest in instructions() if name == "FROM")]
    assert {"hermetic", "release"} <= set(stages)
    assert stages[-1] == "release", "the default target must be release"
    assert [rest for name, rest in instructions() if name == "USER"][-1] != "root"
    assert not [rest for name, rest in instructions() if "<<" in rest], "Debian's buildah does not support heredocs"


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    included = {line[1:] for line in ignore if line.startswith("!")}
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert source == "." or source.split("/")[0] in included, source


def test_venvs_stage_has_the_source_it_needs(tmp_path: Path) -> None:
    """Copies only the files of this stage and runs `nemo-rl venvs build` with them."""
    for name, rest in instructions():
        *sources, target = rest.split()
        if name == "COPY" and all(source.startswith("nemo_rl") for source in sources):
            for source in map(Path, sources):
                to = tmp_path / target
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, to)
                else:
                    to.mkdir(parents=True, exist_ok=True)
                    shutil.copy(REPOSITORY / source, to)
    env = {"PYTHONPATH": str(tmp_path), "NEMO_RL_PROJECT_ROOT": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    env["NEMO_RL_VENV_DIR"] = str(tmp_path / "venvs")
    command = [sys.executable, "-m", "nemo_rl.cli", "venvs", "build", "unknown"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "neither a registered worker class nor an extra" in done.stderr


def test_dockerfile_uses_existing_extras() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    assert set(re.findall(r"--extra (\S+)", text)) <= set(extras)
