"""The experiment file as a JSON schema, for editors to complete and check while one writes.

Looser than what is loaded: any section may extend a file, and a stage has its defaults, so that no
field is required where it stands.
"""

from typing import Any

from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.stage import Stage

_EXTENDS = {
    "type": "string",
    "description": "A YAML file, relative to this one, that this section is laid over.",
}


def experiment_schema() -> dict[str, Any]:
    """The schema."""
    schema = Experiment.model_json_schema()
    schema["properties"]["defaults"] = {
        "$ref": f"#/$defs/{Stage.__name__}",
        "description": "Fields of a stage, laid under every stage.",
    }
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
        section["properties"] = {"extends": _EXTENDS, **section.get("properties", {})}
    return schema
