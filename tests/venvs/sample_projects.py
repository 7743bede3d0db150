"""Small uv projects of local packages, with a folder of wheels instead of an index. No network."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rl.venvs.uv import find_uv

BUILD_SYSTEM = '[build-system]\nrequires = ["uv_build>=0.9,<0.15"]\nbuild-backend = "uv_build"\n'


def make_wheel(folder: Path, name: str, version: str, *, requires: tuple[str, ...] = (), num_modules: int = 1) -> Path:
    """Write a wheel with one package, whose `VERSION` is the version of the wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files |= {f"{name}/module_{i}.py": f"def value():\n    return {i}\n" * 20 for i in range(num_modules)}
    record = []
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            entry = zipfile.ZipInfo(file)  # without the time, so that equal wheels have equal hashes
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record.append(f"{file},sha256={digest},{len(text.encode())}")
        record.append(f"{info}/RECORD,,")
        archive.writestr(f"{info}/RECORD", "\n".join(record) + "\n")
    return path


def uv(*arguments: str, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "VIRTUAL_ENV"))}
    command = [find_uv(), *arguments, "--python", sys.executable, "--quiet"]
    subprocess.run(command, cwd=cwd, check=True, env=environment)


@dataclass
class Project:
    """A locked project of `alpha`; extra `one` adds `beta`, which needs `gamma`; extra `two` adds `delta`."""

    root: Path
    wheels: Path

    def write(self, *, alpha: str = "1.0", beta: str = "1.0", delta: str = "1.0", extra_text: str = "") -> None:
        (self.root / "pyproject.toml").write_text(
            textwrap.dedent(f"""
                [project]
                name = "sample"
                version = "0.1"
                requires-python = ">=3.11"
                dependencies = ["alpha=={alpha}"]
                [project.optional-dependencies]
                one = ["beta=={beta}"]
                two = ["delta=={delta}"]
                [dependency-groups]
                checks = ["epsilon"]
                [tool.uv]
                default-groups = []
                no-index = true
                find-links = ["{self.wheels}"]
            """)
            + BUILD_SYSTEM
            + extra_text
        )

    def lock(self, **versions: str) -> None:
        self.write(**versions)
        uv("lock", "--offline", cwd=self.root)

    def command(self, *options: str) -> str:
        return " ".join(["uv run --locked --project", str(self.root), *options])


def lock_project_without_ray(directory: Path) -> Path:
    """Write and lock a project in `directory` that needs only `alpha`, of the wheels beside it; returns it."""
    make_wheel(directory / "wheels", "alpha", "1.0")
    project = directory / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        textwrap.dedent("""
            [project]
            name = "project"
            version = "0.1"
            requires-python = ">=3.11"
            dependencies = ["alpha"]
            [tool.uv]
            package = false
            no-index = true
            find-links = ["../wheels"]
        """)
    )
    uv("lock", "--offline", cwd=project)
    return project


def write_files(root: Path, files: Mapping[str, str | None], **values: str) -> None:
    """Write texts by relative path, with `{name}` replaced by its value; None removes the file."""
    for path, text in files.items():
        file = root / path
        if text is None:
            file.unlink()
            continue
        for name, value in values.items():
            text = text.replace(f"{{{name}}}", value)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def run_in(python: str, code: str, **environment: str) -> str:
    """Run `code` with the interpreter `python` and return its output."""
    process = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def copy_project(project: Project, target: Path) -> Project:
    shutil.copytree(project.root, target)
    return Project(target, project.wheels)
