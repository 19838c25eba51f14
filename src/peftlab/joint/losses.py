"""Each run's own loss in one pass over the rows of all: what the labelled rows of each lose, summed apart."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from peftlab.batches import IGNORED
from peftlab.errors import ModelError
from peftlab.joint.shares import Batch, Shares, without_labels
from peftlab.method import Head
from peftlab.objective import CrossEntropy, LabelledLoss, labelled_loss


def joint_loss(model: nn.Module, head: Head) -> LabelledLosses:
    """The loss of each run in a joint batch.

    Args:
        model: The model with the adapters.
        head: What it ends in.

    Returns:
        The loss; `training` tries it before the first step.

    Raises:
        ModelError: The model does not tell what the loss is computed from.
    """
    found = labelled_loss(model, head=head)
    if isinstance(found, str):
        raise ModelError(f"these runs cannot share a pass: {found}")
    return LabelledLosses(head, found.output, decoder_inputs=found.decoder_inputs)


class LabelledLosses(LabelledLoss):
    """Cross entropy at the labelled rows of each run: one product of the head for all."""

    def totals(self, model: nn.Module, batch: Batch, shares: Shares) -> list[torch.Tensor]:
        """The sum of each run's loss terms.

        Args:
            model: The model.
            batch: A joint batch.
            shares: Which part of it is whose.

        Returns:
            One scalar for each run, with its graph, in float32 or wider.

        Raises:
            ModelError: The logits are not those of the labelled rows.
        """
        labels, inputs = batch["labels"], without_labels(batch)
        wanted = labels != IGNORED
        if self.head == "causal":  # row t predicts token t + 1
            wanted = F.pad(wanted[:, 1:], (0, 1))
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        elif self.decoder_inputs is not None:
            inputs["decoder_input_ids"] = self.decoder_inputs(labels)
        rows = self.choose(wanted.flatten())
        with self._only(rows, wanted.shape):
            logits = model(**inputs, use_cache=False).logits
        if logits.shape[:-1] != rows.shape:
            raise ModelError(f"the head gave logits of shape {tuple(logits.shape)} for {len(rows)} rows")
        parts = torch.split(wanted, list(shares.tokens or shares.rows), 1 if shares.tokens else 0)
        counts = [int(part.sum()) for part in parts]
        terms = torch.split(labels.flatten().index_select(0, rows), counts)
        found = torch.split(logits, counts)
        return [
            CrossEntropy.apply(piece, own)  # type: ignore[no-untyped-call]
            for piece, own in zip(found, terms, strict=True)
        ]
