"""Declared exceptions from the checks of validation, each with its reason."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class WaiverKind(StrEnum):
    """What a waiver excuses.

    unused         a parameter that the loss never reads
    frozen         a parameter with requires_grad=False
    surrogate      a straight-through or otherwise deliberately replaced gradient
    stop_gradient  a deliberate detach
    mode           a module kept in another train/eval mode than the model (names a module)
    rows           rows that interact, or a first axis that is not the batch (names a module)
    hook           a parameter whose gradient or update a hook or a special optimiser changes
    copy           two parameters that start with equal values
    """

    UNUSED = "unused"
    FROZEN = "frozen"
    SURROGATE = "surrogate"
    STOP_GRADIENT = "stop_gradient"
    MODE = "mode"
    ROWS = "rows"
    HOOK = "hook"
    COPY = "copy"


class Waiver(BaseModel):
    """A declared exception; one that no longer excuses anything fails the report.

    `tensor` is a parameter name or a glob over names; a glob must excuse every tensor it matches.
    The kinds `mode` and `rows` name module paths instead ('*' also stands for the model itself).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str = Field(min_length=1)
    kind: WaiverKind
    reason: str = Field(min_length=1)
