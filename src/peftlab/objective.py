"""What is minimised: one function from a model and a batch to a loss, normalised by the labels of the whole step.

`ModelLoss` asks the model itself. `LabelledLoss` has the head compute only the rows that carry a label: the model's own code
does all the rest, what it makes of its logits included, so scales and soft caps are its own. Before it is used it must
give what the model's own loss gives (`choose_objective`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftlab.batches import IGNORED
from peftlab.errors import ModelError
from peftlab.method import Head

_PIECE = 1 << 22
"""Logits that the loss looks at together."""
_FULL, _HALF = 1e-4, 2e-2
"""How far two losses may differ that are the same, as a share: in float32 or wider, and in half precision."""


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
        return _wide(loss) * self.count(batch)


class LabelledLoss(ModelLoss):
    """Cross entropy at the labelled rows alone; the head's product, its logits and their gradients have no other rows.

    loss = sum over labelled t of -log softmax(head(h_t))[label_t]. The rows are chosen as they enter the head, by a hook
    of the forward pass. Of E2E's rows half are labelled, of SAMSum's a fifth.

    Args:
        head: "causal" or "seq2seq".
        output: The module that gives the logits; a wrapper of peft's where there is one.
        decoder_inputs: What the model makes of labels to feed its decoder; None for a causal model.
        penalty: What the method adds to each training loss, or None.
        choose: Gives the numbers of the rows that are True in a mask (rows,); torch's own where None.

    Source: the same idea for one model and GPU at a time, trl `trainer/utils.py`, torchtune `loss/cross_entropy_loss.py`.
    """

    def __init__(
        self,
        head: Head,
        output: nn.Module,
        *,
        decoder_inputs: Callable[[torch.Tensor], torch.Tensor] | None = None,
        penalty: Callable[[], torch.Tensor | None] | None = None,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(head)
        self.output, self.decoder_inputs, self.penalty = output, decoder_inputs, penalty
        self.choose = _true_rows if choose is None else choose

    def total(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the batch's loss terms.

        Args:
            model: The model, in its training or evaluation mode.
            batch: input_ids, what else the model takes, and labels (batch, seq).

        Returns:
            A scalar with its graph.

        Raises:
            ModelError: The logits are not those of the labelled rows: the head was not called once.
        """
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
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
        loss: torch.Tensor = CrossEntropy.apply(  # type: ignore[no-untyped-call]
            logits, labels.flatten().index_select(0, rows)
        )
        added = self.penalty() if self.penalty is not None and model.training else None
        return loss if added is None else loss + added * len(rows)

    @contextmanager
    def _only(self, rows: torch.Tensor, shape: torch.Size) -> Iterator[None]:
        """Have the head see only some rows of a batch (batch, seq); virtual tokens in front are left out."""

        def chosen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            text = hidden[:, hidden.shape[1] - shape[1] :]
            return text.flatten(0, 1).index_select(0, rows), *args[1:]

        handle = self.output.register_forward_pre_hook(chosen)
        try:
            yield
        finally:
            handle.remove()


class ClassLoss(ModelLoss):
    """Cross entropy of classes in float32 or wider: a model in half precision rounds its own loss to three digits.

    loss = sum over rows of -log softmax(z)[class]; the logits z are the model's own.

    Args:
        penalty: What the method adds to each training loss, or None.
    """

    def __init__(self, penalty: Callable[[], torch.Tensor | None] | None = None) -> None:
        super().__init__("classification")
        self.penalty = penalty

    def total(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the batch's loss terms.

        Args:
            model: The model, in its training or evaluation mode.
            batch: input_ids and attention_mask (batch, seq), labels (batch,).

        Returns:
            A scalar with its graph.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        loss = F.cross_entropy(_wide(model(**inputs).logits), batch["labels"], reduction="sum")
        added = self.penalty() if self.penalty is not None and model.training else None
        return loss if added is None else loss + added * len(batch["labels"])


class CrossEntropy(torch.autograd.Function):
    """The sum over rows of log sum_v exp(z_v) - z_label, by pieces, and never a float32 copy of all logits.

    The mathematics and its precision are `torch.nn.functional.cross_entropy`'s on logits in float32 (or wider); the
    gradient, exp(z - log sum exp z) - 1[label], is rounded to the logits' dtype once, as autograd rounds it.

    Source: logits by pieces, Liger-Kernel `ops/cross_entropy.py`, arXiv 2410.10989.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            ctx: Keeps what the backward pass needs.
            logits: (rows, vocab).
            targets: (rows,), no row without a label.

        Returns:
            A scalar in float32, or wider where the logits are.
        """
        sums, labelled = [], []
        for piece, wanted in zip(*_pieces(logits, targets), strict=True):
            wide = _wide(piece)
            sums.append(torch.logsumexp(wide, dim=1))
            labelled.append(wide.gather(1, wanted[:, None]).squeeze(1))
        log_sums = torch.cat(sums)
        ctx.save_for_backward(logits, targets, log_sums)
        return (log_sums - torch.cat(labelled)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of the logits.

        Args:
            ctx: From `forward`.
            gradient: Of the loss.

        Returns:
            (rows, vocab), and nothing for the targets.
        """
        logits, targets, log_sums = ctx.saved_tensors
        found = torch.empty_like(logits)
        start = 0
        for piece, wanted in zip(*_pieces(logits, targets), strict=True):
            rows = slice(start, start + len(piece))
            wide = torch.sub(piece, log_sums[rows, None]).exp_()
            wide.scatter_add_(1, wanted[:, None], wide.new_full((len(piece), 1), -1.0))
            found[rows] = wide.mul_(gradient)
            start = rows.stop
        return found, None


def _pieces(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Rows of logits and targets, as many at a time as stay near the processor."""
    rows = max(1, _PIECE // logits.shape[-1])
    return torch.split(logits, rows), torch.split(targets, rows)


def choose_objective(
    model: Any, batch: dict[str, Any], *, head: Head, penalty: Callable[[], torch.Tensor | None] | None = None
) -> tuple[Objective, str]:
    """The loss over labelled rows where this model gives it, else the model's own.

    Args:
        model: The model with its adapter, without anything that the method adds to its loss; bare or wrapped by peft.
        batch: A small batch of the run, with pads, on the model's device.
        head: What the model ends in.
        penalty: What the method adds to each training loss, or None.

    Returns:
        The objective, and what was found, for a log.
    """
    own, tried = ModelLoss(head), labelled_loss(model, head=head, penalty=penalty)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    other: LabelledLoss | ClassLoss
    if not isinstance(tried, str):
        other, name = tried, "over labelled rows alone"
    elif head == "classification" and half:
        other, name = ClassLoss(penalty), "of classes in float32"
    else:
        return own, f"the model's own loss: {tried}"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = float(own.total(model, batch))
            found = float(other.total(model, batch))
    except (ModelError, RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return own, f"the model's own loss: {name} it fails ({reason})"
    finally:
        model.train(was_training)
    if not abs(found - expected) <= (_HALF if half else _FULL) * max(abs(expected), 1.0):
        return (
            own,
            f"the model's own loss: {name} it is {found:.6g} instead of {expected:.6g}",
        )
    return other, f"{name} ({found:.6g}; the model's own loss: {expected:.6g})"


def labelled_loss(
    model: Any,
    *,
    head: Head,
    penalty: Callable[[], torch.Tensor | None] | None = None,
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LabelledLoss | str:
    """The loss over labelled rows of a model as far as its class tells; `choose_objective` tries it.

    Args:
        model: The model with its adapter; bare or wrapped by peft.
        head: What the model ends in.
        penalty: What the method adds to each training loss, or None.
        choose: Gives the numbers of the True rows of a mask; torch's own where None.

    Returns:
        The loss, or why there is none.
    """
    if head == "classification":
        return "a class has one label a row"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    output, decoder_inputs = base.get_output_embeddings(), None
    if head == "seq2seq":
        decoder_inputs = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if decoder_inputs is None:
            return "the model does not tell what its decoder reads for given labels"
    if output is None:
        return "the model does not tell its output layer"
    return LabelledLoss(head, output, decoder_inputs=decoder_inputs, penalty=penalty, choose=choose)


def _true_rows(mask: torch.Tensor) -> torch.Tensor:
    """The numbers of the True entries of a mask (rows,)."""
    return mask.nonzero().squeeze(1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or wider where it is."""
    return values if values.dtype == torch.float64 else values.float()


def _unlabelled(batch: dict[str, Any]) -> torch.Tensor:
    """A first column without labels, (batch, 1)."""
    return torch.full_like(batch["labels"][:, :1], IGNORED)
