"""BitFit: the biases that a base has train in place, and nothing else.

Of every h = W x + b the b, those of layer norms among them; W stays. `norm_gains` adds the g of LN(x) = g * (x - mu) / sigma
+ b. A model without biases (Llama, T5) is refused. The originals are kept in host memory; bfloat16 and float16 are refused,
for their steps round to nothing: set model.dtype=float32. A folder holds the trained tensors alone.

Source: Ben Zaken et al. 2022, arXiv 2106.10199, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 1.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(_Settings):
    """What can be set on BitFit."""

    norm_gains: bool = False
    """Whether the gains of the norms train too."""


def trains_the_base(settings: Mapping[str, Any]) -> bool:
    """It trains biases of the base in place, which half precision would round away.

    Args:
        settings: The method's settings as a config has them; whatever they are.
    """
    return True


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Have a base's biases train.

    Args:
        model: The base; its biases change in place, and come back when the method is removed.
        family: The map of the base.
        settings: Whether gains train too.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Unused: nothing is drawn.

    Returns:
        The attachment.

    Raises:
        MethodError: The base has no biases, or is not of float32 or wider.
    """
    from peftlab.attaching.rewriting import RewrittenAttachment, bias_names, gain_names, names_below
    from peftlab.attaching.targeting import new_modules
    from peftlab.errors import MethodError

    new = set(names_below(model, new_modules(model, head)))
    biases = set(bias_names(model))
    if not biases - new:
        raise MethodError(
            f"bitfit trains biases, and this {family.model_type} model has none; method peft with type ln_tuning trains"
            " the gains of its norms, and ia3 and lora suit it too"
        )
    gains = set(gain_names(model, family)) if settings.norm_gains else set()
    return RewrittenAttachment(model, family, biases | gains | new, method="bitfit", whole=False)
