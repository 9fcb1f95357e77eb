"""The schemas for editors take every file of ours as it is written, and refuse a mistake in it."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_growth import cli
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.json_schema import Kind, json_schema
from megatron_growth.launcher.stage import Budget
from tests.launcher.experiments import CONTENT

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
FOLDERS = {
    Kind.EXPERIMENT: "experiments",
    Kind.GROWTH: ".",
    Kind.CLUSTER: "clusters",
    Kind.MODEL: "models",
    Kind.STAGE: "stages",
}
SHIPPED = [
    pytest.param(kind, path, id=f"{kind}-{path.stem}")
    for kind, folder in FOLDERS.items()
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
]
# A key of the file misspelt, and one of a section in it.
MISTAKES = {
    Kind.EXPERIMENT: [{"stage": []}, {"defaults": {"nods": 2}}, {"cluster": {"devise": "cpu"}}],
    Kind.GROWTH: [{"optimiser": "copy"}, {"growth": {"depth": {"factr": 2}}}],
    Kind.CLUSTER: [{"devise": "cpu"}, {"slurm": {"acount": "llm"}}],
    Kind.MODEL: [{"num_layer": 4}],
    Kind.STAGE: [{"save_intervall": 5}, {"layout": {"pipelines": 2}}],
}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_file_of_ours_is_looked_at():
    assert len(SHIPPED) == len(list(CONFIGS.rglob("*.yaml"))) > 15


@pytest.mark.parametrize("kind", Kind)
def test_it_is_a_schema(kind):
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))


@pytest.mark.parametrize(("kind", "path"), SHIPPED)
def test_a_file_of_ours_is_taken_as_it_is_written(kind, path):
    jsonschema.validate(read(path), json_schema(kind))


@pytest.mark.parametrize(
    ("kind", "mistake"), [(kind, one) for kind, several in MISTAKES.items() for one in several]
)
def test_a_misspelt_key_is_refused(kind, mistake):
    path = sorted((CONFIGS / FOLDERS[kind]).glob("*.yaml"))[0]
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(read(path) | mistake, json_schema(kind))


def test_a_stage_of_an_experiment_is_looked_at():
    jsonschema.validate(CONTENT, json_schema(Kind.EXPERIMENT))
    wrong = copy.deepcopy(CONTENT)
    wrong["stages"][1]["growth"] = {"depth": {"factr": 2}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, json_schema(Kind.EXPERIMENT))


@pytest.mark.parametrize("kind", Kind)
def test_a_file_extends_another_where_loading_allows_it(kind):
    schema, content = json_schema(kind), {"extends": "other.yaml"}
    if kind is not Kind.GROWTH:
        jsonschema.validate(content, schema)
        return
    for wrong in (content, {"growth": {"depth": content}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("pattern", ["[0]*1+[1]*3", "[ 0 ] * 1 + [1]*3", [0, 1, 1, 1], 2])
def test_layers_are_written_in_any_way_that_loads(pattern):
    shape = {**CONTENT["model"], "ffn_hidden_size": 64, "moe_layer_freq": pattern}
    assert Geometry.model_validate(shape).num_layers == 4
    jsonschema.validate(shape, json_schema(Kind.MODEL))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(shape | {"moe_layer_freq": "every other"}, json_schema(Kind.MODEL))


@pytest.mark.parametrize("tokens", ["600.0e+9", "600.0e9"])
def test_a_large_number_loads_with_and_without_the_sign_of_its_exponent(tokens):
    assert Budget.model_validate(yaml.safe_load(f"tokens: {tokens}")).tokens == 6e11


def test_files_in_the_documentation_are_taken():
    found = []
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for block in re.findall(
            r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL
        ):
            content = yaml.safe_load(block)
            if "stages" in content or "growth" in content:
                kind = Kind.EXPERIMENT if "stages" in content else Kind.GROWTH
                jsonschema.validate(content, json_schema(kind))
                found.append(kind)
    assert set(found) == {Kind.EXPERIMENT, Kind.GROWTH}


def test_the_command_prints_it(capsys):
    for words, kind in (
        (["schema"], Kind.EXPERIMENT),
        (["schema", "--of", "cluster"], Kind.CLUSTER),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert not stop.value.code
        assert json.loads(capsys.readouterr().out) == json_schema(kind)
