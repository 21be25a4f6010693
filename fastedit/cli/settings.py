"""Method options from text: ``--set key=value``, ``--layers 3-5,8`` and a JSON file, checked against the
config class.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["parse_bytes", "parse_layers", "read_settings"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_settings(
    config: type, *, file: Path | None = None, assignments: Sequence[str] = (), layers: str | None = None
) -> dict[str, Any]:
    """Options of ``config`` from a JSON file, then ``key=value`` assignments and --layers, which win over it.

    Raises ValueError naming the option, the rule and the value: unknown option (the known ones are listed),
    wrong type, an assignment without '=', an option that is given twice, a file that is not a JSON object.
    FileNotFoundError for a missing file.
    """
    hints = get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    values: dict[str, Any] = {}
    if file is not None:
        for name, value in _read_file(file).items():
            values[name] = _checked(f"--config {file}", known, hints, name, value)
    given: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not name:
            raise ValueError(f"--set must be key=value, got {assignment!r}")
        if name in given:
            raise ValueError(f"--set must give {name} once, got {given[name]!r} and {text!r}")
        given[name] = text
        values[name] = _from_text(known, hints, name, text)
    if layers is not None:
        if "layers" in given:
            raise ValueError(
                f"--layers must not be given with --set layers, got {layers!r} and {given['layers']!r}"
            )
        values["layers"] = tuple(parse_layers(layers))
    return values


def parse_layers(text: str, option: str = "--layers") -> list[int]:
    """``"3-5,8"`` -> [3, 4, 5, 8]. ValueError for anything but numbers and ascending ranges, or a repeated
    layer.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{option} must look like 3,4,5 or 3-8, got {text!r}")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"{option} must have ascending ranges, got {part.strip()!r} in {text!r}")
        if high >= 10_000:
            raise ValueError(f"{option} must be below 10000, got {text!r}")
        layers += range(low, high + 1)
    if len(set(layers)) < len(layers):
        raise ValueError(f"{option} must not repeat a layer, got {text!r}")
    return layers


def parse_bytes(text: str, option: str = "--memory") -> int:
    """``"500MB"``, ``"1.5 GB"``, ``"2GiB"`` or a number of bytes. ValueError for anything else, and below one byte."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    size = 0 if found is None or unit is None else int(float(found[1]) * unit)
    if size < 1:
        raise ValueError(f"{option} must be a size like 500MB or 2GB, got {text!r}")
    return size


def _read_file(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config {path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} must be a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold one JSON object, got a {type(values).__name__}")
    return values


def _from_text(known: Sequence[str], hints: Mapping[str, Any], name: str, text: str) -> Any:
    """The first reading of the text that has the option's type: JSON, a bare list, the text itself."""
    if name == "layers" and name in known and re.fullmatch(r"[\d,\s]*\d\s*-\s*\d[\d,\s-]*", text):
        return tuple(parse_layers(text, "--set layers"))
    if name in known:
        for read in (json.loads, lambda t: json.loads(f"[{t}]"), _bare):
            try:
                value = read(text)
            except json.JSONDecodeError:
                continue
            if _fits(value, hints[name]):
                return _converted(value, hints[name])
    return _checked("--set", known, hints, name, text)


def _bare(text: str) -> Any:
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _checked(source: str, known: Sequence[str], hints: Mapping[str, Any], name: str, value: Any) -> Any:
    if name not in known:
        raise ValueError(f"{source}: unknown option {name!r}; known: {', '.join(known)}")
    if not _fits(value, hints[name]):
        raise ValueError(f"{source}: {name} must be {_described(hints[name])}, got {value!r}")
    return _converted(value, hints[name])


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(_fits(item, arg) for item, arg in zip(value, arguments))
    if origin is not None or hint is Any:
        return True
    if hint in (int, float):
        # bool is an int to Python, and NaN and the infinities are numbers to its JSON reader.
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and value - value == 0
    if hint in (None, type(None)):
        return value is None
    return not isinstance(hint, type) or isinstance(value, hint)


def _converted(value: Any, hint: Any) -> Any:
    """Lists as tuples; a whole number where the option is a float as a float."""
    if isinstance(value, (list, tuple)):
        return tuple(_converted(item, None) for item in value)
    if hint is float and isinstance(value, int):
        return float(value)
    return value


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if origin is tuple:
        inner = arguments[:1] if len(arguments) == 2 and arguments[1] is Ellipsis else arguments
        return f"a list of ({', '.join(_described(item) for item in inner)})"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "none"}
    return names.get(hint, str(hint))
