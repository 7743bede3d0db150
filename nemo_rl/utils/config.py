"""Loads typed configuration from YAML files and dotted overrides.

A section of the configuration is a subclass of `ConfigModel` in the package that uses it. `load_config` merges files
and command-line overrides with OmegaConf, so `${...}` interpolation works, and then validates every key and value.
Every error is a `ConfigError` that names the key, the value, and the nearest valid name.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nemo_rl.errors import ConfigError
from nemo_rl.utils.names import nearest_names

DEFAULTS_KEY = "defaults"
_MAX_SHOWN = 200


class ConfigModel(BaseModel):
    """Base class of all sections. Rejects unknown keys, and validates default values.

    Example:
        >>> class ServerConfig(ConfigModel):
        ...     port: int = 80
        >>> load_config(ServerConfig, overrides=["port=8080"]).port
        8080
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True, frozen=True)


class OpenSection(ConfigModel):
    """Base class of sections whose keys are not all known beforehand.

    Either they depend on another key, which selects a subclass: the parent section converts the given values to the
    selected subclass when it is validated. Or users name them, and each such key is a section of the class `entry`.
    """

    entry: ClassVar[type[ConfigModel] | None] = None

    @classmethod
    def variants(cls) -> Iterable[tuple[str, type[ConfigModel]]]:
        """Return the subclasses with the settings that select them ("policy.backend=megatron"), for `--help`."""
        return ()


ConfigT = TypeVar("ConfigT", bound=ConfigModel)


def load_config(
    schema: type[ConfigT],
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ConfigT:
    """Load and validate a configuration.

    Args:
        schema: the root section.
        path: a YAML file. Its key `defaults: other.yaml` names a file that it extends, relative to the file; a list
            names several, each of which takes precedence over those before it.
        overrides: `section.key=value` strings with YAML values. They take precedence over the file. As in Hydra, a
            prefix `+` or `++` is accepted (every key has a default, so nothing differs), and `~section.key` drops what
            the file says about a key or a section.

    Raises:
        ConfigError: the file is missing or not valid YAML, a key is unknown, or a value has the wrong type or range.
    """
    assignments, dropped = [], []
    for override in overrides:
        key, sign, value = override.partition("=")
        if key.startswith("~"):
            dropped.append(key[1:].strip())
        elif sign:
            key = key.removeprefix("+").removeprefix("+")
            assignments.append(f"{key}={value}")
        if not key.strip("~ ") or (not sign and not key.startswith("~")):
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        check_key(schema, key.removeprefix("~").strip(), where=f"override {override!r}")
    try:
        merged = OmegaConf.create({}) if path is None else _read(path, seen=())
        if convert is not None:
            plain: Any = OmegaConf.to_container(merged, resolve=True)
            merged = OmegaConf.create(convert(plain))
        for key in dropped:
            _drop(merged, key.split("."))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(assignments))
        content = OmegaConf.to_container(merged, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path or 'command line'}: {' '.join(str(error).split())}") from None
    return validate(schema, content, where=str(path) if path else "command line")


def sections_of(path: Path) -> set[str]:
    """Return the top-level keys of a configuration file and of the files that it extends. Raises `ConfigError`."""
    return {str(key) for key in _read(path, seen=())}


def validate(schema: type[ConfigT], content: Any, where: str) -> ConfigT:
    """Validate plain data against a section. `where` names the source of the data in error messages."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        lines = [_explain(schema, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def dump_yaml(config: ConfigModel) -> str:
    """Return the resolved configuration as YAML. `load_config` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def check_key(schema: type[ConfigModel], key: str, where: str) -> None:
    """Raise `ConfigError` with the nearest valid name if the dotted `key` does not exist in `schema`."""
    current: type[ConfigModel] | None = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if current is None:
            return
        fields = _fields(current)
        if part not in fields and issubclass(current, OpenSection):
            current = current.entry  # without one, the parent section validates its keys
            continue
        if part not in fields:
            raise ConfigError(f"{where}: {_unknown(current, '.'.join(parts[:depth]), part)}")
        annotation = fields[part].annotation
        current = _section(annotation)
        if current is None and depth + 1 < len(parts) and not _is_mapping(annotation):
            raise ConfigError(f"{where}: {'.'.join(parts[: depth + 1])} is a value and has no key {parts[depth + 1]!r}")


@dataclass(frozen=True)
class KeyInfo:
    """Documents a key: its dotted name, its type and default as text, and one line of help."""

    name: str
    type: str
    default: str
    help: str


def iter_keys(schema: type[ConfigModel], prefix: str = "") -> Iterator[KeyInfo]:
    """Yield all leaf keys of a schema, in the order of definition."""
    for name, field in _fields(schema).items():
        dotted = f"{prefix}{name}"
        section = _section(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        if section is not None and not optional:
            yield from _section_keys(section, prefix=f"{dotted}.")
            continue
        default = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
        text = "required" if default is PydanticUndefined else _show(default)
        yield KeyInfo(dotted, _type_name(field.annotation), text, field.description or "")
        if section is not None:
            yield from _section_keys(section, prefix=f"{dotted}.")


def _section_keys(section: type[ConfigModel], prefix: str) -> Iterator[KeyInfo]:
    yield from iter_keys(section, prefix)
    if issubclass(section, OpenSection):
        if section.entry is not None:
            yield from iter_keys(section.entry, f"{prefix}<name>.")
        for choice, variant in section.variants():
            for key in iter_keys(variant, prefix):
                yield replace(key, help=f"{key.help} Only with {choice}.")


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            f"{path}: `{DEFAULTS_KEY}` leads back to itself: {' -> '.join(p.name for p in (*seen, path))}"
        )
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist{_nearest_file(path)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must contain a mapping of sections, not {type(content).__name__}")
    parents = _parents(content.pop(DEFAULTS_KEY, None), path)
    return OmegaConf.merge(*(_read(parent, (*seen, path)) for parent in parents), OmegaConf.create(content))


def _drop(section: Any, parts: Sequence[str]) -> None:
    """Remove a key from a section that was read from files. Does nothing if the files do not have it."""
    *parents, name = parts
    for parent in parents:
        section = section.get(parent) if isinstance(section, DictConfig) else None
    if isinstance(section, DictConfig):
        section.pop(name, None)


def _parents(value: Any, path: Path) -> list[Path]:
    """Return the files that the file `path` extends, in the order in which they are merged."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{path}: `{DEFAULTS_KEY}` must be a file name or a list of file names, got {value!r}")
    return [path.parent / name for name in names]


def _nearest_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = nearest_names(path.name, names)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(schema: type[ConfigModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        parent = _descend(schema, location[:-1])
        if parent is not None:
            return _unknown(parent, ".".join(location[:-1]), location[-1])
    message = problem["msg"].removeprefix("Value error, ")
    if location and message.startswith(f"{'.'.join(location)}: "):  # from a section that its parent validates
        return message
    hidden = problem["type"] == "missing" or isinstance(problem["input"], dict)
    seen = "" if hidden else f", got {_shortened(repr(problem['input']))}"
    return f"{'.'.join(location) or 'configuration'}: {message[:1].lower()}{message[1:]}{seen}"


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _unknown(section: type[ConfigModel], prefix: str, name: str) -> str:
    valid = list(_fields(section))
    near = nearest_names(name, valid)
    dotted = f"{prefix}.{name}" if prefix else name
    hint = f"did you mean {f'{prefix}.' if prefix else ''}{near[0]}?" if near else f"known here: {', '.join(valid)}"
    return f"unknown key {dotted}; {hint}"


def _descend(schema: type[ConfigModel], location: Sequence[str]) -> type[ConfigModel] | None:
    current: type[ConfigModel] | None = schema
    for part in location:
        if current is None:
            return None
        field = _fields(current).get(part)
        if field is not None:
            current = _section(field.annotation)
        else:
            current = current.entry if issubclass(current, OpenSection) else None
    return current


def _fields(section: type[ConfigModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their keys. A key that is no Python name, such as `class`, is an alias."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _section(annotation: Any) -> type[ConfigModel] | None:
    """Return the section class of an annotation such as `Section` or `Section | None`; None for a plain value."""
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, ConfigModel):
            return candidate
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_mapping(annotation: Any) -> bool:
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return any(candidate is dict or typing.get_origin(candidate) is dict for candidate in candidates)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return " | ".join(_type_name(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    return str(annotation) if typing.get_origin(annotation) else getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    if isinstance(value, ConfigModel):
        return ""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
