"""What is minimised: one function from a model and a batch to a loss, normalised by the labels of the whole step.

`ModelLoss` asks the model itself. A faster objective is another object with the same two methods.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from peftlab.batches import IGNORED
from peftlab.method import Head


class Objective(Protocol):
    """The interface between the trainer and a loss."""

    def count(self, batch: dict[str, Any]) -> int:
        """How many terms the batch's loss is a sum of."""
        ...

    def total(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the batch's loss terms, in float32 or wider; divided by the step's count it is the loss."""
        ...


class ModelLoss:
    """The model's own loss, for causal, seq2seq and classification models.

    Args:
        head: What the model ends in.
    """

    def __init__(self, head: Head) -> None:
        self.head = head

    def count(self, batch: dict[str, Any]) -> int:
        """How many terms the batch's loss is a sum of.

        Args:
            batch: A batch on any device.

        Returns:
            Labelled tokens that are predicted (a causal model never predicts its first), or rows for classification.
        """
        labels = batch["labels"]
        if self.head == "classification":
            return int(labels.shape[0])
        predicted = labels[:, 1:] if self.head == "causal" else labels
        return int((predicted != IGNORED).sum())

    def total(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the batch's loss terms.

        Args:
            model: The model, in its training or evaluation mode.
            batch: input_ids and attention_mask (batch, seq), labels.

        Returns:
            A scalar with its graph.
        """
        # every loss function of transformers is a mean over the same terms that `count` counts
        keep_no_cache = {} if self.head == "classification" else {"use_cache": False}
        if self.head == "causal":  # behind virtual tokens the first would be predicted too
            batch = batch | {"labels": torch.cat([_unlabelled(batch), batch["labels"][:, 1:]], dim=1)}
        loss: torch.Tensor = model(**batch, **keep_no_cache).loss
        return (loss if loss.dtype == torch.float64 else loss.float()) * self.count(batch)


def _unlabelled(batch: dict[str, Any]) -> torch.Tensor:
    """A first column without labels, (batch, 1)."""
    return torch.full_like(batch["labels"][:, :1], IGNORED)
