"""Parsing of tool calls: what models write, what is malformed, and two properties."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_rl.environments.tools import registry
from nemo_rl.environments.tools.registry import TOOL_CALL_FORMATS, load_call_format
from nemo_rl.environments.tools.tool_calls import ToolCall, parse_hermes, parse_llama3, parse_mistral, render_calls
from nemo_rl.errors import ConfigError

FORMATS = ("hermes", "llama3", "mistral")
ADD = ToolCall("add", {"a": 1, "b": 2})
OPEN = "<tool_call>"


def parse_lines(text: str) -> list[ToolCall]:
    """A format of a user: one call per line that starts with an exclamation mark."""
    return [ToolCall(line[1:]) for line in text.splitlines() if line.startswith("!")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', [ADD]),
        ('I add.<tool_call>{"name":"add","arguments":{"a":1,"b":2}}</tool_call> Then wait.', [ADD]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>' * 2, [ADD, ADD]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}', [ADD]),  # cut off by a stop string
        ('<tool_call>{"name": "add", "parameters": {"a": 1, "b": 2}}</tool_call>', [ADD]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', [ADD]),
        ('<tool_call>{"name": "now"}</tool_call>', [ToolCall("now")]),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
            [ToolCall("f", {"x": "</tool_call>"})],
        ),
        ("The answer is 3.", []),
        ('{"name": "add", "arguments": {}}', []),
        ("</tool_call>", []),
        ("", []),
    ],
)
def test_hermes(text: str, expected: list[ToolCall]) -> None:
    assert parse_hermes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('I add. <|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('{"type": "function", "function": {"name": "add", "parameters": {"a": 1, "b": 2}}}', [ADD]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "now", "parameters": {}}', [ADD, ToolCall("now")]),
        ('{"name": "Ada", "born": 1815}', []),
        ('{"answer": 3}', []),
        ("{1, 2}", []),
        ("3", []),
        ("", []),
    ],
)
def test_llama3(text: str, expected: list[ToolCall]) -> None:
    assert parse_llama3(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]', [ADD]),
        ('[{"name": "add", "arguments": {"a": 1, "b": 2}}]', [ADD]),
        ('[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abc123def"}]', [ToolCall("now", id="abc123def")]),
        ("[1, 2]", []),
        ("", []),
    ],
)
def test_mistral(text: str, expected: list[ToolCall]) -> None:
    assert parse_mistral(text) == expected


@pytest.mark.parametrize(
    ("call_format", "text", "problem"),
    [
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "cannot be read"),
        ("hermes", "<tool_call>add(1, 2)</tool_call>", "cannot be read"),
        ("hermes", "<tool_call>", "cannot be read"),
        ("hermes", '<tool_call>{"name": "a"} {"name": "b"}</tool_call>', "more text after the JSON"),
        ("hermes", '<tool_call>["add"]</tool_call>', 'no "name"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no JSON object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "a = 1"}</tool_call>', "cannot be read"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        (
            "hermes",
            f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * 80 + "]" * 80}}}}}</tool_call>',
            "too deeply",
        ),
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * 99999}', "too deeply"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}', "cannot be read"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}} I hope that helps', "cannot be read"),
        ("llama3", "<|python_tag|>print(1)", "cannot be read"),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}]', "cannot be read"),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}] Done.', "more text after the JSON"),
        ("mistral", "[TOOL_CALLS] []", "no list of calls"),
    ],
)
def test_malformed_call_has_a_problem(call_format: str, text: str, problem: str) -> None:
    assert problem in load_call_format(call_format)(text)[-1].problem


def test_malformed_call_does_not_hide_the_next_one() -> None:
    first, second = parse_hermes('<tool_call>{"name" "x"}</tool_call><tool_call>{"name": "now"}</tool_call>')
    assert first.problem
    assert second == ToolCall("now")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MARKS = st.sampled_from(
    [
        OPEN,
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        '{"name":',
        '"f"',
        ', "arguments": {',
        "}",
        "[",
        "]",
        ";",
        '"',
        "\\",
    ]
)
ARGUMENTS = st.dictionaries(st.text() | MARKS, VALUES | MARKS, max_size=4)
CALLS = st.lists(st.builds(ToolCall, st.text() | MARKS, ARGUMENTS, st.just("") | st.text(min_size=1)), max_size=3)


@given(calls=CALLS, call_format=st.sampled_from(FORMATS))
def test_parsing_inverts_rendering(calls: list[ToolCall], call_format: str) -> None:
    assert load_call_format(call_format)(render_calls(calls, call_format)) == calls


@given(text=st.text() | st.lists(MARKS | st.text(max_size=3), max_size=20).map("".join), name=st.sampled_from(FORMATS))
@example(text='<tool_call>{"name": "f", "arguments": {"x": 1' + "0" * 5000 + "}}</tool_call>", name="hermes")
@example(text="<tool_call>" + '{"a":' * 50_000, name="hermes")
@example(text='[TOOL_CALLS]{"name": "f"}', name="mistral")
def test_no_text_makes_a_parser_raise(text: str, name: str) -> None:
    for call in load_call_format(name)(text):
        assert isinstance(call, ToolCall)


def test_every_format_can_be_loaded() -> None:
    for name in TOOL_CALL_FORMATS:
        assert load_call_format(name)("no call") == []


def test_format_is_a_function_of_the_user() -> None:
    assert load_call_format(f"{__name__}.parse_lines")("!now\nhello") == [ToolCall("now")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hermse", "unknown call format 'hermse'; did you mean 'hermes'?"),
        (f"{__name__}.missing", "cannot be imported: .* has no 'missing'"),
        (f"{__name__}.OPEN", "is a str, not a function"),
    ],
)
def test_unknown_format_is_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_call_format(name)


def test_entry_point_names_a_format_and_a_tool(tmp_path, monkeypatch) -> None:
    (tmp_path / "shouting.py").write_text(
        "from nemo_rl.environments.tools.tool_calls import ToolCall\n"
        "def parse(text):\n    return [ToolCall(text)] if text.isupper() else []\n"
        "def shout(text: str) -> str:\n    'Shout.'\n    return text.upper()\n"
    )
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[nemo_rl.tool_call_formats]\nshouting = shouting:parse\n[nemo_rl.tools]\nshout = shouting:shout\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_call_format("shouting")("NOW") == [ToolCall("NOW")]
    assert registry.load_tool("shout")("a") == "A"
