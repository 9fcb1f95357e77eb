"""`extends: FILE` in any section: what the file says, with what stands beside it laid over.

The result no longer knows which file said what. Where something in it is wrong, `origin` walks the
files again and finds the one to change.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_growth.config import read_mapping
from megatron_growth.errors import ConfigError
from megatron_growth.paths import Step, leads, shown_path

EXTENDS = "extends"


def extended(path: Path, needed: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a file with every `extends` in it replaced by what it names.

    Args:
        path: the file; names in it are relative to its directory.
        needed: what an empty file lacks, for the error.
        above: the files that extend this one.

    Raises:
        ConfigError: one of them cannot be read, or extends what it may not.
    """
    if path.resolve() in (file.resolve() for file in above):
        chain = " -> ".join(map(str, (*above, path)))
        raise ConfigError(f"{path}: `extends` goes round in a circle ({chain}); take one out")
    content = _resolved(read_mapping(path, needed), (), path, (*above, path))
    assert isinstance(content, dict)
    return content


def _resolved(
    value: Any, place: tuple[Step, ...], path: Path, above: tuple[Path, ...]
) -> dict[str, Any] | Any:
    if isinstance(value, list):
        return [_resolved(entry, (*place, i), path, above) for i, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    own = {
        key: _resolved(entry, (*place, key), path, above)
        for key, entry in value.items()
        if key != EXTENDS
    }
    if EXTENDS not in value:
        return own
    where = f"{path}: {shown_path((*place, EXTENDS))} {value[EXTENDS]!r}"
    if not isinstance(value[EXTENDS], str):
        raise ConfigError(
            f"{where} is no file; give the path of one, relative to {str(path.parent)!r}"
        )
    file = _named(value, path)
    if not file.is_file():
        raise ConfigError(
            f"{where}: there is no file {str(file)!r}; give the path of one, relative to "
            f"{str(path.parent)!r}"
        )
    return merged(extended(file, "a section", above), own)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: sections are merged, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if isinstance(under, dict) and isinstance(value, dict):
            result[key] = merged(under, value)
        else:
            result[key] = value
    return result


def origin(path: Path, place: Sequence[Step]) -> Path | None:
    """The file that says what stands at a place: this one or one that it extends; None where none
    does."""
    return _origin(read_mapping(path, "a section"), path, tuple(place))


def _origin(value: Any, path: Path, place: tuple[Step, ...]) -> Path | None:
    if not place:
        return path
    step, *rest = place
    found = _origin(value[step], path, tuple(rest)) if leads(value, step) else None
    if found is None and isinstance(value, dict) and EXTENDS in value:
        found = origin(_named(value, path), place)
    return found


def _named(section: Mapping[str, Any], path: Path) -> Path:
    return path.parent / str(section[EXTENDS])
