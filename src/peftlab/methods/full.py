"""Full fine-tuning: the base's own tensors train in place; removal gives back the originals, bit for bit.

theta' = theta - eta * g, for every tensor of the base, or for those of some targets or of the last layers. The originals
are kept in host memory: once more what trains. bfloat16 and float16 are refused, for their steps round to nothing: set
model.dtype=float32. The whole model is saved, as transformers saves it.

Source: what adapters are compared with, Hu et al. 2021, arXiv 2106.09685, section 5.1 (its "FT", and "FT-Top2" for the
last two layers alone).
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

RATE_TO_LORA = 0.1
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on full fine-tuning."""

    targets: str | tuple[str, ...] | None = None
    """What trains, weights and biases, as in LoRA; None is every tensor: norms, embeddings and head too."""
    num_layers: int | None = Field(default=None, ge=1)
    """Only the last so many layers of each stack, and nothing outside the stacks; None is no such limit."""
    embeddings: bool | None = None
    """Whether embeddings train; None is yes where everything does, and where targets are 'all'."""
    head: bool | None = None
    """Whether the head trains; None as for embeddings. A new classification head always does."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if targets is not None and (not targets or not all(targets)):
            raise ValueError("at least one target is needed")
        return targets


def trains_the_base(settings: Mapping[str, Any]) -> bool:
    """It trains tensors of the base in place, which half precision would round away.

    Args:
        settings: The method's settings as a config has them; whatever they are.
    """
    return True


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Have a base's own tensors train.

    Args:
        model: The base; its tensors change in place, and come back when the method is removed.
        family: The map of the base.
        settings: What trains.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Unused: nothing is drawn.

    Returns:
        The attachment.

    Raises:
        MethodError: The base is not of float32 or wider, or what shall train contradicts itself.
        TargetError: The targets match nothing in this model.
    """
    from peftlab.attaching.rewriting import RewrittenAttachment

    return RewrittenAttachment(
        model, family, _chosen(model, family, settings, head), method="full", whole=True
    )


def _chosen(model: nn.Module, family: FamilyMap, settings: Settings, head: Head) -> set[str]:
    """The names of the parameters that train.

    Raises:
        MethodError: A tensor shall train and shall not: a tied head is the embedding, a new classification head trains.
    """
    from peftlab.attaching.rewriting import names_below, names_in_last_layers
    from peftlab.attaching.targeting import new_modules
    from peftlab.errors import MethodError

    chosen = {name for name, _ in model.named_parameters()}
    if settings.targets is not None:
        selection = family.select(settings.targets)
        chosen = set(names_below(model, [s.path for s in (*selection.adapted, *selection.saved)]))
    if settings.num_layers is not None:
        chosen &= set(names_in_last_layers(model, family, settings.num_layers))
    named = {
        "embeddings": names_below(model, [s.path for s in family.sites if s.group == "embed"]),
        "head": names_below(model, [s.path for s in family.sites if s.role == "head"]),
    }
    on = set(names_below(model, new_modules(model, head)))
    off: set[str] = set()
    for setting, names in named.items():
        if getattr(settings, setting) is not None:
            (on if getattr(settings, setting) else off).update(names)
    if on & off:
        raise MethodError(
            f"full: '{min(on & off)}' shall train and shall not: embeddings={settings.embeddings},"
            f" head={settings.head}; a tied head is the embedding, and a new classification head always trains"
        )
    return (chosen | on) - off
