"""Additive venvs over a base venv or interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, Project, make_wheel, run_in, uv

from nemo_rl import venvs
from nemo_rl.errors import RuntimeEnvError, VenvBuildError
from nemo_rl.venvs import InterpreterSpec, Store, parse_py_executable, spec_from_runtime_env
from nemo_rl.venvs.building.build import site_packages_of

SHOW = "import alpha, importlib.metadata as m; print(alpha.VERSION, m.version('alpha'))"


def test_overlay_overrides_the_base(project: Project) -> None:
    ready = venvs.ensure(project.command("--extra", "one", "--with", "alpha==2.0"), "A")

    assert run_in(ready.python, SHOW) == "2.0 2.0"
    assert run_in(ready.python, "import beta, gamma, sample; print(beta.VERSION, gamma.VERSION)") == "1.0 2.0"
    base = venvs.ensure(project.command("--extra", "one"), "Base")
    assert not base.built  # it was built first, and is shared
    assert run_in(base.python, SHOW) == "1.0 1.0"
    code = "import importlib.metadata as m; print([d.version for d in m.distributions() if d.name == 'alpha'][0])"
    assert run_in(ready.python, code) == "2.0"


def test_only_the_difference_is_installed(project: Project) -> None:
    # beta 2.0 needs gamma, which the base provides, so gamma is not installed again.
    ready = venvs.ensure(project.command("--extra", "one", "--with", "beta==2.0"), "A")
    assert ready.manifest is not None
    assert ready.manifest.packages == ("beta==2.0",)
    assert sorted(path.name for path in site_packages_of(ready.path).glob("*.dist-info")) == ["beta-2.0.dist-info"]


def test_version_of_the_base_is_preferred(project: Project) -> None:
    ready = venvs.ensure(project.command("--with", "alpha>=1.0"), "A")  # 2.0 is the newest version
    assert ready.manifest is not None
    assert ready.manifest.packages == ()
    assert run_in(ready.python, SHOW) == "1.0 1.0"


def test_transitive_package_is_replaced(project: Project) -> None:
    make_wheel(project.wheels, "needy", "1.0", requires=("alpha>=2",))
    ready = venvs.ensure(project.command("--with", "needy"), "A")
    assert run_in(ready.python, SHOW) == "2.0 2.0"


def test_constraints_of_base_packages_are_ignored(project: Project) -> None:
    make_wheel(project.wheels, "strict", "1.0", requires=("alpha==1.0",))
    text = (project.root / "pyproject.toml").read_text().replace('["alpha==1.0"]', '["strict"]')
    (project.root / "pyproject.toml").write_text(text)
    uv("lock", "--offline", cwd=project.root)
    ready = venvs.ensure(project.command("--with", "alpha==2.0"), "A")
    assert run_in(ready.python, SHOW + "; import strict") == "2.0 2.0"


def test_unpinned_requirement_does_not_drift(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(project.wheels, "moving", "1.0")
    first = venvs.ensure(project.command("--with", "moving"), "A")
    make_wheel(project.wheels, "moving", "2.0")
    monkeypatch.setenv("NEMO_RL_UV", "/nowhere/uv")  # a warm call runs no uv
    again = venvs.ensure(project.command("--with", "moving"), "A")
    assert (again.digest, again.built) == (first.digest, False)


def test_lists_with_equal_resolutions_share_a_venv(project: Project) -> None:
    first = venvs.ensure(project.command("--with", "epsilon"), "A")
    second = venvs.ensure(project.command("--with", "epsilon==1.0"), "B")
    assert second.path == first.path


def test_editable_packages_of_base_and_overlay(project: Project, tmp_path: Path) -> None:
    library = tmp_path / "alpha_fork"
    (library / "src" / "alpha").mkdir(parents=True)
    code = library / "src" / "alpha" / "__init__.py"
    code.write_text("VERSION = 'fork'\n")
    (library / "pyproject.toml").write_text('[project]\nname = "alpha"\nversion = "7"\n' + BUILD_SYSTEM)
    spec = parse_py_executable(project.command()).with_packages([f"-e {library}"])
    ready = venvs.ensure(spec, "A")
    assert run_in(ready.python, SHOW) == "fork 7"
    assert run_in(ready.python, "import sample; print(sample.CODE)") == "1"
    code.write_text("VERSION = 'edited'\n")
    assert not venvs.ensure(spec, "A").built
    assert run_in(ready.python, SHOW) == "edited 7"


def test_wheel_and_directory_by_path(project: Project, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "more", "zeta", "1.0")
    library = tmp_path / "copied"
    (library / "src" / "copied").mkdir(parents=True)
    (library / "src" / "copied" / "__init__.py").write_text("CODE = 1\n")
    (library / "pyproject.toml").write_text('[project]\nname = "copied"\nversion = "1"\n' + BUILD_SYSTEM)
    spec = parse_py_executable(project.command()).with_packages([str(wheel), str(library)])
    first = venvs.ensure(spec, "A")
    assert run_in(first.python, "import zeta, copied; print(zeta.VERSION, copied.CODE)") == "1.0 1"
    (library / "src" / "copied" / "__init__.py").write_text("CODE = 2\n")
    make_wheel(tmp_path / "more", "zeta", "1.0", num_modules=3)
    second = venvs.ensure(spec, "A")
    assert run_in(second.python, "import zeta.module_2, copied; print(copied.CODE)") == "2"
    assert second.digest != first.digest


def test_overlay_over_an_interpreter(project: Project, tmp_path: Path) -> None:
    find_links = f"--find-links {project.wheels}"
    spec = spec_from_runtime_env({"pip": ["epsilon", "packaging==0.1", find_links, "--no-index"]}, sys.executable)
    make_wheel(project.wheels, "packaging", "0.1")
    ready = venvs.ensure(spec, "A")
    code = (
        "import epsilon, packaging, pytest, importlib.metadata as m; print(packaging.VERSION, m.version('packaging'))"
    )
    assert run_in(ready.python, code) == "0.1 0.1"
    assert run_in(sys.executable, "import packaging; print(hasattr(packaging, 'VERSION'))") == "False"
    assert isinstance(spec, InterpreterSpec)
    assert not venvs.ensure(spec, "B").built


def test_overlay_from_a_runtime_env(project: Project, tmp_path: Path) -> None:
    listed = tmp_path / "requirements.txt"
    listed.write_text("epsilon==1.0\n")
    command = project.command()
    paths = {
        venvs.ensure(spec_from_runtime_env(runtime_env, command), f"W{index}").path
        for index, runtime_env in enumerate(
            [{"pip": ["epsilon==1.0"]}, {"uv": {"packages": ["epsilon==1.0"]}}, {"pip": str(listed)}]
        )
    }
    assert len(paths) == 1


def test_console_scripts_of_the_base_use_the_overlay(project: Project) -> None:
    text = (project.root / "pyproject.toml").read_text()
    (project.root / "pyproject.toml").write_text(text + '[project.scripts]\nshow-alpha = "sample:show"\n')
    package = project.root / "src" / "sample" / "__init__.py"
    package.write_text("def show():\n    import alpha\n    print(alpha.VERSION)\n")
    for options, version in (((), "1.0"), (("--with", "alpha==2.0"), "2.0")):
        python = venvs.create_local_venv(project.command(*options), "A")
        script = Path(python).with_name("show-alpha")
        assert subprocess.run([script], capture_output=True, text=True, check=True).stdout == f"{version}\n"


def test_additive_venv_survives_a_rebuild_of_its_base(project: Project) -> None:
    ready = venvs.ensure(project.command("--with", "epsilon"), "A")
    venvs.ensure(project.command(), "Base", force_rebuild=True)
    assert not venvs.ensure(project.command("--with", "epsilon"), "A").built
    assert run_in(ready.python, "import alpha, epsilon; print(alpha.VERSION)") == "1.0"


def test_impossible_and_malformed_requirements(project: Project, store: Store) -> None:
    with pytest.raises(VenvBuildError, match=r"epsilon==9\.9"):
        venvs.ensure(project.command("--with", "epsilon==9.9"), "A")
    with pytest.raises(RuntimeEnvError, match="not a requirement"):
        parse_py_executable(project.command()).with_packages(["a b c"])
    assert not os.path.lexists(store.root / "A")
