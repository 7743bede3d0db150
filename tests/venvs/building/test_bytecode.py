"""Bytecode of sealed venvs: complete, valid for its source, and not compiled twice."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import shutil
import sys
from pathlib import Path

import pytest
from sample_projects import Project, run_in

from nemo_rl import venvs
from nemo_rl.venvs.building.build import site_packages_of
from nemo_rl.venvs.building.bytecode import add_bytecode

PYTHON = Path(sys.executable)


def make_package(root: Path, value: int = 1) -> Path:
    package = root / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "module.py").write_text(f"VALUE = {value}\n")
    (package / "broken.py").write_text("def (:\n")
    return root


def cached(source: Path) -> Path:
    return Path(importlib.util.cache_from_source(str(source)))


def test_sealed_venv_has_bytecode_of_every_source(project: Project) -> None:
    ready = venvs.ensure(project.command("--extra", "one"), "A")
    sources = list(site_packages_of(ready.path).rglob("*.py"))
    assert len(sources) > 5
    assert all(cached(path).exists() for path in sources)
    code = "import sys, beta; sys.dont_write_bytecode = True; print(beta.__cached__)"
    before = {path: path.stat().st_mtime_ns for path in map(cached, sources)}
    run_in(ready.python, code)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # Python did not rewrite it


def test_compilation_can_be_disabled(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_RL_COMPILE_BYTECODE", "0")
    (project.root / "pyproject.toml").write_text(
        (project.root / "pyproject.toml").read_text().replace("[tool.uv]", "[tool.uv]\ncompile-bytecode = true")
    )
    ready = venvs.ensure(project.command(), "A")
    assert list(site_packages_of(ready.path).rglob("*.pyc")) == []


def test_second_venv_reuses_bytecode_of_the_first(project: Project) -> None:
    first = venvs.ensure(project.command(), "A")
    second = venvs.ensure(project.command("--extra", "one"), "B")
    one, two = (cached(site_packages_of(venv.path) / "alpha" / "module_0.py") for venv in (first, second))
    assert one.samefile(two)  # neither compiled nor copied
    venvs.prune(keep_names=["B"])
    assert run_in(second.python, "import alpha.module_0 as m; print(m.value.__code__.co_filename)").startswith(
        str(second.path)
    )


def test_bytecode_is_reused_for_equal_content_with_another_time(tmp_path: Path) -> None:
    donor = make_package(tmp_path / "donor")
    py_compile.compile(str(donor / "package" / "module.py"))
    target = make_package(tmp_path / "target")
    os.utime(target / "package" / "module.py", (1_000_000_000, 1_000_000_000))

    report = add_bytecode(target, PYTHON, [tmp_path / "nowhere", donor])
    assert report.reused == 1
    assert report.compiled == 2
    bytecode = cached(target / "package" / "module.py")
    before = bytecode.read_bytes()
    assert before[16:] == cached(donor / "package" / "module.py").read_bytes()[16:]
    shutil.rmtree(donor)
    assert run_in(sys.executable, f"import sys; sys.path.insert(0, {str(target)!r}); import package.module") == ""
    assert bytecode.read_bytes() == before  # Python accepted it for this source


@pytest.mark.parametrize("flaw", ["other_source", "stale", "other_magic", "cut", "hash_based"])
def test_invalid_bytecode_is_not_reused(flaw: str, tmp_path: Path) -> None:
    donor, target = make_package(tmp_path / "donor", 1), make_package(tmp_path / "target", 1)
    source = donor / "package" / "module.py"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH if flaw == "hash_based" else None
    py_compile.compile(str(source), invalidation_mode=mode)
    bytecode = cached(source)
    if flaw == "other_source":
        (target / "package" / "module.py").write_text("VALUE = 2\n")  # the same length as the donor's
    elif flaw == "stale":
        os.utime(source, (1, 1))
    elif flaw == "other_magic":
        bytecode.write_bytes(b"\0\0\r\n" + bytecode.read_bytes()[4:])
    elif flaw == "cut":
        bytecode.write_bytes(bytecode.read_bytes()[:10])
    assert add_bytecode(target, PYTHON, [donor]).reused == 0
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import package.module as m; print(m.VALUE)"
    assert run_in(sys.executable, code) == ("2" if flaw == "other_source" else "1")
    assert cached(target / "package" / "module.py").exists()


def test_source_that_does_not_compile_is_skipped(tmp_path: Path) -> None:
    target = make_package(tmp_path / "target")
    add_bytecode(target, PYTHON, [])
    assert cached(target / "package" / "module.py").exists()
    assert not cached(target / "package" / "broken.py").exists()
