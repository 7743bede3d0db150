"""The manifest of a sealed venv. A build writes it last; it holds no secrets."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nemo_rl.errors import VenvError
from nemo_rl.venvs.storage.verify import MANIFEST_FILE

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Describes the content and the build of a sealed venv.

    Attributes:
        digest: identity of the content, 64 hexadecimal digits.
        spec: canonical py_executable of the first build; venvs with equal digests are one venv.
        packages: `name==version` or `name @ location` of each package in this venv, without those of the base.
        python: full version of Python.
        implementation: such as `cpython-311`, with ABI flags.
        platform: such as `linux-x86_64-glibc`.
        base_python: path of the interpreter that the venv was created from.
        uv: version of uv that built the venv.
        host: host name of the node that built it.
        built_at: ISO time of the seal.
        started_at: seconds since the epoch when the build began.
        base_digest: digest of the base venv of an additive venv; None otherwise.
        base_paths: site-packages of the base interpreter of an additive venv.
        ray: version of ray; None if the venv has no ray.
        records: dist-info directory -> sha256 of its RECORD, for `verify`.
        num_files, num_bytes: number and total size of the files in the RECORDs.
        seconds: per phase of the build.
        job_id: the job that built the venv.
        build_variables: variables that builds of source packages received, with secrets masked.
        log_path: full output of the build.
        format: version of the manifest's format.
    """

    digest: str
    spec: str
    packages: tuple[str, ...]
    python: str
    implementation: str
    platform: str
    base_python: str
    uv: str
    host: str
    built_at: str
    started_at: float
    base_digest: str | None = None
    base_paths: tuple[str, ...] = ()
    ray: str | None = None
    records: dict[str, str] = field(default_factory=dict)
    num_files: int = 0
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    job_id: str | None = None
    build_variables: dict[str, str] = field(default_factory=dict)
    log_path: str = ""
    format: int = FORMAT


class BrokenManifestError(VenvError):
    """A manifest is missing, malformed or of an unsupported format."""


def read_manifest(venv: Path) -> Manifest:
    """Read the manifest of the venv directory `venv`. Raises `BrokenManifestError`."""
    path = venv / MANIFEST_FILE
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise BrokenManifestError(f"{path} has format {raw['format']!r}; this version reads {FORMAT}.")
        names = {item.name for item in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in raw.items() if key in names})
        if not isinstance(manifest.digest, str) or not isinstance(manifest.base_python, str):
            raise BrokenManifestError(f"{path} is malformed.")
        return replace(manifest, packages=tuple(manifest.packages), base_paths=tuple(manifest.base_paths))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenManifestError(f"{path} cannot be read: {error}") from None


def write_manifest(venv: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    write_atomically(venv / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, also after a crash, sees all of the new content or none of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
