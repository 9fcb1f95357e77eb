"""`--set`: what it changes, and one line for each mistake."""

import pytest

from megatron_growth.errors import ConfigError
from megatron_growth.overrides import overridden

CONTENT = {"growth": {"depth": {"factor": 2}, "width": None}, "stages": [{"name": "a"}, {}]}


@pytest.mark.parametrize(
    ("setting", "leads", "to"),
    [
        ("growth.depth.factor=3", ("growth", "depth", "factor"), 3),
        ("growth.depth.factor=null", ("growth", "depth", "factor"), None),
        ("growth.width.noise.router=0.5", ("growth", "width", "noise", "router"), 0.5),
        ("growth={depth: {}}", ("growth",), {"depth": {}}),
        ("stages[1].budget.tokens=6.0e+9", ("stages", 1, "budget", "tokens"), 6.0e9),
        ("stages[-1].name=last", ("stages", 1, "name"), "last"),
        ("stages[0]={name: b}", ("stages", 0), {"name": "b"}),
        ("new.section.here=[1, 2]", ("new", "section", "here"), [1, 2]),
        ("name=a=b", ("name",), "a=b"),
        ("model.megatron.rotary-base=10000", ("model", "megatron", "rotary-base"), 10000),
    ],
)
def test_a_setting_puts_a_yaml_value_where_its_path_leads(setting, leads, to):
    at = overridden(CONTENT, [setting])
    for step in leads:
        at = at[step]
    assert at == to


def test_the_content_is_left_as_it_was_and_later_settings_win():
    result = overridden(CONTENT, ["growth.depth.factor=3", "growth.depth.factor=4"])
    assert result["growth"]["depth"]["factor"] == 4
    assert CONTENT["growth"]["depth"] == {"factor": 2}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("growth.seed", "has no `=`; write PATH=VALUE"),
        ("=3", "'' is no path"),
        ("growth..seed=3", "'growth..seed' is no path"),
        ("stages[x].name=3", "is no path"),
        ("growth.seed=[1", "the value '[1' is not YAML"),
        ("stages.name=3", "stages is a list, which has no key 'name'; give a place in brackets"),
        ("growth[0]=3", "growth is a mapping, no list; leave out [0]"),
        ("stages[2].name=3", "stages has 2 entries, so there is no [2]"),
        ("growth.depth.factor.more=3", "growth.depth.factor is 2, which has no key 'more'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_path(setting, says):
    with pytest.raises(ConfigError) as refusal:
        overridden(CONTENT, [setting])
    message = str(refusal.value)
    assert message.startswith(f"--set {setting!r}")
    assert says in message
    assert "\n" not in message
