"""Our venv of a project holds what `uv sync` installs in a fresh environment, before and after each kind of change."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, write_files

from nemo_rl import venvs
from nemo_rl.errors import VenvError
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.uv import find_uv, uv_environment

# A build back end without requirements: VERSION and extras.txt decide the metadata.
BACKEND = """
import base64, hashlib, pathlib, zipfile

def _build(directory, files, summary):
    version = pathlib.Path("VERSION").read_text().strip()
    extras = pathlib.Path("extras.txt").read_text().split()
    info = f"built-{version}.dist-info"
    metadata = f"Metadata-Version: 2.3\\nName: built\\nVersion: {version}\\nSummary: {summary}\\n"
    for line in extras:
        extra, _, requirement = line.partition(":")
        metadata += f"Provides-Extra: {extra}\\nRequires-Dist: {requirement}; extra == '{extra}'\\n"
    files = {
        **files,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    name = f"built-{version}-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(directory) / name, "w") as archive:
        rows = []
        for path, text in files.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={digest},{len(text.encode())}")
        archive.writestr(f"{info}/RECORD", "\\n".join([*rows, f"{info}/RECORD,,"]) + "\\n")
    return name

def build_wheel(directory, config_settings=None, metadata_directory=None):
    return _build(directory, {"built.py": pathlib.Path("built.py").read_text()}, config_settings)

def build_editable(directory, config_settings=None, metadata_directory=None):
    return _build(directory, {"built.pth": str(pathlib.Path.cwd())}, config_settings)
"""
BUILT = """
[project]
name = "built"
requires-python = ">=3.11"
dynamic = ["version", "optional-dependencies"]
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def pyproject(name: str, *dependencies: str, extra_text: str = "") -> str:
    listed = json.dumps(list(dependencies))
    head = f'[project]\nname = "{name}"\nversion = "0.1"\nrequires-python = ">=3.11"\ndependencies = {listed}\n'
    return head + extra_text + BUILD_SYSTEM


def member(name: str, *dependencies: str, extra_text: str = "", at: str | None = None) -> dict[str, str]:
    directory = name if at is None else at
    return {
        f"{directory}/pyproject.toml": pyproject(name, *dependencies, extra_text=extra_text),
        f"{directory}/src/{name}/__init__.py": "CODE = 1\n",
    }


@dataclass(frozen=True)
class Layout:
    """Describes a project, the options to install it with, and changes of it.

    Attributes:
        files: text by path; `{wheels}` stands for the folder of wheels.
        options: what follows `uv run --locked --project .`, or `uv run --locked` if it names a project.
        changes: files to write after each other; None removes a file.
        locks: directories in which `uv lock` runs at first and after each change.
        stale_locks: directories that get a copy of the first lock, as a member that was once a project of its own.
    """

    files: Mapping[str, str | None]
    options: tuple[str, ...] = ("",)
    changes: tuple[Mapping[str, str | None], ...] = ()
    locks: tuple[str, ...] = (".",)
    stale_locks: tuple[str, ...] = ()


WORKSPACE = '[tool.uv.workspace]\nmembers = ["packages/*"]\nexclude = ["packages/out*"]\n'
INDEX = '[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'
EXTRAS = '[project.optional-dependencies]\nx = ["delta==1.0"]\n'
SUBPACKAGES = ("dist", "build", "venv", "venvs", "tox", "node_modules")
COPIED = '[tool.uv.sources]\ncopied = { path = "../copied" }\n'
FROM_ONE = "[tool.uv.sources]\none = { workspace = true }\n"

LAYOUTS = {
    "project": Layout(
        {
            **member(
                "single",
                "alpha==1.0",
                "epsilon; sys_platform == 'win32'",
                extra_text=EXTRAS
                + '[dependency-groups]\ndev = ["beta==1.0"]\nall = ["epsilon", {include-group="dev"}]\n',
                at=".",
            ),
            "uv.toml": 'no-index = true\nfind-links = ["{wheels}"]\n',
        },
        ("", "--project src/single --extra x", "--no-default-groups --all-extras", "--group all"),
        (
            {"src/single/__init__.py": "CODE = 2\n"},
            {
                "./pyproject.toml": pyproject(
                    "single", "alpha==2.0", extra_text='[project.scripts]\nrun = "single:run"\n'
                )
            },
        ),
    ),
    "virtual root, members, and a member that is excluded": Layout(
        {
            "pyproject.toml": WORKSPACE + INDEX,
            **member("one", "alpha==1.0", extra_text=EXTRAS, at="packages/one"),
            **member("two", "one", "gamma", extra_text=FROM_ONE, at="packages/two"),
            **member("out", "alpha==2.0", extra_text=INDEX, at="packages/out"),
        },
        (
            "",
            "--project packages/one",
            "--project packages/one/src",
            "--project packages/two",
            "--project packages/out",
            "--project packages/one --package two",
            "--package one --extra x",
            "--all-packages --all-extras",
        ),
        (
            {"packages/one/pyproject.toml": pyproject("one", "alpha==2.0", extra_text=EXTRAS.replace("1.0", "2.0"))},
            {"pyproject.toml": WORKSPACE.replace("out*", "no*") + INDEX},
            {"pyproject.toml": WORKSPACE.replace("out*", "two") + INDEX},
        ),
        (".", "packages/out"),
        ("packages/one",),
    ),
    "root project with a copied member": Layout(
        {
            **member("top", "one", extra_text=WORKSPACE + FROM_ONE.replace("true", "true, editable = false"), at="."),
            **member("one", "alpha==1.0", at="packages/one"),
            "uv.toml": 'no-index = true\nfind-links = ["{wheels}"]\n',
        },
        ("", "--package one", "--all-packages"),
        ({"packages/one/src/one/__init__.py": "CODE = 2\n"}, {"packages/one/src/one/more/__init__.py": ""}),
    ),
    "copied path dependency": Layout(
        {
            **member("top", "copied", extra_text=COPIED + INDEX),
            **member("copied", "alpha==1.0"),
            **{f"copied/src/copied/{name}/__init__.py": "" for name in SUBPACKAGES},
        },
        ("--project top",),
        (
            *({f"copied/src/copied/{name}/__init__.py": "CODE = 2\n"} for name in SUBPACKAGES),
            {"copied/src/copied/data.bin": "1"},
            {"copied/src/copied/data.bin": None},
        ),
        ("top",),
    ),
    "path sources of members and of the workspace": Layout(
        {
            "ws/pyproject.toml": WORKSPACE
            + INDEX
            + '[tool.uv.sources]\nlinked = { path = "../linked", editable = true }\n',
            **member("one", "linked", "copied", extra_text=COPIED.replace("..", "../../.."), at="ws/packages/one"),
            **member("two", "linked", at="ws/packages/two"),
            **member("linked", "alpha"),
            **member("copied", "gamma<2"),
        },
        ("--project ws", "--project ws/packages/one", "--project ws --package two"),
        (
            {"linked/src/linked/__init__.py": "CODE = 2\n", "copied/src/copied/__init__.py": "CODE = 2\n"},
            member("linked", "alpha==1.0"),
            member("copied", "gamma==2.0", extra_text='[project.scripts]\nrun = "copied:run"\n'),
        ),
        ("ws",),
    ),
    "members that conflict": Layout(
        {
            "pyproject.toml": WORKSPACE + INDEX + 'conflicts = [[{ package = "one" }, { package = "two" }]]\n',
            **member("one", "alpha==1.0", at="packages/one"),
            **member("two", "alpha==2.0", at="packages/two"),
        },
        ("--project packages/one", "--package two"),
        ({"packages/two/pyproject.toml": pyproject("two", "alpha==2.0", "gamma==1.0")},),
    ),
    "dynamic extras and a dynamic version": Layout(
        {
            "pyproject.toml": BUILT + INDEX + 'cache-keys = ["pyproject.toml", { file = "*.{txt,in}" }, "VERSION"]\n',
            "backend.py": BACKEND,
            "built.py": "",
            "VERSION": "1.0",
            "extras.txt": "fast:alpha==1.0",
        },
        ("--extra fast", "--all-extras"),
        (
            {"extras.txt": "fast:alpha==2.0 slow:gamma==1.0"},
            {"VERSION": "2.0"},
            {"uv.toml": 'no-index = true\nfind-links = ["{wheels}"]\nconfig-settings = { setting = "1" }\n'},
        ),
    ),
    "project that is not a package, and a wheel by path": Layout(
        {
            "pyproject.toml": '[project]\nname = "loose"\nversion = "0"\nrequires-python = ">=3.11"\n'
            'dependencies = ["alpha", "delta"]\n'
            '[tool.uv.sources]\ndelta = { path = "{wheels}/delta-1.0-py3-none-any.whl" }\n' + INDEX,
        },
        changes=({"unrelated.txt": ""},),
    ),
}


@dataclass
class Case:
    root: Path
    wheels: Path

    def lock(self, directories: Sequence[str]) -> None:
        for directory in directories:
            if (self.root / directory / "pyproject.toml").exists():
                self.uv("lock", "--directory", directory)

    def uv(self, *arguments: str, **variables: str) -> None:
        command = [find_uv(), *arguments, "--quiet", "--no-cache", "--python", sys.executable]
        subprocess.run(
            command, cwd=self.root, env=uv_environment(variables), check=True, capture_output=True, text=True
        )

    def synced(self, options: str, environment: Path) -> dict[str, object] | None:
        """Return what `uv sync` installs; None if uv refuses."""
        try:
            self.uv("sync", "--locked", *shlex.split(options), UV_PROJECT_ENVIRONMENT=str(environment))
        except subprocess.CalledProcessError:
            return None
        return installed(environment)

    def ours(self, options: str) -> dict[str, object] | None:
        try:
            return installed(venvs.ensure(f"uv run --locked {options}", "worker").path)
        except VenvError:
            return None


def installed(venv: Path) -> dict[str, object]:
    """Return name and version -> where each distribution comes from, and its files with hashes."""
    site_packages = site_packages_of(venv)
    content: dict[str, object] = {}
    for info in site_packages.glob("*.dist-info"):
        rows = csv.reader((info / "RECORD").read_text().splitlines())
        # Scripts name the venv, and uv notes in the metadata when it built a package.
        files = {row[0]: row[1] for row in rows if not row[0].startswith(("..", info.name)) and row[1]}
        origin = json.loads((info / "direct_url.json").read_text()) if (info / "direct_url.json").exists() else None
        metadata = (info / "METADATA").read_text()
        scripts = (info / "entry_points.txt").read_text() if (info / "entry_points.txt").exists() else ""
        content[info.name] = (origin, metadata, scripts, files)
    return content


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_our_venv_equals_uv_sync(
    layout: Layout, tmp_path: Path, project_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_RL_COMPILE_BYTECODE", "0")
    case = Case(tmp_path / "sample", project_template)
    states: dict[str, set[str]] = {options: set() for options in layout.options}
    for step, files in enumerate((layout.files, *layout.changes)):
        write_files(case.root, files, wheels=str(case.wheels))
        monkeypatch.chdir(case.root)
        case.lock(layout.locks)
        for directory in layout.stale_locks if step == 0 else ():
            shutil.copy(case.root / "uv.lock", case.root / directory)
        for given in layout.options:
            options = given if "--project" in given else f"--project . {given}"
            expected = case.synced(options, tmp_path / "fresh" / f"{step}{options.replace('/', '-')}")
            assert case.ours(options) == expected, f"{options} after change {step}"
            states[given].add(json.dumps(expected))
    assert all(state - {"null"} for state in states.values()), "uv refuses"
    assert any(len(state) > 1 for state in states.values()) or "unrelated.txt" in layout.changes[0], "nothing changes"
