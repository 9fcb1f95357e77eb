"""`--set a.b[0].c=value`: one way to change any value of a YAML file from the command line.

A path names keys and, in brackets, places in lists, counted from 0 or, below 0, from the end. The
value is YAML: `3`, `0.5`, `true`, `null`, `[1, 2]`, `{factor: 2}`. What the keys mean is not known
here; an unknown one is refused where the file is validated, as it would be in the file itself.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

from megatron_growth.errors import ConfigError
from megatron_growth.paths import Step, shown_path
from megatron_growth.yaml_text import read_yaml

# stages[1] -> the key `stages`, the places `[1]`
_PART = re.compile(r"(?P<key>[^.\[\]=\s]+)(?P<places>(\[-?\d+\])*)")


def overridden(content: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` with each of the settings, `PATH=VALUE`, made in turn.

    Raises:
        ConfigError: a setting that is not one, or a path that leads nowhere.
    """
    content = copy.deepcopy(content)
    for setting in settings:
        path, value = _read(setting)
        _put(content, path, value, setting)
    return content


def sets(settings: Sequence[str], place: Sequence[Step]) -> bool:
    """Whether one of the settings says what stands at a place."""
    paths = [_read(setting)[0] for setting in settings]
    return any(_same(path, place[: len(path)]) for path in paths)


def _same(path: Sequence[Step], place: Sequence[Step]) -> bool:
    """Places from the end of a list may be any in it."""
    return len(path) == len(place) and all(
        a == b or (isinstance(a, int) and a < 0) for a, b in zip(path, place, strict=True)
    )


def _read(setting: str) -> tuple[list[Step], Any]:
    text, equals, value = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting!r} has no `=`; write PATH=VALUE, as in growth.seed=7")
    return _steps(text.strip(), setting), read_yaml(
        value, f"--set {setting!r}: the value {value!r}"
    )


def _steps(text: str, setting: str) -> list[Step]:
    steps: list[Step] = []
    for part in text.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"--set {setting!r}: {text!r} is no path; write keys with dots between them and "
                "places in lists in brackets, as in stages[1].growth.width.factor"
            )
        steps.append(match["key"])
        steps += map(int, re.findall(r"-?\d+", match["places"]))
    return steps


def _put(content: dict[str, Any], path: list[Step], value: Any, setting: str) -> None:
    """Sections on the way that are missing, or null, are made; entries of lists are not."""
    at: Any = content
    for done, (step, following) in enumerate(zip(path, [*path[1:], None], strict=True)):
        _check(at, step, path[:done], setting)
        if following is None:
            at[step] = value
            return
        if isinstance(step, str) and at.get(step) is None:
            at[step] = [] if isinstance(following, int) else {}
        at = at[step]


def _check(at: Any, step: Step, done: list[Step], setting: str) -> None:
    where = shown_path(done) or "the file"
    if isinstance(step, str) and not isinstance(at, dict):
        raise ConfigError(
            f"--set {setting!r}: {where} is {_kind(at)}, which has no key {step!r}; "
            + ("give a place in brackets" if isinstance(at, list) else f"set {where} as a whole")
        )
    if isinstance(step, int) and not isinstance(at, list):
        raise ConfigError(f"--set {setting!r}: {where} is {_kind(at)}, no list; leave out [{step}]")
    if isinstance(step, int) and not -len(at) <= step < len(at):
        raise ConfigError(
            f"--set {setting!r}: {where} has {len(at)} entries, so there is no [{step}]; "
            "a setting changes entries and adds none"
        )


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)
