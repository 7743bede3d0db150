"""Verification of venvs with the standard library alone: what counts as damage and what does not."""

from __future__ import annotations

import ast
import base64
import compileall
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, make_wheel, uv

from nemo_rl import venvs
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.storage import verify as verify_module
from nemo_rl.venvs.storage.verify import Damage, damaged_files, records_of, verify_venv
from nemo_rl.venvs.uv import run_uv

SCRIPT = Path(verify_module.__file__)
METADATA = b"Metadata-Version: 2.1\n"


def row(name: str, content: bytes, algorithm: str = "sha256", size: int | None = None) -> str:
    digest = base64.urlsafe_b64encode(hashlib.new(algorithm, content).digest()).rstrip(b"=").decode()
    quoted = f'"{name}"' if "," in name else name
    return f"{quoted},{algorithm}={digest},{len(content) if size is None else size}"


def install(site_packages: Path, package: str, rows: list[str]) -> None:
    info = site_packages / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_bytes(METADATA)
    rows = [*rows, row(f"{info.name}/METADATA", METADATA), f"{info.name}/RECORD,,"]
    (info / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")


def problems(site_packages: Path) -> tuple[list[str], list[str]]:
    """Return the problems by size and by hash."""
    records = records_of(str(site_packages))
    by_size, by_hash = ([*damaged_files(records, compare_hashes=hashes)] for hashes in (False, True))
    return [damage.problem for damage in by_size], [damage.problem for damage in by_hash]


@pytest.mark.parametrize(
    ("actual", "by_size", "by_hash"),
    [
        (b"content", [], []),
        (b"CONTENT", [], ["altered: its content differs from the installed file"]),
        (b"", ["altered: 0 bytes instead of 7"], ["altered: 0 bytes instead of 7"]),
        (b"content and more", ["altered: 16 bytes instead of 7"], ["altered: 16 bytes instead of 7"]),
        (None, ["missing"], ["missing"]),
    ],
)
@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("name", ["a.py", "a b,c.py", "ünï\u2028code.py", "../../../bin/tool", "a-1.0.dist-info/WHEEL"])
def test_file_is_compared_with_its_record(
    tmp_path: Path, name: str, algorithm: str, actual: bytes | None, by_size: list[str], by_hash: list[str]
) -> None:
    site_packages = tmp_path / "lib" / "python3.11" / "site-packages"
    install(site_packages, "a", [row(name, b"content", algorithm)])
    if actual is not None:
        path = site_packages / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(actual)
    assert problems(site_packages) == (by_size, by_hash)


def test_unusual_records_are_no_damage(tmp_path: Path) -> None:
    for name, content in (
        ("wrong_size.py", b"abc"),
        ("no_hash.py", b"abc"),
        ("unknown.py", b"abc"),
        ("shared.py", b"b"),
    ):
        (tmp_path / name).write_bytes(content)
    install(
        tmp_path,
        "a",
        [
            row("wrong_size.py", b"abc", size=1),  # published with a wrong size
            "no_hash.py,,3",
            "unknown.py,blake9=AAAA,",
            "unreadable.py,,many",
            row("__pycache__/a.cpython-311.pyc", b"bytecode of another Python"),
            row("shared.py", b"version of a"),  # b was installed later
            "",
        ],
    )
    install(tmp_path, "b", [row("shared.py", b"b")])
    assert problems(tmp_path) == ([], [])
    (tmp_path / "shared.py").write_bytes(b"neither")
    assert problems(tmp_path)[1] == ["altered: 7 bytes instead of 1"]


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"\xff\xfe", b'"never closed', b"a.py,,7\n"])
def test_damaged_record_is_reported(tmp_path: Path, content: bytes) -> None:
    install(tmp_path, "a", [row("a.py", b"content")])
    (tmp_path / "a-1.0.dist-info" / "RECORD").write_bytes(content)
    (tmp_path / "a.py").write_bytes(b"content")
    by_size, by_hash = problems(tmp_path)
    assert len(by_size) == len(by_hash) == 1


def run_script(*arguments: object, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run the script without any package: `-I -S` leaves only the standard library."""
    command = [python, "-I", "-S", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_checks_sealed_venvs_without_any_package(project: Project, tmp_path: Path) -> None:
    one = venvs.ensure(project.command("--extra", "one"), "A")
    venvs.ensure(project.command("--with", "epsilon"), "B")
    store = one.stable_path.parent.parent
    done = run_script(store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("no damaged files") == 3
    path = site_packages_of(one.path) / "beta" / "__init__.py"
    path.unlink()
    path.write_text("VERSION = '6.6'\n")
    for target in (store, store / "A", one.path):
        done = run_script(target)
        assert done.returncode == 1
        assert "beta/__init__.py: altered: its content differs from the installed file (beta)" in done.stdout
        assert "`uv cache clean beta`, then `nemo-rl venvs build --force " in done.stdout
    assert run_script(tmp_path).returncode == 2
    assert [damage.path for damage in verify_venv(str(one.path))] == [str(path)]


def test_fresh_venv_of_uv_has_no_damage(project: Project) -> None:
    pyproject = project.root / "pyproject.toml"
    scripts = '[project.scripts]\nsample = "sample:main"\n'
    pyproject.write_text(pyproject.read_text().replace(BUILD_SYSTEM, scripts + BUILD_SYSTEM))
    uv("sync", "--offline", "--extra", "one", cwd=project.root)
    venv = project.root / ".venv"
    (info,) = venv.glob("lib/python*/site-packages/sample-*.dist-info")
    assert {"direct_url.json", "INSTALLER", "REQUESTED"} <= {path.name for path in info.iterdir()}
    assert (venv / "bin" / "sample").is_file()
    compileall.compile_dir(str(info.parent), quiet=1)
    done = run_script(venv)
    assert (done.returncode, done.stdout) == (0, f"{venv}: no damaged files\n")
    script = venv / "bin" / "sample"
    script.write_text(script.read_text() + "# altered\n")
    done = run_script(venv)
    assert "bin/sample: altered" in done.stdout
    assert "`uv cache clean sample`, then `uv sync --reinstall-package sample`." in done.stdout


def test_files_that_uv_changes_or_moves_are_no_damage(project: Project) -> None:
    """uv writes this venv's Python into the scripts of a wheel, and spreads its data over the venv."""
    wheel = make_wheel(project.wheels, "zeta", "1.0")
    files = {
        "zeta-1.0.data/scripts/zeta-run": b"#!python\nprint('zeta')\n",
        "zeta-1.0.data/scripts/zeta.sh": b"#!/bin/sh\necho zeta\n",
        "zeta-1.0.data/data/share/zeta/a, b.txt": b"data\n",
        "zeta-1.0.data/purelib/zeta_more.py": b"MORE = 1\n",
        "zeta/__pycache__/__init__.cpython-311.pyc": b"bytecode of another build",
        "zeta/unlisted.txt": b"",
    }
    with zipfile.ZipFile(wheel) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    record = old.pop("zeta-1.0.dist-info/RECORD")
    rows = [row(name, content) for name, content in files.items() if "unlisted" not in name]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {
            **old,
            **files,
            "zeta-1.0.dist-info/RECORD": "\n".join(rows).encode() + b"\n" + record,
        }.items():
            archive.writestr(name, content)
    ready = venvs.ensure(project.command("--with", "zeta"), "A")
    done = subprocess.run([ready.path / "bin" / "zeta-run"], capture_output=True, text=True, check=True)
    assert done.stdout == "zeta\n"
    assert (ready.path / "share" / "zeta" / "a, b.txt").is_file()
    assert list(verify_venv(str(ready.path))) == []
    (ready.path / "share" / "zeta" / "a, b.txt").unlink()
    assert [damage.problem for damage in verify_venv(str(ready.path))] == ["missing"]


def test_package_that_was_added_later_is_reported(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    source = ["--no-index", "--find-links", str(project.wheels)]
    # Not by its name: uv keeps what it knows of an interpreter by path, and an earlier session of pytest may have had a
    # venv of this name in another directory.
    python = str(ready.path / "bin" / "python")
    run_uv(["pip", "install", "--offline", *source, "--python", python, "delta"], what="Installing delta")
    (damage,) = verify_venv(str(ready.path))
    assert (damage.package, damage.problem.partition(":")[0]) == ("delta", "added")


def test_broken_interpreter_manifest_and_library(project: Project) -> None:
    ready = venvs.ensure(project.command(), "A")
    (ready.path / "bin" / "python").unlink()
    (ready.path / "bin" / "python").symlink_to("/nowhere/python")
    (damage,) = verify_venv(str(ready.path))
    assert damage.problem == "cannot start: its base interpreter is /nowhere/python"
    (ready.path / "nemo_rl_venv.json").write_bytes(bytes(100))
    assert [damage.problem.partition(":")[0] for damage in verify_venv(str(ready.path))] == [
        "cannot start",
        "cannot be read",
    ]
    shutil.rmtree(ready.path / "lib")
    assert isinstance(list(verify_venv(str(ready.path)))[-1], Damage)


def test_script_needs_only_the_standard_library_of_python_3_8() -> None:
    """Any Python may be the one that still works."""
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
    nodes = list(ast.walk(tree))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
