"""The part of KubeRay's API (ray.io/v1) and of Kubernetes' pods that the examples use: names, types and demands.

Written down from KubeRay 1.6's reference of its custom resources; names, types and allowed values of each were also
compared with the operator's published Go types, which its CRDs are generated from. Pods are checked in whole against
Kubernetes' own schema as well (`test_cluster_examples.py`). A field that is not here is refused, as the API server
refuses unknown ones under strict validation; so is a wrong type, such as a number for `ray start`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SecretKeyRef(Strict):
    name: Name
    key: str


class ValueFrom(Strict):
    secretKeyRef: SecretKeyRef


class EnvVar(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        assert (self.value is None) != (self.valueFrom is None), f"{self.name} needs either a value or a reference"
        return self


class Port(Strict):
    containerPort: Annotated[int, Field(ge=1, le=65535)]
    name: Annotated[Name, StringConstraints(max_length=15)]


class Resources(Strict):
    limits: dict[str, Quantity]
    requests: dict[str, Quantity]


class SecurityContext(Strict):
    runAsNonRoot: bool
    runAsUser: int
    allowPrivilegeEscalation: bool


class VolumeMount(Strict):
    mountPath: str
    name: Name


class Container(Strict):
    name: Name
    image: str
    env: list[EnvVar] = []
    ports: list[Port] = []
    resources: Resources
    securityContext: SecurityContext
    volumeMounts: list[VolumeMount] = []


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    emptyDir: EmptyDir


class PodSpec(Strict):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> Self:
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        assert mounted == {volume.name for volume in self.volumes}, "mounts and volumes differ"
        return self


class Template(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: Template


class WorkerGroup(HeadGroup):
    groupName: Name
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Self:
        assert self.minReplicas <= self.replicas <= self.maxReplicas, "replicas are not within their bounds"
        return self


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class RayClusterSpec(Strict):
    rayVersion: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: str
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = 0
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def _time_to_live_needs_a_shutdown(self) -> Self:
        assert self.shutdownAfterJobFinishes or not self.ttlSecondsAfterFinished, "the operator refuses this"
        return self


class Metadata(Strict):
    name: Name


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


KINDS: dict[str, type[RayCluster] | type[RayJob]] = {"RayCluster": RayCluster, "RayJob": RayJob}
