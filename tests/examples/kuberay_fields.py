"""Pydantic models of the fields of KubeRay (ray.io/v1) and Kubernetes pods that the examples use.

The fields follow the API reference of KubeRay 1.6. Names, types and allowed values were compared with the operator's Go
types, from which its CRDs are generated. `test_cluster_examples.py` also validates pods against the Kubernetes schema.
Unknown fields and wrong types, such as a number in `rayStartParams`, are refused, as in strict API server validation.
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
    def _check_value(self) -> Self:
        assert (self.value is None) != (self.valueFrom is None), f"{self.name} needs either value or valueFrom"
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
    def _check_volumes(self) -> Self:
        mounted = {mount.name for container in self.containers for mount in container.volumeMounts}
        assert mounted == {volume.name for volume in self.volumes}, "volumeMounts and volumes differ"
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
    def _check_replicas(self) -> Self:
        assert self.minReplicas <= self.replicas <= self.maxReplicas, (
            "replicas must be between minReplicas and maxReplicas"
        )
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
    def _check_ttl(self) -> Self:
        assert self.shutdownAfterJobFinishes or not self.ttlSecondsAfterFinished, (
            "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        )
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
