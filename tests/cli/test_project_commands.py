"""Runs `nemo-rl init` and `nemo-rl add` with small local packages instead of an index."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "venvs"))
from sample_projects import make_wheel

from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.cli.project import TEMPLATE, _project_name
from nemo_rl.cli.project_file import PackageSource
from nemo_rl.errors import ConfigError
from nemo_rl.utils.config import load_config
from nemo_rl.venvs import stacks

REPOSITORY = Path(__file__).resolve().parents[2]
# A package of this name whose extras `vllm` and `mcore` exclude each other, and `vllm-cpu` needs the override.
NEMO_RL = """
[project]
name = "nemo-rl"
version = "0.2.0"
requires-python = ">=3.11"
[project.optional-dependencies]
vllm = ["alpha==1.0"]
mcore = ["alpha==2.0"]
vllm-cpu = ["alpha==1.0", "torch==2.13.0+cpu"]
wandb = []
"""
UNREACHABLE = {"UV_NO_INDEX": "0", "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}


@dataclass
class Cli:
    """Runs `nemo-rl` in a directory; uv takes packages only from a folder of wheels."""

    folder: Path
    package: Path

    def __call__(self, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("NEMO_RL_", "UV_"))}
        environment |= {"PYTHONPATH": str(REPOSITORY), "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(self.folder / "wheels")}
        return subprocess.run(
            [sys.executable, "-m", "nemo_rl.cli", *arguments],
            cwd=cwd or self.folder,
            env={**environment, **env},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def project(self, text: str, name: str = "mine") -> Path:
        """Write a project that depends on the package."""
        directory = self.folder / name
        directory.mkdir(parents=True)
        (directory / "pyproject.toml").write_text(text.replace("PACKAGE", str(self.package)))
        return directory


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    for name, version in (("alpha", "1.0"), ("alpha", "2.0"), ("torch", "2.13.0"), ("rapidfuzz", "3.14.5")):
        make_wheel(tmp_path / "wheels", name, version)
    for name in ("pytest", "jupyterlab"):
        make_wheel(tmp_path / "wheels", name, "9.0")
    package = tmp_path / "clone"
    package.mkdir()
    (package / "pyproject.toml").write_text(NEMO_RL)
    return Cli(tmp_path, package)


def settings_of(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text())["tool"]["uv"]


def test_table_of_extras_equals_the_pyproject() -> None:
    content = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    uv = content["tool"]["uv"]
    assert sorted(stacks.EXTRAS) == sorted(content["project"]["optional-dependencies"])
    assert [list(each) for each in stacks.CONFLICTS] == [[item["extra"] for item in each] for each in uv["conflicts"]]
    assert {text for each in stacks.OVERRIDES.values() for text in each} == set(uv["override-dependencies"])
    assert list(stacks.ENVIRONMENTS) == uv["environments"]
    template = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())
    assert template["project"]["requires-python"] == content["project"]["requires-python"]
    assert template["build-system"] == content["build-system"]


def test_init_writes_a_locked_project(cli: Cli) -> None:
    done = cli("init", "Word.Games", "--nemo-rl", "clone", "--json")
    assert done.returncode == 0, done.stderr
    project = cli.folder / "Word.Games"
    content = tomllib.loads((project / "pyproject.toml").read_text())
    assert content["project"]["name"] == json.loads(done.stdout)["name"] == "word-games"
    assert content["project"]["dependencies"] == ["nemo-rl"]
    assert content["project"]["optional-dependencies"].keys() == {"distance", "vllm", "vllm-cpu", "mcore"}
    assert settings_of(project)["sources"] == {"nemo-rl": {"path": str(cli.package), "editable": True}}
    assert settings_of(project)["conflicts"] == [[{"extra": "vllm"}, {"extra": "vllm-cpu"}, {"extra": "mcore"}]]
    assert settings_of(project)["override-dependencies"] == ["torch==2.13.0"]
    locked = tomllib.loads((project / "uv.lock").read_text())["package"]
    assert sorted(each["version"] for each in locked if each["name"] == "alpha") == ["1.0", "2.0"]
    written = [path for path in project.rglob("*") if path.is_file()]
    assert (project / "src" / "word_games" / "distance_worker.py") in written
    assert not [path for path in written if "my-project" in path.read_text() or "my_project" in path.read_text()]
    assert load_config(MasterConfig, project / "configs" / "grpo.yaml").policy.model_name == "embedded"
    # The registry names classes that exist.
    names: dict[str, Any] = {}
    exec((project / "src" / "word_games" / "__init__.py").read_text(), names)
    assert list(names["ACTOR_ENVIRONMENTS"]) == ["word_games.distance_worker.DistanceWorker"]


def test_init_in_the_working_directory_without_extras(cli: Cli) -> None:
    directory = cli.folder / "here"
    directory.mkdir()
    (directory / ".gitignore").write_text("*.log\n")  # such as in a new repository
    done = cli("init", "--no-extras", "--nemo-rl", str(cli.package), cwd=directory)
    assert done.returncode == 0, done.stderr
    assert "conflicts" not in settings_of(directory)
    again = cli("init", "--no-extras", "--nemo-rl", str(cli.package), cwd=directory)
    assert again.returncode == 2
    assert f"{directory} already has configs/grpo.yaml, " in again.stderr
    assert "nemo-rl add" in again.stderr
    assert (directory / ".gitignore").read_text() == "*.log\n"


@pytest.mark.parametrize("directory", ["file", "file/below"])
def test_init_refuses_a_file(cli: Cli, directory: str) -> None:
    (cli.folder / "file").touch()
    done = cli("init", directory, "--name", "mine", "--nemo-rl", "clone")
    assert done.returncode == 2
    assert f"{cli.folder}/file is a file, so no project can be written to {cli.folder}/{directory}" in done.stderr


def test_unreachable_index_leaves_the_project_to_lock_later(cli: Cli) -> None:
    done = cli("init", "mine", "--nemo-rl", "clone", **UNREACHABLE, UV_FIND_LINKS="")
    assert done.returncode == 1
    assert f"then run `uv lock` in {cli.folder}/mine" in done.stderr
    assert (cli.folder / "mine" / "run.py").exists()
    assert not (cli.folder / "mine" / "uv.lock").exists()


@pytest.mark.parametrize(("text", "name"), [("My_Project", "my-project"), ("a.b", "a-b"), ("x2", "x2")])
def test_names_are_normalised(text: str, name: str) -> None:
    assert _project_name(text) == name


@pytest.mark.parametrize("text", ["nemo_rl", "ray", "torch", "json", "rapidfuzz", "2fast", "a b", "größe", "", "class"])
def test_names_that_cannot_be_imported_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="choose one with --name"):
        _project_name(text)


PLAIN = """\
# The project of somebody else.
[project]
name = "mine"      # short
version = "1"
requires-python = ">=3.11"
dependencies = [
  # Needed.
  "nemo-rl",
]

[tool.uv.sources]
nemo-rl = {path = "PACKAGE"}

[tool.ruff]
line-length = 99
"""


def test_add_keeps_comments_and_formatting(cli: Cli) -> None:
    project = cli.project(PLAIN)
    before = (project / "pyproject.toml").read_text().splitlines()
    done = cli("add", "vllm", cwd=project)
    assert done.returncode == 0, done.stderr
    after = (project / "pyproject.toml").read_text().splitlines()
    rest = iter(after)
    assert all(line in rest for line in before), "every line is still there, in the same order"
    assert 'vllm = [\n    "nemo-rl[vllm]",\n]' in "\n".join(after)
    assert "conflicts" not in settings_of(project)
    done = cli("add", "mcore", "vllm-cpu", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["changes"]) == 4
    assert settings_of(project)["conflicts"] == [[{"extra": "vllm"}, {"extra": "vllm-cpu"}, {"extra": "mcore"}]]
    assert settings_of(project)["override-dependencies"] == ["torch==2.13.0"]
    locked = (project / "pyproject.toml").read_bytes(), (project / "uv.lock").read_bytes()
    again = cli("add", "VLLM_CPU", "mcore", cwd=project)
    assert "nothing to add" in again.stdout, again.stderr
    assert ((project / "pyproject.toml").read_bytes(), (project / "uv.lock").read_bytes()) == locked


def add_entry_points(wheel: Path, text: str) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/entry_points.txt", text)


@pytest.mark.slow  # resolves and builds
def test_env_add_gives_each_environment_an_extra_of_its_own(cli: Cli) -> None:
    make_wheel(cli.folder / "wheels", "old_games", "1.0", requires=("alpha==1.0",))
    registers = make_wheel(cli.folder / "wheels", "new_games", "1.0", requires=("alpha==2.0",))
    add_entry_points(registers, "[nemo_rl.environments]\nchess = new_games.module_0:Chess\n[other]\nno = x:y\n")
    project = cli.project(PLAIN)
    venvs = {"NEMO_RL_VENV_DIR": str(cli.folder / "venvs")}
    done = cli("add", "vllm", cwd=project)
    assert done.returncode == 0, done.stderr
    done = cli("env", "add", "old-games", cwd=project, **venvs)
    assert done.returncode == 0, done.stderr
    assert "old-games registers no environment. Write a class with reset and step that uses it" in done.stdout
    assert done.stdout.endswith(
        "env:\n  old-games:\n    class: my_package.my_module.MyEnvironment\n"
        "    py_executable: uv run --locked --extra env-old-games\n"
    )
    done = cli("env", "add", "new_games>=1", "--json", cwd=project, **venvs)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["env"] == {
        "chess": {"class": "new_games.module_0.Chess", "py_executable": "uv run --locked --extra env-new-games"}
    }
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert (extras["env-old-games"], extras["env-new-games"]) == (["old-games"], ["new-games>=1"])
    (conflict,) = settings_of(project)["conflicts"]
    assert {item["extra"] for item in conflict} == {"vllm", "env-old-games", "env-new-games"}
    again = cli("env", "add", "new_games>=1", "--json", cwd=project, **venvs)
    assert json.loads(again.stdout)["changes"] == []
    done = cli("add", "mcore", cwd=project)  # conflicts with the environments, too
    assert done.returncode == 0, done.stderr
    assert len(settings_of(project)["conflicts"][0]) == 4


def test_env_add_changes_nothing_if_the_packages_cannot_be_locked(cli: Cli) -> None:
    make_wheel(cli.folder / "wheels", "games", "1.0", requires=("alpha==1.0",))
    project = cli.project(PLAIN.replace('"nemo-rl",', '"nemo-rl", "alpha==2.0",'))
    before = (project / "pyproject.toml").read_bytes()
    done = cli("env", "add", "games", cwd=project)
    assert done.returncode == 1, done.stdout
    assert "If games excludes the project's own packages, list it in a script with inline metadata" in done.stderr
    assert (project / "pyproject.toml").read_bytes() == before
    assert not (project / "uv.lock").exists()
    done = cli("env", "add", "./games", cwd=project)
    assert done.returncode == 2
    assert "'./games' is not a requirement such as textarena>=0.7" in done.stderr


@pytest.mark.parametrize(
    ("conflicts", "expected"),
    [
        ('[[{extra = "vllm"}, {extra = "mcore"}]]', [{"vllm", "mcore"}]),
        ('[\n  # Why.\n  [{ extra = "one" }, { extra = "vllm" }],\n]', [{"one", "vllm"}, {"vllm", "mcore"}]),
        ('[[{extra = "vllm"}, {extra = "vllm-cpu"}]]', [{"vllm", "vllm-cpu", "mcore"}]),
        ('[[{package = "other", extra = "vllm"}, {extra = "mcore"}]]', [{"vllm", "mcore"}, {"vllm", "mcore"}]),
        ('[[{group = "g"}, {extra = "mcore"}]]', [{None, "mcore"}, {"vllm", "mcore"}]),
    ],
)
def test_conflicts_are_merged(conflicts: str, expected: list[set[str | None]], tmp_path: Path) -> None:
    from nemo_rl.cli.project_file import _declare_conflicts, _edited

    path = tmp_path / "pyproject.toml"
    path.write_text(f"[tool.uv]\nconflicts = {conflicts}\n")
    with _edited(path) as uv:
        _declare_conflicts(uv, {"vllm", "mcore", "one"}, "mine")
    assert [{item.get("extra") for item in each} for each in settings_of(tmp_path)["conflicts"]] == expected
    assert path.read_text().count("#") == conflicts.count("#")


def refused(cli: Cli, text: str, *extras: str) -> str:
    project = cli.project(text)
    before = (project / "pyproject.toml").read_text()
    done = cli("add", *extras, cwd=project)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (project / "pyproject.toml").read_text() == before
    assert not (project / "uv.lock").exists()
    return done.stderr


def test_add_refuses_what_contradicts_the_project(cli: Cli) -> None:
    text = PLAIN + '[tool.uv]\noverride-dependencies = ["torch==2.12.0"]\n'
    assert "has torch==2.12.0, but the extra vllm-cpu needs torch==2.13.0" in refused(cli, text, "mcore", "vllm-cpu")


def test_add_refuses_an_extra_of_the_project(cli: Cli) -> None:
    text = PLAIN.replace("[tool.uv.s", '[project.optional-dependencies]\nvllm = ["alpha"]\n[tool.uv.s')
    assert "has an extra 'vllm' of its own, ['alpha']" in refused(cli, text, "vllm")


def test_add_refuses_unknown_extras(cli: Cli) -> None:
    assert "nemo-rl has no extra 'vlm'; did you mean 'vllm'?" in refused(cli, PLAIN, "vlm")


def test_add_refuses_this_package_and_no_project(cli: Cli, tmp_path: Path) -> None:
    done = cli("add", "vllm", cwd=cli.package)
    assert done.returncode == 2
    assert "is nemo-rl itself" in done.stderr
    assert (cli.package / "pyproject.toml").read_text() == NEMO_RL
    done = cli("add", "vllm", cwd=tmp_path)  # the fallback is the source tree
    assert done.returncode == 2
    assert "is nemo-rl itself" in done.stderr


def test_add_restores_the_files_if_the_lock_fails(cli: Cli) -> None:
    project = cli.project(PLAIN.replace('"nemo-rl",', '"nemo-rl", "alpha==2.0",'))
    before = (project / "pyproject.toml").read_bytes()
    done = cli("add", "vllm", cwd=project)  # needs alpha==1.0
    assert done.returncode == 1, done.stdout
    assert "alpha==1.0" in done.stderr
    assert (project / "pyproject.toml").read_bytes() == before
    done = cli("add", "vllm", cwd=project, **UNREACHABLE, UV_FIND_LINKS="")
    assert done.returncode == 1
    assert "could not reach the package index" in done.stderr
    assert "then run the command again" in done.stderr
    assert (project / "pyproject.toml").read_bytes() == before
    assert not (project / "uv.lock").exists()


def test_add_writes_overrides_to_the_root_of_a_workspace(cli: Cli) -> None:
    root = cli.project('[tool.uv.workspace]\nmembers = ["member"]\n', "space")
    member = cli.project(PLAIN.replace('  "nemo-rl",\n', ""), "space/member")
    done = cli("add", "vllm-cpu", "mcore", "--nemo-rl", str(cli.package), cwd=member)
    assert done.returncode == 0, done.stderr
    assert settings_of(root)["override-dependencies"] == ["torch==2.13.0"]
    assert "override-dependencies" not in settings_of(member)
    assert tomllib.loads((member / "pyproject.toml").read_text())["project"]["dependencies"] == ["nemo-rl"]
    assert (root / "uv.lock").exists()
    done = cli("add", "vllm", cwd=root)
    assert done.returncode == 2
    assert "has no [project]; change to a member" in done.stderr


def test_path_inside_the_project_is_stored_relative_to_it(cli: Cli) -> None:
    project = cli.project('[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.11"\n')
    shutil.copytree(cli.package, project / "vendor" / "nemo_rl")
    done = cli("add", "mcore", "--nemo-rl", "vendor/nemo_rl", cwd=project)
    assert done.returncode == 0, done.stderr
    assert settings_of(project)["sources"]["nemo-rl"] == {"path": "vendor/nemo_rl", "editable": True}


def test_source_of_the_package_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clone").mkdir()
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        PackageSource.parse("clone")
    (tmp_path / "clone" / "pyproject.toml").touch()
    (tmp_path / "n.whl").touch()
    assert PackageSource.parse("clone") == PackageSource(f"{tmp_path}/clone", editable=True)
    assert PackageSource.parse("n.whl") == PackageSource(f"{tmp_path}/n.whl")
    assert PackageSource.parse("git+https://host/n").requirement == "nemo-rl @ git+https://host/n"
    for text in ("nemo-rl>=0.2", "nemo_rl==0.2.0", "nemo-rl @ https://host/n.whl"):
        assert PackageSource.parse(text).requirement == text
    for text in ("missing.whl", "missing/clone"):
        with pytest.raises(ConfigError, match="no such file"):
            PackageSource.parse(text)
    for text in ("ray>=2", "0.2.0"):
        with pytest.raises(ConfigError, match="expected the path"):
            PackageSource.parse(text)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (None, PackageSource("nemo-rl==7.0")),
        ({"url": "file://DIR/a%20b", "dir_info": {"editable": True}}, PackageSource("DIR/a b", editable=True)),
        ({"url": "file://DIR/a%20b", "dir_info": {}}, PackageSource("DIR/a b")),
        ({"url": "file://DIR/n.whl", "archive_info": {}}, PackageSource("DIR/n.whl")),
        ({"url": "https://host/n.whl", "archive_info": {}}, PackageSource("nemo-rl @ https://host/n.whl")),
        (
            {"url": "https://host/n", "vcs_info": {"vcs": "git", "commit_id": "abc"}, "subdirectory": "sub"},
            PackageSource("nemo-rl @ git+https://host/n@abc#subdirectory=sub"),
        ),
    ],
)
def test_source_of_an_installation_is_found(
    record: Any, expected: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "nemo_rl-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo-rl\nVersion: 7.0\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record).replace("DIR", str(tmp_path)))
    (tmp_path / "a b").mkdir()
    (tmp_path / "n.whl").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    requirement = expected.requirement.replace("DIR", str(tmp_path))
    assert PackageSource.installed() == PackageSource(requirement, expected.editable)


def test_installation_from_a_removed_wheel_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "nemo_rl-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo-rl\nVersion: 7.0\n")
    (info / "direct_url.json").write_text(json.dumps({"url": f"file://{tmp_path}/gone.whl", "archive_info": {}}))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="no longer exists; say where it is with --nemo-rl"):
        PackageSource.installed()
