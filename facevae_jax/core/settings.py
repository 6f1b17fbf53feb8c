"""Settings: frozen dataclasses built from plain values, with errors that name the key as it is typed."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

CHANNELS = 3  # of an image: red, green, blue
BELOW_ONE = "at least 0 and below 1"
MAX_SEED = 2**32 - 1


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a ValueError that names the key, the value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"config.{key}={value!r} is not possible: it must be {allowed}.")


def check_all(settings: Any, section: str, keys: str, condition: Callable[[Any], bool], allowed: str) -> None:
    """Checks the settings named in `keys`, with spaces between them, by one condition."""
    for key in keys.split():
        check(condition(getattr(settings, key)), f"{section}.{key}", getattr(settings, key), allowed)


def by_resolution(text: str, key: str, *, number: str, example: str) -> dict[int, str]:
    """Pairs such as "64:96,32:192" of a setting: the number at each resolution, as text.

    Args:
      text: the setting's value; empty for none.
      key: its name.
      number: a pattern of what may stand after the colon.
      example: pairs that are right.

    Raises:
      ValueError: a part is no such pair, or a resolution is named twice.
    """
    pairs = [re.fullmatch(rf"([1-9]\d{{0,3}}):({number})", part) for part in text.split(",") if part]
    found = {int(pair[1]): pair[2] for pair in pairs if pair}
    check(len(found) == len(pairs), key, text, f"empty, or pairs of different resolutions such as {example}")
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"name": "x"}} -> {"data.name": "x"}, with tuples as lists as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def check_section(values: Any, prefix: str) -> None:
    """Raises a TypeError unless `values` is a ConfigDict or another mapping; a config file may return anything."""
    if not hasattr(values, "items"):
        key, given = f"config.{prefix}".rstrip("."), type(values).__name__
        raise TypeError(f"{key} is of type {given}: it must be a ConfigDict, as .to_config_dict() makes it.")


def check_known(values: Collection[str], known: Mapping[str, Any], prefix: str) -> None:
    """Raises a TypeError for a key that is no setting."""
    if unknown := sorted(set(values) - set(known)):
        raise TypeError(f"config.{prefix}{unknown[0]} is unknown: config.{prefix}* has {', '.join(known)}.")


def build(cls: Any, values: Any, *, prefix: str) -> Any:
    """The dataclass `cls` from a ConfigDict or another mapping; nothing is rounded or parsed.

    Raises:
      TypeError: an unknown key, or a value of the wrong type.
      ValueError: an impossible value.
    """
    check_section(values, prefix)
    hints = get_type_hints(cls)
    check_known(values, hints, prefix)
    return cls(**{key: _coerce(value, hints[key], prefix + key) for key, value in values.items()})


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type that `hint` asks for."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        check(value in allowed, path, value, "one of " + ", ".join(map(str, allowed)))
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, int) and not isinstance(value, bool):
            value = (value,)
        if not isinstance(value, (tuple, list)) or not all(type(item) is int for item in value):
            raise TypeError(f"config.{path}={value!r} must be whole numbers such as (32, 64).")
        return tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise TypeError(f"config.{path}={value!r} must be of type {hint.__name__}.")
    if hint is float:
        check(math.isfinite(value), path, value, "finite")
    if hint is int:  # steps and sizes are int32 on the device
        check(abs(value) < 2**31 or path == "train.seed", path, value, "below 2**31")
    return value


def defaults(cls: Any) -> dict[str, Any]:
    """The default of each setting of a dataclass."""
    return {field.name: field.default for field in dataclasses.fields(cls)}
