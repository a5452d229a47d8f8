"""Typed configuration: dataclasses, YAML files and dotted overrides.

Every stage has one dataclass whose fields are declared with `option`, so that the help text stands where the field
is. YAML and overrides go through OmegaConf; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError

ConfigT = TypeVar("ConfigT")
# Likeness from which a word is taken for a mistyped other one.
_NEAR = 0.4


def option(default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """Declares one configuration field with its help text.

    Args:
        default: The default; a list, dict or dataclass type is made anew for each object. Without a default the key
            must be given.
        help: One line, with units and range.
    """
    metadata = {"help": help}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(schema: type[ConfigT], path: Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Builds a configuration from defaults, then a YAML file, then dotted overrides.

    Args:
        schema: The dataclass to fill.
        path: A YAML file, or None.
        overrides: Items such as `train.samples=20000`; values are read as YAML.

    Returns:
        An instance of `schema`, checked by its own `__post_init__`.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    layers = []
    if path is not None:
        layers.append((str(path), _read_yaml(path)))
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise ConfigError(
                "an override cannot be read",
                seen=item,
                rule="overrides are dotted keys with a value",
                fix="write for example train.samples=20000",
            )
        layers.append((f"override {item!r}", _read_override(item)))
    return config_from_layers(schema, layers)


def config_from_dict(schema: type[ConfigT], values: dict[str, Any], source: str = "dictionary") -> ConfigT:
    """Builds a configuration from one dictionary; see `load_config`."""
    return config_from_layers(schema, [(source, values)])


def config_from_layers(schema: type[ConfigT], layers: Sequence[tuple[str, Any]]) -> ConfigT:
    """Merges named layers of plain values over the defaults of `schema`; see `load_config`."""
    source = "defaults"
    try:
        config = OmegaConf.structured(schema)
        for source, values in layers:
            if not isinstance(values, dict):
                raise ConfigError("a configuration is not a mapping", seen=source, rule="top level is key: value")
            _check_keys(schema, values, "", source)
            config = _merged(config, values, source)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(
                "a required key has no value",
                seen=", ".join(missing),
                fix=f"add {missing[0]}=... on the command line or in the YAML file",
            )
        return typing.cast(ConfigT, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        reason = " ".join(str(error).split("\n")[0].split())
        raise ConfigError(
            "a configuration value does not fit",
            seen=f"{error.full_key or '(top level)'} in {source}: {reason}",
            fix="see the keys and types with --show-config",
        ) from error


def _merged(config: Any, values: dict[str, Any], source: str) -> Any:
    try:
        return OmegaConf.merge(config, OmegaConf.create(values))
    except TypeError as error:  # OmegaConf's own, for a list where another layer has a mapping
        raise ConfigError(
            "a key is a list in one place and a mapping in another",
            seen=f"{', '.join(values)} in {source}",
            rule="one kind of value a key",
            fix="give the key once",
        ) from error


def _read_override(item: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([item]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            "the value of an override cannot be read",
            seen=f"{item}: {' '.join(str(error).split())}",
            rule="values are YAML: numbers, words, [a, list], {a: mapping}",
            fix="close every bracket and quote; quote the whole item where the shell would split it",
        ) from None


def _read_yaml(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path)) or {}
    except FileNotFoundError:
        raise ConfigError(
            "the configuration file does not exist", seen=path, fix="check the path after --config"
        ) from None
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "the configuration file cannot be read", seen=f"{path}: {reason}", rule="it is YAML"
        ) from error


def nested_schema(annotation: Any) -> type | None:
    """Returns the dataclass inside an annotation such as `X`, `X | None` or `list[X]`, or None."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            if (found := nested_schema(inner)) is not None:
                return found
    return None


def _check_keys(schema: type, values: dict[str, Any], prefix: str, source: str) -> None:
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            known = [prefix + name for name in hints]
            near = difflib.get_close_matches(prefix + str(key), known, n=1, cutoff=_NEAR)
            raise ConfigError(
                "unknown configuration key",
                seen=f"{prefix}{key} in {source}",
                rule=f"known keys here: {', '.join(known)}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
        _check_kind(hints[key], value, prefix + str(key), source)
        inner = nested_schema(hints[key])
        if inner is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                _check_keys(inner, item, f"{prefix}{key}.", source)


def _check_kind(annotation: Any, value: Any, key: str, source: str) -> None:
    """Refuses a single value where a list or a mapping is wanted, and one of these for the other."""
    if value is None or (isinstance(value, str) and value.startswith(("${", "???"))):
        return  # OmegaConf's references and missing values
    choices = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        choices = [inner for inner in typing.get_args(annotation) if inner is not types.NoneType]
    kinds = {typing.get_origin(choice) for choice in choices}
    shown = "..." if isinstance(value, (list, dict)) else value
    for kind, words, example in (
        (list, "a list, in brackets", f"[{shown}]"),
        (dict, "a mapping, in braces", f"{{name: {shown}}}"),
    ):
        if kinds == {kind} and not isinstance(value, kind):
            raise ConfigError(
                "a configuration value does not fit",
                seen=f"{key}: {value} in {source}",
                rule=f"{key} is {words}",
                fix=f"write {key}={example}",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration object as plain dictionaries, lists and scalars."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def to_yaml(config: Any) -> str:
    """Returns a configuration object as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_options(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields (dotted key, default as text, help) for every field of a configuration dataclass."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from describe_options(inner, f"{prefix}{field.name}.")
            continue
        if field.default is not dataclasses.MISSING:
            default = "null" if field.default is None else str(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = str(field.default_factory())
        else:
            default = "(required)"
        yield prefix + field.name, default, field.metadata.get("help", "")


def one_of(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError when `value` is not one of `choices`, naming the nearest one."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=_NEAR)
        raise ConfigError(
            f"{key} has an unknown value",
            seen=repr(value),
            rule=f"one of {', '.join(choices)}",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )


def positive(**values: float) -> None:
    """Raises ConfigError for the first keyword whose value is not above zero."""
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"{key.replace('__', '.')} is out of range", seen=value, rule="it must be above 0")
