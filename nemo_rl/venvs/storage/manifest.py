"""The manifest: the file that makes a venv sealed. It is written last, and holds no secrets."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from nemo_rl.errors import VenvError

FORMAT = 1
MANIFEST_FILE = "nemo_rl_venv.json"


@dataclass(frozen=True)
class Manifest:
    """What a sealed venv is and how it came to be.

    Attributes:
        digest: identity, 64 hexadecimal digits.
        spec: the canonical py_executable it was built for (the first; equal digests share a venv).
        packages: `name==version` or `name @ location` of everything that the venv itself holds.
        base_digest: of the venv that this one is laid over; None for a full venv.
        base_paths: site-packages of an interpreter that this one is laid over.
        python, implementation, platform: of the interpreter; `python` is the full version.
        base_python: path of the interpreter that the venv was made from.
        ray: version seen inside, None where there is no ray.
        uv: version of uv that built it.
        records: dist-info directory -> sha256 of its RECORD, for `verify`.
        num_files, num_bytes: of the venv's own files, as `du` would count unshared ones.
        seconds: per phase.
        job_id: the job that built it.
        built_at: ISO time; `started_at`: seconds since the epoch when the build began.
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
    log_path: str = ""
    format: int = FORMAT


class BrokenManifestError(VenvError):
    """A manifest that is missing or cannot be read."""


def read_manifest(venv: Path) -> Manifest:
    """The manifest of the venv directory `venv`. Raises `BrokenManifestError`."""
    path = venv / MANIFEST_FILE
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != FORMAT:
            raise BrokenManifestError(f"{path} has format {raw['format']!r}; this version reads {FORMAT}.")
        known = {item.name for item in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in raw.items() if key in known})
        if not isinstance(manifest.digest, str) or not isinstance(manifest.base_python, str):
            raise BrokenManifestError(f"{path} is malformed.")
        return replace(manifest, packages=tuple(manifest.packages), base_paths=tuple(manifest.base_paths))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenManifestError(f"{path} cannot be read: {error}") from None


def write_manifest(venv: Path, manifest: Manifest) -> None:
    """Write the manifest in one step: it is there whole, or not at all."""
    write_atomically(venv / MANIFEST_FILE, json.dumps(asdict(manifest), indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader, and no crash, ever sees a part of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
