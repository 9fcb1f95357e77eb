"""YAML as people write it in configurations; what would silently mean something else is refused.

YAML takes the last of two equal keys, and reads 010 as 8, 1:30 as 90 and 1_0 as 10.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"
# An octal, sexagesimal or grouped number: 010, 1:30, 1_000
_DISGUISED = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+|[0-9]+(_[0-9]+)+)")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
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
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if _DISGUISED.fullmatch(node.value):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: YAML reads {node.value} as {number}; write "
                f"{number}, or '{node.value}' if a word is meant"
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or not what it looks like.
    """
    return yaml.load(text, _Loader)
