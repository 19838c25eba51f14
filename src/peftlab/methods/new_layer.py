"""New layer: trainable transformer blocks added to a frozen base, the identity at the start.

y = x + f(x), f's output projections at zero (pre-norm), else y = x + g (block(x) - x) with the gate g at zero; each block
is a copy of its neighbour. What a twin of the model shows decides which of the two it is.

Source: block expansion, Wu et al. 2024, LLaMA Pro, arXiv 2401.02415, section 3.2; the gate, Bachlechner et al. 2020, ReZero,
arXiv 2003.04887.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftlab.placement import Placement

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 0.5
"""Where a search for its learning rate begins, as a multiple of LoRA's."""


class Settings(Placement):
    """What can be set on new layers."""


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add new blocks to a base.

    Args:
        model: The base; the blocks are put into it, its own tensors are not changed.
        family: The map of the base.
        settings: Where the blocks stand and how they start.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds fresh weights (initialization=random).

    Returns:
        The attachment; the model still answers as the base does, unless initialization=scale.

    Raises:
        MethodError: There is no such stack or place, the stack is not proved, or it takes no block more.
    """
    from peftlab.attaching.extending import NewLayerAttachment

    return NewLayerAttachment(model, family, settings, head=head, seed=seed)
