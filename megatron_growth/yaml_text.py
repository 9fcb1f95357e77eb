"""YAML as people write it in configurations; what would silently mean something else is refused.

YAML takes the last of two equal keys, and reads 010 as 8, 1:30 as 90 and 1_0 as 10.
"""

import re
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"
# An octal, sexagesimal or grouped number: 010, 1:30, 1:30.5, 1_000
_DISGUISED = re.compile(
    r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9]+(_[0-9]+)+(\.[0-9_]*)?)"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"key {key.value!r} stands in line {lines[name]} and again in line {line}; "
                    "keep one"
                )
            lines[name] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(_plain(node, super().construct_yaml_int(node)))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return _plain(node, super().construct_yaml_float(node))


def _plain(node: yaml.ScalarNode, number: float) -> float:
    if _DISGUISED.fullmatch(node.value):
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: YAML reads {node.value} as {number}; write "
            f"{number}, or '{node.value}' if a word is meant"
        )
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or not what it looks like.
    """
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # of 2026-13-45, say
        raise yaml.YAMLError(f"{error}; put a word that is no date or number in quotes") from None
    except RecursionError:
        raise yaml.YAMLError("an alias stands inside what it means") from None
