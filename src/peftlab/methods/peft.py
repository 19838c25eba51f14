"""Every other type of peft by its own config: loha, boft, vera, oft, hra, fourierft, ln_tuning and the rest.

What is computed is the type's own; peft says it, and the papers, in its documentation. Which types work, and why the others
do not, is shown on a tiny Llama by the conformance suite.

Source: peft 0.21, `peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING`; HiRA, the default: Huang et al. 2025 (ICLR), W0 * (B A) with
B zero at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head


class Settings(_Settings):
    """What can be set on a type of peft."""

    type: str = "hira"
    """The type, by peft's own name; what is a method here is not among them."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the type's config in peft, e.g. r; the others have peft's values."""
    targets: str | tuple[str, ...] | None = None
    """What is adapted, as in LoRA; None is 'both', or the type's own place where it has one: norms, a prompt."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if targets is not None and (not targets or not all(targets)):
            raise ValueError("at least one target is needed")
        return targets

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the type takes from the text."""
        return int(self.config.get("num_virtual_tokens") or 0)


def trains_the_base(settings: Mapping[str, Any]) -> bool:
    """Some types of peft train tensors of the base in place; which, nobody tells.

    Args:
        settings: The method's settings as a config has them; whatever they are.
    """
    return True


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add an adapter of a type of peft to a base.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: The type, its config, and targets.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds the adapter's initial values.

    Returns:
        The attachment; whether the model still answers as the base does at the start is the type's affair.

    Raises:
        UnknownNameError: peft has no such type.
        ConfigError: The type's config has no such field, or the field is set by peftlab.
        MethodError: The type does not work here, or not on this base; the base is as it was.
        TargetError: The targets match nothing in this model.
    """
    from peftlab.attaching.peft_types import attach_type

    return attach_type(
        model, family, settings.type, config=settings.config, targets=settings.targets, head=head, seed=seed
    )
