"""Parsing of py_executable strings."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_rl import settings
from nemo_rl.errors import InvalidPyExecutableError, RuntimeEnvError
from nemo_rl.venvs import InterpreterSpec, VenvSpec, parse_py_executable, spec_from_runtime_env
from nemo_rl.venvs.planning.spec import ACCEPTED_OPTIONS


def test_accepted_options(tmp_path: Path) -> None:
    listed = tmp_path / "more.txt"
    listed.write_text("six>=1.16\n")
    text = (
        f"uv run --locked --extra vllm --extra=Flash_Attn --group test --no-default-groups --all-extras "
        f"--with 'packaging==23.2' --with-requirements {listed} --python 3.11 --directory {tmp_path} --project sub"
    )
    assert parse_py_executable(text) == VenvSpec(
        project=str(tmp_path / "sub"),
        extras=("flash-attn", "vllm"),
        groups=("test",),
        all_extras=True,
        default_groups=False,
        python="3.11",
        requirements=("packaging==23.2", "six>=1.16"),
    )
    assert parse_py_executable("uv run --frozen").frozen
    assert parse_py_executable("uv run --package My_Lib").package == "my-lib"
    assert parse_py_executable("uv run --all-packages").all_packages


def test_default_project() -> None:
    assert parse_py_executable("uv run --extra vllm").project == str(settings.project_root())


def test_order_of_options_does_not_matter() -> None:
    assert parse_py_executable("uv run --extra b --locked --extra a") == parse_py_executable(
        "uv run --extra a --extra b"
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("uv run --isolated", "--isolated"),
        ("uv run --with-editable .", "--with-editable"),
        ("uv run -p 3.11", "-p"),
        ("uv run --locked=1", "--locked"),
        ("uv run --locked python", "'python'"),
        ("uv run --locked -- python", "--"),
        ("uv run --extra", "--extra"),
        ("uv run --extra --locked", "--extra"),
        ("uv run --extra ''", "--extra"),
        ("uv run --extra a/b", "'a/b'"),
        ("uv run --project a --project b", "--project"),
        ("uv run --locked --frozen", "--frozen"),
        ("uv run --package a --all-packages", "--all-packages"),
        ("uv run --package a --package b", "--package"),
        ("uv run --with 'not a requirement!'", "not a requirement!"),
        ("uv run --with-requirements /no/such/file.txt", "/no/such/file.txt"),
        ("uv run 'unbalanced", "quotation"),
    ],
)
def test_rejected_option_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidPyExecutableError) as caught:
        parse_py_executable(text)
    assert named in str(caught.value)


def test_rejection_lists_the_accepted_options() -> None:
    with pytest.raises(InvalidPyExecutableError) as caught:
        parse_py_executable("uv run --isolated")
    assert all(option in str(caught.value) for option in ACCEPTED_OPTIONS)


@pytest.mark.parametrize("text", ["", " ", "python", "uv", "uv sync", "/usr/bin/python3 -X dev", "a/b c/d", "x\x00/y"])
def test_other_commands_are_rejected(text: str) -> None:
    with pytest.raises(InvalidPyExecutableError):
        parse_py_executable(text)


def test_path_of_an_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_py_executable(sys.executable) == InterpreterSpec(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert parse_py_executable("env/bin/python") == InterpreterSpec(str(tmp_path / "env" / "bin" / "python"))
    spaced = tmp_path / "my env" / "python"
    spaced.parent.mkdir()
    spaced.symlink_to(sys.executable)
    assert parse_py_executable(str(spaced)) == InterpreterSpec(str(spaced))


def test_canonical_string_parses_to_the_same_spec() -> None:
    spec = parse_py_executable(
        "uv run --extra a --group g --no-default-groups --python 3.11 --with 'x>=1,<2' --project '/a b'"
    )
    assert parse_py_executable(str(spec)) == spec
    for members in ("--package lib", "--all-packages"):
        spec = parse_py_executable(f"uv run --project /a {members}")
        assert parse_py_executable(str(spec)) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_with_splits_at_commas_between_requirements() -> None:
    assert parse_py_executable("uv run --with 'a[x,y]>=1,<2,b==1'").requirements == ("a[x,y]>=1,<2", "b==1")


def test_error_masks_credentials() -> None:
    with pytest.raises(InvalidPyExecutableError) as caught:
        parse_py_executable("uv run --index-url https://user:hunter2@index.example/simple")
    assert "hunter2" not in str(caught.value)


words = st.sampled_from(
    ["uv", "run", *ACCEPTED_OPTIONS, "--extra=a", "a", "a-b", "''", "'", "\\", "--", "~x", "/", ",", "x y"]
)


@given(st.one_of(st.text(), st.lists(st.one_of(words, st.text(max_size=5))).map(lambda w: " ".join(["uv run", *w]))))
@example("uv run --with-requirements ~nobody_at_all/x")
@example("\udce4/python")
@example("uv run --with \U0010ffff")
def test_every_string_is_parsed_or_rejected(text: str) -> None:
    try:
        spec = parse_py_executable(text)
    except InvalidPyExecutableError:
        pass
    else:
        assert os.path.isabs(spec.path if isinstance(spec, InterpreterSpec) else spec.project)
        assert parse_py_executable(str(spec)) == spec or " " in str(getattr(spec, "path", ""))


def test_runtime_env_requirements(tmp_path: Path) -> None:
    base = parse_py_executable("uv run --extra vllm")
    listed = tmp_path / "reqs.txt"
    listed.write_text("# a comment\npackaging==23.2  # why\n-r more.txt\n./wheels/x-1.0-py3-none-any.whl\n")
    (tmp_path / "more.txt").write_text("six \\\n  >=1.16\n-e ./lib\n--find-links wheels\n")
    file_lines = (
        "packaging==23.2",
        "six    >=1.16",
        f"--editable {tmp_path}/lib",
        f"--find-links {tmp_path}/wheels",
        f"{tmp_path}/wheels/x-1.0-py3-none-any.whl",
    )
    for value, expected in [
        ({"pip": ["packaging==23.2"]}, ("packaging==23.2",)),
        ({"uv": {"packages": ["six"], "uv_check": False, "uv_version": "==0.4"}}, ("six",)),
        (
            {"pip": {"packages": ["six"], "pip_install_options": ["--index-url https://i.example/s"]}},
            ("six", "--index-url https://i.example/s"),
        ),
        ({"pip": str(listed)}, file_lines),
        ({"uv": {"packages": str(listed)}}, file_lines),
        ({"env_vars": {"A": "1"}}, ()),
        ({"pip": []}, ()),
        ({"uv": {"packages": [], "uv_pip_install_options": ["--no-index"]}}, ()),
    ]:
        assert spec_from_runtime_env(value, base) == base.with_packages(expected)
    assert spec_from_runtime_env({"pip": ["six"]}, sys.executable) == InterpreterSpec(sys.executable, ("six",))


@pytest.mark.parametrize(
    ("runtime_env", "named"),
    [
        ({"pip": ["six"], "uv": ["six"]}, "'uv'"),
        ({"pip": 3}, "'pip'"),
        ({"pip": ["no way!"]}, "no way!"),
        ({"pip": [3]}, "3"),
        ({"pip": {"packages": ["six"], "pip_check": True}}, "pip_check"),
        ({"uv": {"packages": ["six"], "color": 1}}, "color"),
        ({"uv": {"packages": ["six"], "uv_pip_install_options": ["--target=x"]}}, "--target"),
        ({"pip": "/no/such/requirements.txt"}, "/no/such/requirements.txt"),
    ],
)
def test_malformed_runtime_env_is_rejected(runtime_env: dict[str, object], named: str) -> None:
    with pytest.raises(RuntimeEnvError) as caught:
        spec_from_runtime_env(runtime_env, "uv run")
    assert named in str(caught.value)


def test_recursive_requirements_files_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("-r a.txt\n")
    with pytest.raises(RuntimeEnvError, match="levels"):
        spec_from_runtime_env({"pip": str(tmp_path / "a.txt")}, "uv run")
