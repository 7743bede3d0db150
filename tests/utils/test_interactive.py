"""Names in a user's script or notebook: which one a statement assigns, and which refer to a value."""

from __future__ import annotations

import sys
import types

import pytest

from nemo_rl.utils.interactive import assigned_name, names_of


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("x = Probe()", "x"),
        ("x: object = Probe()", "x"),
        ("x = (\n    Probe()\n)", "x"),
        ("for _ in range(3): x = Probe()", "x"),
        ("if True:\n    x = Probe()", "x"),
        ("x = y = Probe()", None),
        ("x = [Probe()]", None),
        ("x = Probe() if True else None", "x"),
        ("x = Probe().name", None),
        ("x, y = Probe(), 1", None),
        ("Probe()", None),
        ("with Probe() as x: pass", None),
        ("class A:\n    x = Probe()", None),
        ("def f():\n    x = Probe()\nf()", None),
        ("def f():\n    global x\n    x = Probe()\nf()", None),
    ],
)
def test_assigned_name(statement: str, name: str | None) -> None:
    seen = []

    class Probe:
        def __init__(self) -> None:
            seen.append(assigned_name(sys._getframe(1)))

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        name = None

    exec(compile(statement, "cell", "exec"), {"Probe": Probe})
    assert seen[-1] == name


def test_names_of_a_value_in_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    script = types.ModuleType("__main__")
    value = object()
    script.__dict__.update(first=value, other=object(), second=value)
    monkeypatch.setitem(sys.modules, "__main__", script)
    assert names_of(value) == ["first", "second"]
