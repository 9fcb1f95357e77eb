"""YAML is read as it looks, or refused with the line."""

import pytest

from megatron_growth.errors import ConfigError
from megatron_growth.yaml_text import read_yaml


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", None),
        ("a: [0, -3]", {"a": [0, -3]}),
        ("a: 2026-11-25", {"a": "2026-11-25"}),
        ("a: 2026-13-45", {"a": "2026-13-45"}),
        ("a: =", {"a": "="}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\ne: *x",
         {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}, "e": {"b": 1, "c": 2}}),
        ("a: {<<: [{b: 1}, {b: 2, c: 3}]}", {"a": {"b": 1, "c": 3}}),
    ],
)  # fmt: skip
def test_what_is_written_is_read(text, says):
    assert read_yaml(text, "FILE") == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("m:\n  a: 4\n  b: 5\n  a: 6", "FILE: m.a stands twice, on lines 2 and 4; keep one"),
        ("m: [{a: 4, a: 4}]", "FILE: m[0].a stands twice, on lines 1 and 1; keep one"),
        ("m: {<<: {a: 1, a: 2}}", "FILE: m.a stands twice"),
        ("m:\n  a: 010",
         "FILE: m.a (line 2): YAML reads 010 as 8; write 8, or '010' if text is meant"),
        ("a: 0x1f", "FILE: a (line 1): YAML reads 0x1f as 31; write 31"),
        ("a: 1_000", "FILE: a (line 1): YAML reads 1_000 as 1000; write 1000"),
        ("1:30", "FILE: line 1: YAML reads 1:30 as 90; write 90"),
        ("a: " + "9" * 5000, "FILE: a (line 1) is a number of 5000 digits; write a smaller one"),
        ("m: {on: 1}", "FILE: m (line 1) has the key on, which YAML does not take for text"),
        ("m: {[a]: 1}", "FILE: m (line 1) has the key a list or a mapping, which"),
        ("a: !!binary aGk=", "FILE: a (line 1) has the tag !!binary; leave it out"),
        ("a: !!float b", "FILE is not YAML: could not convert string to float: 'b'; put"),
        ("&a {b: *a}", "FILE is not YAML: found unconstructable recursive node (line 1, column 1)"),
        ("[" * 5000, "FILE: sections in sections without end; flatten it"),
        ("a: \0", "FILE is not YAML: unacceptable character #x0000"),
        ("---\na: 1\n---\nb: 2", "FILE is not YAML: but found another document (line 3, column 1)"),
    ],
)  # fmt: skip
def test_what_would_be_something_else_is_refused(text, says):
    with pytest.raises(ConfigError) as refusal:
        read_yaml(text, "FILE")
    message = str(refusal.value)
    assert message.startswith(says)
    assert "\n" not in message
