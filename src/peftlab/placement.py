"""Where new blocks stand in a model and how they start: the settings that `new_layer` and `hybrid` share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from peftlab.settings import Settings

SMALL_SCALE = 0.01
"""What "scale" multiplies by unless told otherwise (the model extensions' `layer_initialization_scale`)."""


class Placement(Settings):
    """What can be set on new blocks."""

    stack: str | None = None
    """encoder, decoder or both; None is the only stack, or the encoder of an encoder-decoder."""
    position: int | str = "end"
    """end, start, or the index at which the first new block stands afterwards."""
    count: int = Field(default=1, ge=1)
    """How many blocks, one behind the other, in each stack."""
    initialization: Literal["copy", "scale", "random"] = "copy"
    """copy: the neighbouring block, made the identity; random: fresh weights, made the identity; scale: the neighbouring
    block with its output projections (or its gate) at `scale`, nearly the identity."""
    scale: float | None = Field(default=None, gt=0, le=1)
    """The factor of initialization=scale; None is 0.01."""

    @field_validator("position")
    @classmethod
    def _is_a_place(cls, position: int | str) -> int | str:
        if isinstance(position, bool) or (isinstance(position, str) and position not in ("start", "end")):
            raise ValueError("must be start, end or an index from 0")
        if isinstance(position, int) and position < 0:
            raise ValueError("an index counts from 0; the last place is called end")
        return position

    @model_validator(mode="after")
    def _has_effect(self) -> Placement:
        if self.scale is not None and self.initialization != "scale":
            raise ValueError(f"scale has no effect with initialization={self.initialization}")
        return self
