"""What every section of a recipe is: a pydantic model whose values are checked."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from toolkit.recipe.problems import LARGEST_NUMBER, LARGEST_SEED, TOO_LARGE

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # Python's True is 1, so that `seed: yes` would silently become 1.
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not allowed here")
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise PydanticCustomError(TOO_LARGE, "a number this large counts nothing here")
        return value
