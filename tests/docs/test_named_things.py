"""Tests that everything the pages and messages name exists: configuration keys, commands, files, variables, tests."""

from __future__ import annotations

import ast
import fnmatch
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.main
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nemo_rl import settings
from nemo_rl.algorithms.config import MasterConfig
from nemo_rl.algorithms.distillation_config import DistillationJobConfig
from nemo_rl.algorithms.dpo_config import DPOJobConfig
from nemo_rl.algorithms.eval_config import EvalConfig
from nemo_rl.algorithms.reward_model_config import RewardModelJobConfig
from nemo_rl.algorithms.sft_config import SFTJobConfig
from nemo_rl.cli.app import app
from nemo_rl.jobs.command_line import _parser
from nemo_rl.jobs.curate_math import CurateConfig
from nemo_rl.jobs.eval_job import _add_options
from nemo_rl.utils.config import ConfigModel, OpenSection, _section

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
SCHEMAS: tuple[type[ConfigModel], ...] = (
    MasterConfig,
    SFTJobConfig,
    DPOJobConfig,
    DistillationJobConfig,
    RewardModelJobConfig,
    EvalConfig,
    CurateConfig,
)
_ROOTS = "|".join(sorted({name for schema in SCHEMAS for name in schema.model_fields}))
# `section.key`, `section.*.key` or `section.key=value`, but no file name, address or attribute.
_KEY = re.compile(rf"(?<![\w./$-])((?:{_ROOTS})(?:\.(?:[a-z]\w*|\*))+)(?![\w(/:…]|\.\w)(?:=('[^'\n]*'|[^\s`;,)|]+))?")
_FILE_SUFFIXES = (".md", ".py", ".yaml", ".jsonl", ".parquet", ".html", ".json", ".svg")
_VARIABLE = re.compile(r"\b(?:NEMO_RL|NRL)_[A-Z_0-9]*[A-Z0-9]\b")
_COMMAND = re.compile(r"(?:^|[`\"'(]|\$ |: |uv run )nemo-rl ([a-z][^`\n;]*)", re.MULTILINE)
_FILE = re.compile(r"(?<![\w/.-])((?:examples|docker|tools|benchmarks|tests)/[\w./-]*\w)")


def texts(*, code: bool = True) -> list[tuple[str, str]]:
    """Return (location, text) of every page and of every string in the source; `…` replaces formatted values."""
    pages = [(page.relative_to(REPOSITORY).as_posix(), page.read_text(encoding="utf-8")) for page in PAGES]
    return pages + strings_in_code() if code else pages


@cache
def strings_in_code() -> list[tuple[str, str]]:
    return list(_strings_in_code())


def _strings_in_code() -> Iterator[tuple[str, str]]:
    for path in sorted((REPOSITORY / "nemo_rl").rglob("*.py")):
        name = path.relative_to(REPOSITORY)
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                values = node.values
                yield f"{name}:{node.lineno}", "".join(p.value if isinstance(p, ast.Constant) else "…" for p in values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield f"{name}:{node.lineno}", node.value


def fields_of(schema: type[ConfigModel], parts: list[str]) -> list[FieldInfo | None]:
    """Return the fields that match a dotted key with wildcards; None for a key in a section of a plugin."""
    section_classes: list[type[ConfigModel]] = [schema]
    if issubclass(schema, OpenSection):
        section_classes += [variant for _, variant in schema.variants()]
    fields: list[FieldInfo | None] = []
    for section in section_classes:
        for name in fnmatch.filter(section.model_fields, parts[0]):
            field = section.model_fields[name]
            if len(parts) == 1:
                fields.append(field)
            elif (below := _section(field.annotation)) is not None:
                fields += fields_of(below, parts[1:])
            elif "dict" in str(field.annotation):
                fields.append(None)
    return fields


def accepts(field: FieldInfo | None, value: str) -> bool:
    if field is None:
        return True
    annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        TypeAdapter(annotation).validate_python(yaml.safe_load(yaml.safe_load(value) if value[0] == "'" else value))
    except (ValidationError, yaml.YAMLError):
        return False
    return True


def problem_with(key: str, value: str | None) -> str | None:
    """Return the problem with a key and its value, or None."""
    fields = [field for schema in SCHEMAS for field in fields_of(schema, key.split("."))]
    if not fields:
        return "unknown key"
    if value is None or "…" in value or "%" in value or value.strip("'\"").isupper():  # a placeholder
        return None
    return None if any(accepts(field, value) for field in fields) else f"does not accept {value}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster.use_gpus", "false"),
        ("cluster.gpus_per_node", "many"),
        ("grpo.validation.perod", "3"),
        ("data.*.nothing", None),
        ("policy.options.tensor_size", "2"),
    ],
)
def test_wrong_key_or_value_is_detected(key: str, value: str | None) -> None:
    assert problem_with(key, value)


def test_named_configuration_keys_exist() -> None:
    seen, wrong = 0, []
    for where, text in texts():
        example_keys = set(re.findall(r"^    (\w+): .* = Field\(", text, re.MULTILINE))  # of a section in an example
        for match in _KEY.finditer(text):
            key, value = match[1], match[2].rstrip(".:") if match[2] else None
            if key.endswith(_FILE_SUFFIXES) or key.rpartition(".")[2] in example_keys:
                continue
            seen += 1
            if problem := problem_with(key, value):
                wrong.append(f"{where}: {key}: {problem}")
    assert seen > 100
    assert not wrong, "\n".join(wrong)


def test_named_commands_and_options_exist() -> None:
    seen, wrong = 0, []
    for where, text in texts():
        for match in _COMMAND.finditer(text):
            words = re.split(r"  |#| \(| ?\.\.|[.,:]\s|[.,:]$", match[1])[0]
            seen += 1
            if problem := unknown_in_command(words):
                wrong.append(f"{where}: nemo-rl {words}: {problem}")
    assert seen > 50
    assert not wrong, "\n".join(wrong)


@cache
def whole_command() -> Any:
    return typer.main.get_command(app)


@cache
def options_of_jobs() -> set[str]:
    parser = _parser(MasterConfig, "x")
    _add_options(parser)
    return {option for action in parser._actions for option in action.option_strings}


def unknown_in_command(line: str) -> str | None:
    """Return the first unknown command or option of `nemo-rl <line>`. `a | b` lists alternatives."""
    group = whole_command()
    try:
        words = shlex.split(line.replace("\\", ""))
    except ValueError:
        words = line.split()
    while words and hasattr(group, "commands"):
        name = words.pop(0)
        if "…" in name:
            return None
        if name not in group.commands:
            return name
        if words[:1] == ["|"]:
            del words[0]
        else:
            group = group.commands[name]
    known = {option for parameter in group.params for option in parameter.opts}
    if group.context_settings.get("ignore_unknown_options"):  # the job parses them
        known |= options_of_jobs()
    options = [word.strip("[].,)").partition("=")[0] for word in words[: words.index("--") if "--" in words else None]]
    return next((option for option in options if option.startswith("-") and option not in known), None)


@pytest.mark.parametrize(
    "line", ["veins list", "venvs list --jason", "plan --adress X", "venvs list | bild | prune", "grpo --confg x"]
)
def test_wrong_command_is_detected(line: str) -> None:
    assert unknown_in_command(line)


def test_named_variables_exist() -> None:
    known = {name for variable in settings.ALL.values() for name in (variable.name, variable.alias)}
    wrong = [
        f"{where}: {name}"
        for where, text in texts()
        for name in _VARIABLE.findall(text)
        if name not in known and not name.startswith("NEMO_RL_RESULT")
    ]
    assert not wrong, "\n".join(wrong)


def test_named_files_exist() -> None:
    wrong = []
    for where, text in texts():
        bases = (REPOSITORY, (REPOSITORY / where.partition(":")[0]).parent, REPOSITORY / "tests")
        for name in _FILE.findall(text):
            # Benchmark results are not in the repository.
            if not name.startswith("benchmarks/results") and not any((base / name).exists() for base in bases):
                wrong.append(f"{where}: {name}")
    assert not wrong, "\n".join(wrong)


def test_named_tests_exist() -> None:
    named = [
        (page.name, *match)
        for page in PAGES
        for match in re.findall(r"`(?:tests/)?([\w/]+\.py)::(test_\w+)`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20
    for page, path, test in named:
        assert f"\ndef {test}(" in (REPOSITORY / "tests" / path).read_text(encoding="utf-8"), f"{page}: {path}::{test}"


def test_security_claims_have_tests() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| statement |", "| ---"))
    ]
    assert len(rows) > 20
    assert not [row for row in rows if "::test_" not in row]


def test_troubleshooting_messages_exist() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages_in_source = [re.sub(r"\s+", " ", text) for where, text in texts() if where.startswith("nemo_rl/")]
    known = {
        "No available agent to submit job",
        "InvalidAuthToken",
        "has no extra",
    }  # from Ray, or assembled from parts
    # From Triton and vLLM on GPUs.
    known |= {"Failed to find C compiler", "Free memory on device", "No available memory for the cache blocks"}
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(messages) > 20
    wrong = []
    for message in messages:
        parts = [part for part in re.split(r" ?\(?(?:\.\.\.| -> )\)? ?", message) if part.strip("() ")]
        if message not in known and not any(all(part in text for part in parts) for text in messages_in_source):
            wrong.append(message)
    assert not wrong, "\n".join(wrong)
