"""An instance of a JSON schema: what a model with structured output or a tool call would answer."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

_DEEP = 6  # below it only what is required: recursive schemas must end
_LONGEST = 10_000  # what a schema may make the simulator write
_FORMATS = {
    "date-time": "2026-01-02T03:04:05Z",
    "date": "2026-01-02",
    "time": "03:04:05Z",
    "duration": "PT1H",
    "email": "someone@example.com",
    "hostname": "example.com",
    "uri": "https://example.com/",
    "uri-reference": "/path",
    "uuid": "3f2b8c4e-5d6a-4b7c-8d9e-0f1a2b3c4d5e",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "regex": "^a$",
    "json-pointer": "/a",
}
_ATOM = re.compile(r"(\[(?:\\.|[^\]\\])*\]|\((?:\\.|[^()\\])*\)|\\.|.)(\{\d+(?:,\d*)?\}|[*+?])?")
_CLASSES = {
    "d": "1",
    "w": "a",
    "s": " ",
    "D": "a",
    "W": "-",
    "S": "a",
    "b": "",
    "B": "",
    "n": "\n",
    "t": "\t",
}


def instance(schema: Any) -> Any:
    """`schema`: a JSON schema (the common part of draft 2020-12). One that makes no sense gives None."""
    with contextlib.suppress(TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError):
        return _instance(schema, schema, 0)
    return None


def _instance(schema: Any, root: Any, depth: int) -> Any:
    if not isinstance(schema, dict):
        return "any" if schema is not False else None
    if "$ref" in schema:
        return _instance(_resolve(str(schema["$ref"]), root), root, depth + 1) if depth < 4 * _DEEP else None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if "allOf" in schema:
        return _instance(_merged(schema, root), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            rest = {name: value for name, value in schema.items() if name != key}
            return _instance(_joined(rest, _choose(schema[key], depth), root), root, depth + 1)
    return _by_type(schema, root, depth)


def _by_type(schema: dict[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = "null" if depth > _DEEP and "null" in kind else next((k for k in kind if k != "null"), "null")
    if kind == "object" or (kind is None and ("properties" in schema or "required" in schema)):
        return _object(schema, root, depth)
    if kind == "array" or (kind is None and ("items" in schema or "prefixItems" in schema)):
        return _array(schema, root, depth)
    if kind in {"integer", "number"}:
        return _number(schema, whole=kind == "integer")
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    return _string(schema)


def _choose(options: list[Any], depth: int) -> Any:
    if depth > _DEEP:
        for option in options:
            if isinstance(option, dict) and option.get("type") == "null":
                return option
    return options[0]


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#").split("/"):
        if part and isinstance(found, dict):
            found = found.get(part.replace("~1", "/").replace("~0", "~"), {})
    return found


def _joined(schema: dict[str, Any], other: Any, root: Any) -> dict[str, Any]:
    if isinstance(other, dict) and "$ref" in other:
        other = _resolve(str(other["$ref"]), root)
    if not isinstance(other, dict):
        return schema
    return {
        **schema,
        **other,
        "properties": {**schema.get("properties", {}), **other.get("properties", {})},
        "required": [*schema.get("required", []), *other.get("required", [])],
    } if "properties" in schema or "properties" in other else {**schema, **other}  # fmt: skip


def _merged(schema: dict[str, Any], root: Any) -> dict[str, Any]:
    merged = {name: value for name, value in schema.items() if name != "allOf"}
    for part in schema["allOf"]:
        merged = _joined(merged, part, root)
    return merged


def _object(schema: dict[str, Any], root: Any, depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    names = [name for name in properties if depth <= _DEEP or name in required]
    names += [name for name in required if name not in properties]
    return {name: _instance(properties.get(name, {}), root, depth + 1) for name in names}


def _array(schema: dict[str, Any], root: Any, depth: int) -> list[Any]:
    fixed = [_instance(item, root, depth + 1) for item in schema.get("prefixItems", [])]
    least = min(int(schema.get("minItems", 0)), _LONGEST)
    wanted = max(least, 0 if depth > _DEEP else 1)
    wanted = min(wanted, int(schema.get("maxItems", wanted)))
    item = schema.get("items", {})
    if fixed and (item is False or wanted <= len(fixed)):
        return fixed
    values = [_instance(item, root, depth + 1) for _ in range(len(fixed), wanted)]
    return [*fixed, *(_distinct(values, item) if schema.get("uniqueItems") else values)]


def _distinct(values: list[Any], item: Any) -> list[Any]:
    enum = item.get("enum") if isinstance(item, dict) else None
    if enum:
        return list(enum[: len(values)])
    if all(isinstance(value, str) for value in values):
        return [f"{value}{index or ''}" for index, value in enumerate(values)]
    if all(isinstance(value, int | float) for value in values):
        return [value + index for index, value in enumerate(values)]
    return values


def _number(schema: dict[str, Any], *, whole: bool) -> float:
    step = schema.get("multipleOf") or (1 if whole else 0)
    low = schema.get("minimum")
    high = schema.get("maximum")
    if isinstance(schema.get("exclusiveMinimum"), int | float):
        low = schema["exclusiveMinimum"] + (step or 0.5)
    if isinstance(schema.get("exclusiveMaximum"), int | float):
        high = schema["exclusiveMaximum"] - (step or 0.5)
    value: float = 1
    if low is not None and value < low:
        value = low
    if high is not None and value > high:
        value = high
    if step:
        value = (
            math.ceil(value / step) if high is None or math.ceil(value / step) * step <= high else value // step
        ) * step
    return int(value) if whole else value


def _string(schema: dict[str, Any]) -> str:
    if "pattern" in schema:
        text = matching(str(schema["pattern"]))
        if text is not None:
            return text
    text = _FORMATS.get(str(schema.get("format")), "example")
    least = min(int(schema.get("minLength", 0)), _LONGEST)
    text += "x" * (least - len(text))
    return text[: int(schema["maxLength"])] if "maxLength" in schema else text


def matching(pattern: str) -> str | None:
    """A string that matches a simple regular expression (no nested groups, no look-around), else None."""
    with contextlib.suppress(re.error):
        for part in (pattern.split("|", 1)[0], pattern):
            text = "".join(_piece(piece, count) for piece, count in _ATOM.findall(part))
            if re.search(pattern, text):
                return text
    return None


def _piece(atom: str, count: str) -> str:
    times = {"": 1, "*": 0, "?": 0, "+": 1}.get(count)
    if times is None:
        times = int(count.strip("{}").split(",")[0])
    return _one(atom) * times


def _one(atom: str) -> str:
    if atom in {"^", "$"}:
        return ""
    if atom == ".":
        return "a"
    if atom.startswith("\\"):
        return _CLASSES.get(atom[1], atom[1])
    if atom.startswith("("):
        inner = atom[1:-1].removeprefix("?:").split("|")[0]
        return "".join(_piece(part, count) for part, count in _ATOM.findall(inner))
    if atom.startswith("["):
        return _member(atom[1:-1])
    return atom


def _member(members: str) -> str:
    if members.startswith("^"):
        return next(char for char in "a1-_ " if not re.fullmatch(f"[{members[1:]}]", char))
    return _one(members[:2]) if members.startswith("\\") else members[:1]
