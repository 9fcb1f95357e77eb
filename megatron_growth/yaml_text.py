"""YAML that users write, read so that nothing in it is silently something else.

    num_layers: 4
    num_layers: 6     # refused: the last would win
    NCCL_IB_SL: 010   # refused: 8 to YAML
    name: 2026-11-25  # text, and no date

Anchors and merge keys (`<<: *defaults`) work as ever.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from megatron_growth.errors import ConfigError
from megatron_growth.paths import Step, shown_path

_TAG = "tag:yaml.org,2002:"
_KNOWN = [_TAG + kind for kind in ("null", "bool", "int", "float", "str", "merge")]
_MAPPING, _LIST, _INT, _MERGE = (_TAG + kind for kind in ("map", "seq", "int", "merge"))
# 12, -3; not 010, 0x1f, 1:30 or 1_000, which are numbers to YAML and would be written as others
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DIGITS = 300  # more are no number that anything here takes


class _Loader(yaml.SafeLoader):
    """Plain words are null, booleans, numbers or text; dates are text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KNOWN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # what contains itself is refused


def read_yaml(text: str, source: str) -> Any:
    """What a text says.

    Args:
        text: YAML.
        source: where it stands, for errors.

    Raises:
        ConfigError: it is not YAML, or says something that would be taken for something else.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for problem in _problems(node, (), set()):
            raise ConfigError(f"{source}: {problem}")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {_explained(error)}") from None
    except ValueError as error:  # what has a tag that it is not: !!float abc
        raise ConfigError(f"{source} is not YAML: {error}; put that value right") from None
    except RecursionError:
        raise ConfigError(f"{source}: sections in sections without end; flatten it") from None


def _explained(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{str(error).splitlines()[0]}; take that out"
    at = error.problem_mark
    return f"{error.problem} (line {at.line + 1}, column {at.column + 1}); put that place right"


def _problems(node: yaml.Node, path: tuple[Step, ...], seen: set[int]) -> Iterator[str]:
    """What is wrong in a node and below it, each with its place."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
        yield from _in_mapping(node, path, seen)
    elif isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        for index, entry in enumerate(node.value):
            yield from _problems(entry, (*path, index), seen)
    elif node.tag not in _KNOWN:
        yield f"{_at(node, path)} has the tag {node.tag.replace(_TAG, '!!')}; leave it out"
    elif node.tag == _INT and not _DECIMAL.fullmatch(node.value):
        number = yaml.safe_load(node.value)
        yield (
            f"{_at(node, path)}: YAML reads {node.value} as {number}; write {number}, or "
            f"'{node.value}' if text is meant"
        )
    elif node.tag == _INT and len(node.value) > _DIGITS:
        yield f"{_at(node, path)} is a number of {len(node.value)} digits; write a smaller one"


def _in_mapping(node: yaml.MappingNode, path: tuple[Step, ...], seen: set[int]) -> Iterator[str]:
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TAG + "str", _MERGE):
            said = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            yield (
                f"{_at(key, path)} has the key {said}, which YAML does not take for text; give the "
                "name of a field, in quotes if it must be that"
            )
            return
        line = key.start_mark.line + 1
        if key.value in lines:
            yield (
                f"{shown_path((*path, key.value))} stands twice, on lines {lines[key.value]} and "
                f"{line}; keep one"
            )
        lines[key.value] = line
        below = path if key.tag == _MERGE else (*path, key.value)
        yield from _problems(value, below, seen)


def _at(node: yaml.Node, path: tuple[Step, ...]) -> str:
    line = f"line {node.start_mark.line + 1}"
    return f"{shown_path(path)} ({line})" if path else line
