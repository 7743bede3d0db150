"""Requirements files, compared with uv's own reading of them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sample_projects import BUILD_SYSTEM, make_wheel, uv, write_files

from nemo_rl import venvs
from nemo_rl.errors import InvalidPyExecutableError, RuntimeEnvError, VenvError
from nemo_rl.venvs import Store, parse_py_executable, plan
from nemo_rl.venvs.planning.requirements import read_requirements_file
from nemo_rl.venvs.uv import find_uv, uv_environment

ALPHA = "alpha-1.0-py3-none-any.whl"
# Files by path; `list.txt` is read. All wheels are in `wheels`, and gamma in `more/wheels`.
FILES = {
    "comments": {"list.txt": "# all\n\n  alpha==1.0   # why\n#beta\n"},
    "a continued comment": {"list.txt": "# c \\\nbeta\nalpha # c \\\ndelta\n"},
    "a continued line before a comment": {"list.txt": "alpha \\\n# c\nbeta\n"},
    "continued hashes": {"list.txt": "alpha==1.0 \\\n    --hash=sha256:{hash} \\\n    --hash=sha256:{other}\nbeta"},
    "line ends of Windows and a byte order mark": {"list.txt": "\ufeffalpha==1.0\r\nbeta==1.0\r\n"},
    "nested files": {
        "list.txt": "-r more/one.txt\nalpha\n",
        "more/one.txt": "--requirement=../two.txt # c\nbeta==1.0\n",
        "two.txt": 'delta<2\n-r "with space.txt"\n',
        "with space.txt": "gamma==1.0",
    },
    "constraints": {
        "list.txt": "-c limits.txt\nalpha\nbeta\n",
        "limits.txt": "alpha<2\ndelta==1.0\n-c more/limits.txt\n",
        "more/limits.txt": "gamma==1.0  # needed by beta\n",
    },
    "constraints of an included file": {
        "list.txt": "-r more/one.txt\nalpha",
        "more/one.txt": "--constraint limits.txt\n",
        "more/limits.txt": "alpha<2",
    },
    "packages by path": {
        "list.txt": f"./wheels/{ALPHA}\nbeta @ wheels/beta-1.0-py3-none-any.whl ; python_version > '3'\n"
        "delta @ file://{here}/wheels/delta-1.0-py3-none-any.whl\n",
    },
    "a path that a marker excludes": {"list.txt": f"wheels/{ALPHA} ; python_version < '3'\nbeta\n"},
    "paths in an included file": {"list.txt": "-r more/one.txt", "more/one.txt": f"wheels/{ALPHA}\n-e ./lib[x]\n"},
    "links beside an included file": {"list.txt": "-r more/one.txt", "more/one.txt": "--find-links wheels\nepsilon\n"},
    "a variable in a location": {"list.txt": "--find-links ${PLACE}/more/wheels\nepsilon\n"},
    "spellings": {"list.txt": "ALPHA>=1.0,<2\nalpha<1.5;python_version>'3'\nBeta [x] == 1.*\n"},
    "options without effect": {"list.txt": "--prefer-binary\n--trusted-host host\n--use-feature=x\nalpha\n"},
    "binaries only": {"list.txt": "--only-binary :all:\n--no-binary=none-such\nalpha\n"},
    "an indented option": {"list.txt": "  -r two.txt\n", "two.txt": "alpha"},
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("requirements")
    for name in ("alpha", "delta", "gamma"):
        for version in ("1.0", "2.0"):
            make_wheel(root / "wheels", name, version)
    make_wheel(root / "wheels", "alpha", "3.0a1")
    make_wheel(root / "wheels", "beta", "1.0", requires=("gamma",))
    make_wheel(root / "more" / "wheels", "epsilon", "1.0")
    lib = '[project]\nname = "lib"\nversion = "1"\n[project.optional-dependencies]\nx = ["gamma==1.0"]\n'
    empty = '[project]\nname = "empty"\nversion = "1"\nrequires-python = ">=3.11"\n'
    write_files(
        root,
        {
            "lib/pyproject.toml": lib + BUILD_SYSTEM,
            "lib/src/lib/__init__.py": "",
            "project/pyproject.toml": empty + '[tool.uv]\nno-index = true\nfind-links = ["../wheels"]\n',
        },
    )
    uv("lock", "--offline", cwd=root / "project")
    return root


@pytest.fixture
def here(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(wheels)
    monkeypatch.setenv("PLACE", str(wheels))
    return wheels


def resolved_by_uv(root: Path, file: str) -> set[str]:
    """Return names and versions, or names of packages from a path, as `uv pip compile` resolves them."""
    command = [find_uv(), "pip", "compile", file, "--no-index", "--find-links", "wheels", "--python", sys.executable]
    command += ["--no-header", "--no-annotate", "--format", "pylock.toml", "--quiet"]
    environment = uv_environment({"PLACE": str(root)})
    text = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    return {
        f"{name} {version}" for name, version in re.findall(r'^name = "(.+)"\nversion = "(.+)"$', text, re.MULTILINE)
    } | set(re.findall(r'^name = "(.+)"\ndirectory', text, re.MULTILINE))


def resolved_by_us(root: Path, file: str) -> set[str]:
    planned = plan(f"uv run --project project --with-requirements {shlex.quote(file)}")
    return {f"{package.name} {package.version or ''}".strip() for package in planned.packages}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES.keys())
def test_file_is_read_as_by_uv(here: Path, files: dict[str, str]) -> None:
    digest = {"hash": _sha256(here / "wheels" / ALPHA), "other": "0" * 64}
    write_files(here, files, here=str(here), **digest)
    expected = resolved_by_uv(here, "list.txt")
    assert expected
    assert resolved_by_us(here, "list.txt") == expected


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("line", ["alpha==1.0", f"./wheels/{ALPHA}"])
def test_hashes_restrict_the_files(here: Path, line: str) -> None:
    right, wrong = _sha256(here / "wheels" / ALPHA), "0" * 64
    write_files(here, {"list.txt": f"{line} --hash=sha256:{wrong} --hash=sha256:{right}\n"})
    planned = plan("uv run --project project --with-requirements list.txt")
    assert [package.hashes for package in planned.packages] == [(f"sha256:{right}",)]
    write_files(here, {"list.txt": f"{line} \\\n  --hash=sha256:{wrong}\n"})
    with pytest.raises(VenvError, match=f"{wrong}"):
        plan("uv run --project project --with-requirements list.txt")


def test_what_pip_reads_and_uv_does_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, {"list.txt": "--pre\nalpha\n-climits.txt\n", "limits.txt": "alpha<3.0a2"})
    assert resolved_by_us(here, "list.txt") == {"alpha 3.0a1"}
    monkeypatch.setenv("MAJOR", "2")
    write_files(here, {"list.txt": "alpha \\\n  ==${MAJOR}.0\n"})
    assert resolved_by_us(here, "list.txt") == {"alpha 2.0"}


def test_unset_variable_stays(here: Path) -> None:
    write_files(here, {"list.txt": "alpha @ https://${NOT_SET_ANYWHERE}@host/alpha.zip\n"})
    assert read_requirements_file("list.txt") == ["alpha @ https://${NOT_SET_ANYWHERE}@host/alpha.zip"]


def test_path_beside_the_file(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, {"list.txt": f"./wheels/{ALPHA}\n-e ./lib\n"})
    monkeypatch.chdir(tmp_path)
    assert read_requirements_file(here / "list.txt") == [f"{here}/wheels/{ALPHA}", f"--editable {here}/lib"]


def test_directory_option_moves_all_paths(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, {"list.txt": f"wheels/{ALPHA}\n"})
    write_files(tmp_path, {"list.txt": "beta\n", f"wheels/{ALPHA}": ""})
    monkeypatch.chdir(tmp_path)
    spec = parse_py_executable(f"uv run --directory {here} --project project --with ./lib --with-requirements list.txt")
    assert spec.requirements == (f"{here}/lib", f"{here}/wheels/{ALPHA}")


def test_lines_have_the_same_meaning_elsewhere(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(here, FILES["constraints"])
    before = plan("uv run --project project --with-requirements list.txt")
    for name in FILES["constraints"]:
        os.remove(name)
    monkeypatch.chdir(tmp_path)
    spec = pickle.loads(pickle.dumps(before.spec))
    assert plan(spec, store=Store(tmp_path / "other")).digest == before.digest


def test_index_options_of_the_command_line(here: Path) -> None:
    lines = venvs.spec_from_runtime_env(
        {
            "uv": {
                "packages": ["alpha"],
                "uv_pip_install_options": ["--index https://one/", "--default-index=https://two"],
            }
        },
        "uv run --project project",
    ).requirements
    assert lines == ("alpha", "--extra-index-url https://one/", "--index-url https://two")


def test_list_of_a_runtime_env_may_name_files(here: Path) -> None:
    write_files(here, {"list.txt": "beta\n", "limits.txt": "gamma<2\n"})
    spec = venvs.spec_from_runtime_env({"pip": ["-r list.txt", "-c limits.txt"]}, "uv run --project project")
    assert {str(package) for package in plan(spec).packages} == {"beta==1.0", "gamma==1.0"}


def test_script_as_requirements_file(here: Path) -> None:
    write_files(here, {"job.py": '# /// script\n# dependencies = ["alpha<2"]\n# ///\n'})
    assert resolved_by_us(here, "job.py") == {"alpha 1.0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha\n\nno way!\n", r"list\.txt, line 3: 'no way!'"),
        ("alpha\n-r nowhere.txt\n", r"list\.txt, line 2: requirements file .*/nowhere\.txt does not exist"),
        ("-c nowhere.txt\n", r"list\.txt, line 1: requirements file .*/nowhere\.txt does not exist"),
        ("-r https://host/list.txt\n", "download the file"),
        ("alpha \\\n ==1.0 \\\n!\n", r"list\.txt, line 1"),
        ("--target x\n", "'--target'"),
        ("-e\n", "'--editable' needs a value"),
        ("alpha==1.0 --global-option=x\n", "is not a requirement"),
    ],
)
def test_error_names_file_and_line(here: Path, text: str, message: str) -> None:
    write_files(here, {"list.txt": text})
    with pytest.raises(RuntimeEnvError, match=message):
        read_requirements_file("list.txt")


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.cfg"])
def test_metadata_of_a_project_is_no_list(here: Path, name: str) -> None:
    write_files(here, {f"project/{name}": (here / "project" / "pyproject.toml").read_text()})
    with pytest.raises(InvalidPyExecutableError, match="Use `--project"):
        parse_py_executable(f"uv run --with-requirements project/{name}")
