"""What a foreign adapter says about itself, and what that means in the words of a method here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.family import FamilyMap
from peftlab.method import Head

PREFIX = "base_model.model."
"""What peft writes in front of a tensor's name in the base."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A foreign adapter in the words of a method here.

    Attributes:
        method: The method.
        settings: Its settings.
        tensors: The adapter's tensors by peft's names in files.
        notes: What a person should know: what was left out because it has no effect, what is held otherwise.
        scaling: Path of an adapted module to the factor of its update; empty where the method has none.
        rank_pattern: Which of AdaLoRA's ranks stand, by name in peft; empty where all do.
    """

    method: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()
    scaling: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Foreign:
    """An adapter as somebody else's file has it.

    Attributes:
        form: What the file is, e.g. "a peft folder".
        path: Where it lies.
        tensors: Its tensors by peft's names in files.
        head: What the model ends in that it was trained on; None where the file does not say.
        base: The base's name as the file has it, "" where it does not say.
        translate: Makes the translation for a live base and its map.
    """

    form: str
    path: Path
    tensors: Mapping[str, torch.Tensor]
    head: Head | None
    base: str
    translate: Callable[[nn.Module, FamilyMap], Translation]
