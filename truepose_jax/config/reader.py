"""The strict reader that makes settings' dataclasses from a ConfigDict, and the ranges that stand in fields' types."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from input_pipeline.schema import UserError


class ConfigError(UserError):
    """A configuration that cannot be run: one line that names the key, its value and what is allowed."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"config.{otherwise}")


# Ranges, in words and as a test; they stand in a field's type.
_ABOVE_0 = ("above 0", lambda x: x > 0)
_FROM_0 = ("0 or more", lambda x: x >= 0)
Positive = Annotated[int, _ABOVE_0]
PositiveFloat = Annotated[float, _ABOVE_0]
Count = Annotated[int, _FROM_0]
FloatFrom0 = Annotated[float, _FROM_0]
Several = Annotated[int, ("2 or more", lambda x: x >= 2)]
Share = Annotated[float, ("in [0, 1]", lambda x: 0 <= x <= 1)]
UpTo48 = Annotated[int, ("from 1 to 48", lambda x: 1 <= x <= 48)]
ShareBelow1 = Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]
AxisSize = Annotated[int, ("above 0, or -1 for the rest", lambda x: x > 0 or x == -1)]


def _convert(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_config_dict(_variant(kind, value, where), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value, (words, holds) = _convert(value, arguments[0], where), arguments[1]
        if holds(value):
            return value
        raise ConfigError(f"{where} is {value}; it must be {words}")
    if origin is Literal:
        if _convert(value, type(arguments[0]), where) in arguments:
            return value
        raise ConfigError(f"{where} is {value!r}; choose one of {arguments}")
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _convert(value, option, where)
            except ConfigError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    elif kind in (int, float) and isinstance(value, kind | int) and not isinstance(value, bool):
        bound, words = (math.inf, "finite") if isinstance(value, float) else (2**63, "within 64 bits")
        if abs(value) < bound:
            return kind(value)
        raise ConfigError(f"{where} is {value}; it must be {words}")
    elif kind in (str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ConfigError(f"{where} is {value!r} ({type(value).__name__}); expected {name}")


def _variant(cls: type, values: Any, where: str) -> type:
    """The class that reads a group: `cls`, or the one that it chooses by the group's values."""
    if not hasattr(cls, "variant") or not hasattr(values, "items"):
        return cls
    return cls.variant(dict(values.items()), where)


def from_config_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Makes the dataclass `cls` from a mapping (a ConfigDict, or a dict read from metadata.json).

    Every field must be there, of its type and in its range, and nothing else. Raises ConfigError.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"{where} is {values!r}; expected a group of settings")
    values = dict(values.items())
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}.{key} is not a setting; {hint}")
    missing = sorted(fields.keys() - values.keys())
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    try:
        return cls(**{key: _convert(values[key], kind, f"{where}.{key}") for key, kind in fields.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def with_defaults(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The saved config of an older run: settings and groups that came later are added, at their defaults (which must
    therefore mean what runs did before them)."""
    defaults = to_dict(cls())
    for field in dataclasses.fields(cls):
        group = values.get(field.name)
        if isinstance(group, Mapping) and dataclasses.is_dataclass(field.default):
            chosen = _variant(type(field.default), group, f"config.{field.name}")
            defaults[field.name] = to_dict(chosen())
    return _filled(values, defaults)


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    groups = {k for k, v in values.items() if isinstance(v, Mapping) and isinstance(defaults.get(k), Mapping)}
    return {**defaults, **values, **{k: _filled(values[k], defaults[k]) for k in groups}}


def to_dict(config: Any) -> dict[str, Any]:
    """The plain nested dict of a config, ready for JSON; from_config_dict reads it back."""
    return dataclasses.asdict(config)


def checked(config: Any) -> Any:
    """The same config, read again: dataclasses.replace checks neither types nor ranges. Raises ConfigError."""
    return from_config_dict(type(config), to_dict(config))
