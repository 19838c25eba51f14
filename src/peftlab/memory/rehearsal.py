"""A run's first steps carried out on tensors without data: the same operations, and no memory.

The model is built on the meta device and the method attaches its adapter to it there, as in a run. Then every tensor is
exchanged for a fake one and the run's own trainer trains. Nothing is imitated, so nothing can drift.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainerCallback

from peftlab.config import RunConfig
from peftlab.memory.ledger import BETWEEN, GRADIENTS, OPTIMIZER, UPDATE, WEIGHTS, Peak, StorageLedger
from peftlab.memory.steps import BatchShape, make_trainer, undisturbed
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss, Objective, labelled_loss

_SEES_THROUGH = "transformers.utils.import_utils.is_fake_tensor"
"""Where transformers asks whether a mask has no data; if so, it never leaves a mask out."""


def rehearse(
    attachment: Attachment, config: RunConfig, shape: BatchShape, *, head: Head, device_type: str
) -> Peak:
    """Carry out the first steps of a run on tensors without data.

    Args:
        attachment: An adapter on a base on the meta device; its tensors are exchanged for fake ones for good.
        config: The run.
        shape: The longest batch.
        head: What the model ends in.
        device_type: The device whose kernels are meant: "cpu", "cuda" or "mps".

    Returns:
        The instant at which most was in use.
    """
    here = config.model.model_copy(update={"device": "cpu"})  # where tensors without data say that they are
    fakes, model = FakeTensorMode(), attachment.model
    _exchange_tensors(model, fakes)
    ledger = StorageLedger(device_type, _Changes(attachment))
    labels = shape.labelled_rows(head)
    labelled = labelled_loss(
        attachment.answering, head=head, penalty=attachment.penalty, choose=lambda _: torch.arange(labels)
    )
    objective = ModelLoss(head) if isinstance(labelled, str) else labelled
    with (
        tempfile.TemporaryDirectory() as folder,
        undisturbed(),
        _older_garbage_left(),
        patch.object(model, "to", lambda *_, **__: model),  # torch cannot move a fake parameter
        patch(_SEES_THROUGH, lambda _: False, create=True),  # so masks are looked at as they are with data
        _fused_attention(device_type),
        fakes,
        ledger,
    ):
        for tensor in [*model.parameters(), *model.buffers()]:
            ledger.note(tensor, WEIGHTS)
        make_trainer(
            attachment,
            config.model_copy(update={"model": here}),
            shape,
            head=head,
            vocabulary=1,
            objective=_WatchedLoss(objective, ledger),
            callbacks=[_Moments(ledger)],
            folder=Path(folder),
        ).train()
    return ledger.peak()


def _exchange_tensors(model: nn.Module, fakes: FakeTensorMode) -> None:
    """Put a fake CPU tensor in the place of every parameter and buffer; what was shared stays shared."""
    made: dict[int, torch.Tensor] = {}
    originals = []  # while they are here, no other tensor has the id of one
    with fakes:
        for module in model.modules():
            kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for places in kinds:
                for name, tensor in places.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        originals.append(tensor)
                        shape, stride = tensor.shape, tensor.stride()
                        fake = torch.empty_strided(shape, stride, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    places[name] = made[id(tensor)]


@contextmanager
def _older_garbage_left() -> Iterator[None]:
    """Have the collection of garbage that ends training look at new objects alone: it took half of a rehearsal."""
    if gc.get_freeze_count():  # someone else's; it would be given up with ours
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _fused_attention(device_type: str) -> Iterator[None]:
    """On CUDA have attention with dropout take the fused kernel; the CPU's, which stands in for it, knows no dropout."""
    if device_type != "cuda":
        yield
        return
    fused = torch.nn.functional.scaled_dot_product_attention

    def without_dropout(*args: Any, dropout_p: float = 0.0, **rest: Any) -> torch.Tensor:
        return fused(*args, **rest)

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", without_dropout):
        yield


class _Changes:
    """Whether a trained tensor equals its copy: until it has been asked for as often as it takes steps to train."""

    def __init__(self, attachment: Attachment) -> None:
        self._steps = {
            parameter.untyped_storage(): attachment.steps_to_train(name)
            for name, parameter in attachment.parameters().items()
        }

    def __call__(self, _: torch.Tensor, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        self._steps[storage] -= 1
        return self._steps[storage] > 0


class _WatchedLoss:
    """An objective that tells the ledger when the forward pass is, and of the pads in its batch."""

    def __init__(self, objective: Objective, ledger: StorageLedger) -> None:
        self._objective, self._ledger = objective, ledger

    def count(self, batch: dict[str, Any]) -> int:
        """How many terms the batch's loss is a sum of."""
        return self._objective.count(batch)

    def total(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """The sum of the batch's loss terms."""
        if len(batch["attention_mask"]) > 1:
            self._ledger.mark_pads(batch["attention_mask"])
        with self._ledger.forward_pass():
            return self._objective.total(model, batch)


class _Moments(TrainerCallback):  # type: ignore[misc]
    """Tells the ledger where in a step the trainer is, and which storages are gradients and optimizer state."""

    def __init__(self, ledger: StorageLedger) -> None:
        self._ledger = ledger

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **what: Any) -> None:
        for parameter in what["model"].parameters():
            if parameter.grad is not None:
                self._ledger.note(parameter.grad, GRADIENTS)
        self._ledger.moment = UPDATE

    def on_step_end(self, args: Any, state: Any, control: Any, **what: Any) -> None:
        optimizer = getattr(what["optimizer"], "optimizer", what["optimizer"])
        for remembered in optimizer.state.values():
            for value in remembered.values():
                if isinstance(value, torch.Tensor):
                    self._ledger.note(value, OPTIMIZER)
        self._ledger.moment = BETWEEN
