"""The files a user writes as JSON schemas, for editors to complete and check while one writes.

Looser than what is loaded. Any section of an experiment may extend a file, a stage has its defaults
and what is extended need not be whole, so no field is required there. A growth file extends
nothing, and is whole.
"""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from megatron_growth.config import GrowthFile
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.cluster import Cluster
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.stage import Stage

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_EXTENDS = {
    "type": "string",
    "description": "A YAML file, relative to this one, that this section is laid over.",
}
# `moe_layer_freq` as Megatron's command line has it: [0]*3+[1]*58. Loading writes it out.
_PATTERN_OF_LAYERS = {"type": "string", "pattern": r"^[\s\d\[\]*+]+$"}


class Kind(StrEnum):
    """What a file is."""

    EXPERIMENT = "experiment"
    GROWTH = "growth"
    CLUSTER = "cluster"
    MODEL = "model"
    STAGE = "stage"


_MODELS: dict[Kind, type[BaseModel]] = {
    Kind.EXPERIMENT: Experiment,
    Kind.GROWTH: GrowthFile,
    Kind.CLUSTER: Cluster,
    Kind.MODEL: Geometry,
    Kind.STAGE: Stage,
}


def json_schema(kind: Kind) -> dict[str, Any]:
    """The schema of files of a kind."""
    schema = {"$schema": _DRAFT, **_MODELS[kind].model_json_schema()}
    if kind is Kind.GROWTH:
        return schema
    if kind is Kind.EXPERIMENT:
        schema["properties"]["defaults"] = {
            "$ref": f"#/$defs/{Stage.__name__}",
            "description": "Fields of a stage, laid under every stage.",
        }
    for section in (schema, *schema.get("$defs", {}).values()):
        _loosen(section)
    return schema


def _loosen(section: dict[str, Any]) -> None:
    section.pop("required", None)
    properties = section["properties"] = {"extends": _EXTENDS, **section.get("properties", {})}
    if section["title"] == Geometry.__name__:
        properties["moe_layer_freq"]["anyOf"].append(_PATTERN_OF_LAYERS)
