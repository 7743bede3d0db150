"""Mistakes in the class and the arguments of an environment, found without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_rl.environments.class_lookup import check_class
from nemo_rl.environments.episode_host import episode_maker
from nemo_rl.errors import ConfigError

GAMES = """
import os
import a_package_that_no_python_has

from operator import eq as same

class Nim:
    class Inner: ...
    def __init__(self, stones=7, *, seed, heaps=None): ...

class Free:
    def __init__(self, stones, **others): ...

class Inherited(Nim): ...

@some.decorator
class Decorated:
    def __init__(self): ...

def score(completion, answer, scale=1.0): ...

if os.name == "posix":
    Posix = Nim
else:
    def Other(): ...

for size in (3, 4):
    pass

def late():
    global Late
    Late = Nim
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "tasks_of_a_user"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\nfrom .games import Nim\n")
    (package / "games.py").write_text(GAMES)
    (package / "star.py").write_text("from os.path import *\n")
    (package / "lazy.py").write_text("def __getattr__(name): ...\n")
    (package / "broken.py").write_text("x = 1\nclass Nim(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package


def check(fqn: str, *config: str, in_driver_python: bool = True) -> None:
    check_class("env.nim", fqn, config, in_driver_python=in_driver_python)


@pytest.mark.parametrize("in_driver_python", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        ("games.Nim", "seed", "stones"),
        ("games.Nim.Inner",),
        ("games.Free", "stones", "anything"),
        ("games.Inherited", "anything"),
        ("games.Decorated", "anything"),
        ("games.score", "scale"),
        ("games.same",),
        *((f"games.{name}",) for name in ("Posix", "Other", "size", "Late")),
        ("star.join",),
        ("lazy.Anything",),
        ("Nim",),
    ],
)
def test_what_the_source_defines_is_accepted(arguments: tuple[str, ...], in_driver_python: bool) -> None:
    check(f"tasks_of_a_user.{arguments[0]}", *arguments[1:], in_driver_python=in_driver_python)
    assert "tasks_of_a_user" not in sys.modules


@pytest.mark.parametrize("in_driver_python", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("games.Nimm",), r"env.nim.class=tasks_of_a_user.games.Nimm: .*/games.py has no 'Nimm'. Did you mean 'Nim'\?"),
        (
            ("gamse.Nim",),
            r"has no module 'gamse'. Did you mean 'games'\? It has: broken, games, lazy, star",
        ),
        (("games",), "env.nim.class=tasks_of_a_user.games is a module. Add the name of the class"),
        (("sub.Nim",), "the package tasks_of_a_user.sub has no 'Nim'. It has: none"),
        (("games.Nim", "seed", "stone"), r"env.nim.config.stone: Nim has no argument 'stone'. Did you mean 'stones'\?"),
        (("games.Nim",), "env.nim.config: Nim needs the argument 'seed'"),
        (("games.score", "answer"), "env.nim.config.answer: score has no argument 'answer'.* Its arguments: scale"),
    ],
)
def test_mistake_is_named(arguments: tuple[str, ...], message: str, in_driver_python: bool) -> None:
    with pytest.raises(ConfigError, match=message):
        check(f"tasks_of_a_user.{arguments[0]}", *arguments[1:], in_driver_python=in_driver_python)


def test_module_that_another_python_may_have() -> None:
    for fqn in ("taks_of_a_user.games.Nim", "pydantic.NoSuchName", "tasks_of_a_user.broken.Nim"):
        check(fqn, in_driver_python=False)
    message = r"in which env.nim runs, finds no module 'taks_of_a_user'. Did you mean 'tasks_of_a_user'\?"
    with pytest.raises(ConfigError, match=message):
        check("taks_of_a_user.games.Nim")
    with pytest.raises(ConfigError, match=r"env.nim.class=tasks_of_a_user.broken.Nim: .*/broken.py:2: "):
        check("tasks_of_a_user.broken.Nim")
    with pytest.raises(ConfigError, match="has no 'no_such_name'"):
        check("json.no_such_name")


def test_directories_that_workers_search_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory in ("given", "current"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / f"tasks_{directory}.py").write_text("class Nim: ...\n")
    check_class("env.nim", "tasks_given.Nim", (), in_driver_python=True, search_path=[str(tmp_path / "given")])
    with pytest.raises(ConfigError, match="finds no module 'tasks_current'"):
        check("tasks_current.Nim")
    monkeypatch.chdir(tmp_path / "current")
    check("tasks_current.Nim")


@pytest.mark.parametrize("fqn", ["operator.eq", "math.isclose", "os.path.exists", "json.dumps"])
def test_modules_of_python(fqn: str) -> None:
    assert callable(episode_maker(fqn, {}))
    check(fqn)
