"""The base of every file format here: frozen, strict about its keys, and plain about what is wrong."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Part of a file. Unknown keys are errors; nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def to_json(self) -> str:
        """As JSON text, keys in the order of the class, with a newline at the end."""
        return f"{self.model_dump_json(indent=2, by_alias=True)}\n"


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, as `key.of.the.field: what is wrong`."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    return f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
