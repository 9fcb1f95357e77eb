"""What pydantic finds wrong in a file, as one line: the place, the value, what is meant there."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_growth.paths import Step, leads, shown_path

# What a field takes, by the error that says it does not; {} is the error's context.
_MEANT = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
}
_SECTION = ("model_type", "dict_type")
_LONGEST = 60  # of a value that is shown


def explain(
    error: ValidationError, model: type[BaseModel], content: Any, *, extends: bool = False
) -> str:
    """The line.

    Args:
        error: what pydantic says of `content`.
        model: the section that `content` was to be.
        content: what was said.
        extends: whether sections of it may extend files.
    """
    location, found = _closest(error, content)
    where = shown_path(location)
    kinds = [one["type"] for one in found]
    if "extra_forbidden" in kinds:
        known = list(_fields_at(model, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    if "missing" in kinds:
        return f"{where} is missing; give it ({_about(model, location)})"
    if "value_error" in kinds:
        message = found[kinds.index("value_error")]["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    value = found[0]["input"]
    a_file = isinstance(value, str) and value.endswith((".yaml", ".yml"))
    if extends and a_file and not {*kinds}.isdisjoint(_SECTION):
        key = "" if isinstance(location[-1], int) else f"{location[-1]}: "
        return (
            f"{where} {value!r}: must be a section; to take that file write "
            f"`{key}{{extends: {value}}}`"
        )
    meant = _meant(found, model, location)
    if value is None:
        return f"{where} is empty; give {meant} ({_about(model, location)})"
    shown = "" if isinstance(value, dict) else f" {_shown(value)}"
    return f"{where}{shown}: must be {meant}; {_meaning(model, location)}"


def place(error: ValidationError, content: Any) -> tuple[Step, ...]:
    """Where the mistake is that `explain` explains."""
    return _closest(error, content)[0]


def _closest(error: ValidationError, content: Any) -> tuple[tuple[Step, ...], list[ErrorDetails]]:
    """Of a union's members, those that the value came closest to fitting speak: the deepest
    errors. An unknown key comes before them all."""
    placed = [(_place(one, content), one) for one in error.errors()]
    location, _ = max(placed, key=lambda p: (p[1]["type"] == "extra_forbidden", len(p[0])))
    return location, [one for at, one in placed if at == location]


def _place(error: ErrorDetails, content: Any) -> tuple[Step, ...]:
    """An error's location without what pydantic puts into it besides: the tried member of a union,
    `[key]` after a key that is itself at fault."""
    steps: list[Step] = []
    at = content
    for step in error["loc"]:
        if leads(at, step):
            steps.append(step)
            at = at[step]
    if error["type"] == "missing":
        steps.append(error["loc"][-1])
    return tuple(steps)


def _meant(
    found: Sequence[ErrorDetails], model: type[BaseModel], location: tuple[Step, ...]
) -> str:
    """What fits there, in words."""
    finite = [one for one in found if one["type"] == "finite_number"]
    ways = [_way(one, model, location) for one in finite or found]
    *some, last = dict.fromkeys(ways)
    words = f"{', '.join(some)} or {last}" if some else last
    quotable = "text" in ways and isinstance(found[0]["input"], int | float)
    return f"{words} (text in quotes)" if quotable else words


def _way(error: ErrorDetails, model: type[BaseModel], location: tuple[Step, ...]) -> str:
    way = _MEANT.get(error["type"])
    if way is None:
        return error["msg"].removeprefix("Input should be ")
    if error["type"] in _SECTION:
        keys = list(_fields_at(model, location))
        return f"{way} with keys such as {', '.join(keys[:4])}" if keys else way
    limits = error.get("ctx", {}).items()
    return way.format(**{k: f"{v:g}" if isinstance(v, float) else v for k, v in limits})


def _shown(value: Any) -> str:
    """As YAML says it, if it is short."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _meaning(model: type[BaseModel], location: tuple[Step, ...]) -> str:
    """What a field's documentation says, after the field's name."""
    while location:
        *above, name = location
        field = _fields_at(model, tuple(above)).get(str(name))
        if field is not None:
            return f"{name}: {_line(field)}"
        location = tuple(above)  # an entry of a list or of a free mapping: its field speaks
    return ""


def _about(model: type[BaseModel], location: tuple[Step, ...]) -> str:
    return _meaning(model, location).partition(": ")[2].rstrip(".")


def _line(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _fields_at(model: type[BaseModel], location: Iterable[Step]) -> dict[str, FieldInfo]:
    """The fields, by the key they have in YAML, of the section at `location`; none where it is no
    section."""
    for part in location:
        if isinstance(part, int):
            continue  # a list's sections are found by the list's own key
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        section = field and _section(field.annotation)
        if not section:
            return {}
        model = section
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: itself, a union's member, a list's entry."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = getattr(annotation, "__args__", ())
    return next((found for found in map(_section, members) if found), None)
