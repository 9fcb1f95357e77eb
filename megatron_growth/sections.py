"""What all sections of files that users write have in common."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema


class Strict(BaseModel):
    """A section of a file of ours: frozen, no unknown keys, each field documented below it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1; an empty path is the directory that one stands in."""
        for where, entry in [] if isinstance(value, dict) else _entries(value):
            if entry == "":
                raise ValueError(f"{where}is an empty text; say something, or leave it out")
            if isinstance(entry, str) and "\0" in entry:
                raise ValueError(f"{where}{entry!r} has a character 0 in it; take it out")
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _names(annotation, int, float) and not _names(annotation, bool):
            for where, entry in _entries(value):
                if isinstance(entry, bool):
                    raise ValueError(
                        f"{where}{str(entry).lower()} is no number; write one, or text in quotes"
                    )
        return value


def _names(annotation: Any, *kinds: type) -> bool:
    """Whether a field's type has one of these in it."""
    return annotation in kinds or any(_names(part, *kinds) for part in get_args(annotation))


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"[{index}] ", entry) for index, entry in enumerate(value)]
    if isinstance(value, dict):
        return [(f"{key} ", entry) for key, entry in value.items()]
    return [("", value)]


@dataclass(frozen=True)
class Written:
    """Text of a pattern; a refusal says it in words, with an example."""

    pattern: str
    meant: str
    longest: int | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        longest = {} if self.longest is None else {"maxLength": self.longest}
        return {**handler(schema), "pattern": f"^{self.pattern}$", **longest}

    def _checked(self, value: str) -> str:
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f"{value!r} is of another form; write {self.meant}")
        if self.longest is not None and len(value) > self.longest:
            raise ValueError(f"has {len(value)} characters; {self.longest} at most")
        return value


Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
