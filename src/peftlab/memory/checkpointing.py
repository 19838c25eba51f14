"""What gradient checkpointing saves of a model on given inputs, measured by running it with and without.

Checkpointing drops what the blocks of a training step compute and computes it again in the backward pass. In inference
nothing is kept for a backward pass, so there is nothing to save; transformers then ignores the switch. Both are measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.family import FamilyMap
from peftlab.loading import switch_checkpointing
from peftlab.memory.peaks import measured_peak


@dataclass(frozen=True, slots=True)
class MemoryOptimization:
    """What gradient checkpointing saves.

    Bytes are the peak above the weights, while the inputs pass through the model.

    Attributes:
        gradient_checkpointing: Whether it is on now.
        training_bytes: Peak of a forward and backward pass without it, the weights frozen, as for an adapter; None where
            nothing was measured.
        training_bytes_checkpointed: The same with it.
        inference_bytes: Peak of a forward pass without it; None where nothing was measured.
        inference_bytes_checkpointed: The same with it.
        measured_on: What was measured, in words; "" for nothing.
    """

    gradient_checkpointing: bool
    training_bytes: int | None = None
    training_bytes_checkpointed: int | None = None
    inference_bytes: int | None = None
    inference_bytes_checkpointed: int | None = None
    measured_on: str = ""

    @property
    def training_saved(self) -> float | None:
        """Share of the training step's peak above the weights that it saves, 0 to 1; None where not measured."""
        return _share(self.training_bytes, self.training_bytes_checkpointed)

    @property
    def inference_saved(self) -> float | None:
        """The same of a forward pass alone."""
        return _share(self.inference_bytes, self.inference_bytes_checkpointed)

    def __str__(self) -> str:
        """One sentence."""
        state = f"gradient checkpointing is {'on' if self.gradient_checkpointing else 'off'}"
        if self.training_saved is None or self.inference_saved is None:
            return f"{state}; what it saves was not measured: give texts"
        return (
            f"{state}; of the peak above the weights it saves {100 * self.training_saved:.0f} % in a training step and"
            f" {100 * self.inference_saved:.0f} % in inference (measured on {self.measured_on})"
        )


def measure_checkpointing(
    model: Any, family: FamilyMap, inputs: Mapping[str, Any], *, words: str
) -> MemoryOptimization:
    """Measure what checkpointing saves; afterwards it is on.

    Args:
        model: A transformers model, in evaluation mode.
        family: Its map.
        inputs: Arguments of its forward pass, one batch.
        words: What the inputs are, for the report.

    Returns:
        The peaks.

    Raises:
        ModelError: The model has no checkpointing, or its device does not tell its memory.
    """
    device = next(model.parameters()).device
    if "use_cache" in inspect.signature(model.forward).parameters:  # a training step has none
        inputs = {**inputs, "use_cache": False}
    before = bool(model.is_gradient_checkpointing)
    peaks = {}
    try:
        for on in (False, True):
            switch_checkpointing(model, on)
            with measured_peak(device) as inference, torch.no_grad():
                model(**inputs)
            with _as_in_training(model, family), measured_peak(device) as training:
                output = model(**inputs)
                torch.autograd.backward(_first(output).float().sum())
                del output
            peaks[on] = (training[0], inference[0])
    except BaseException:
        switch_checkpointing(model, before)
        raise
    return MemoryOptimization(
        gradient_checkpointing=True,
        training_bytes=peaks[False][0],
        training_bytes_checkpointed=peaks[True][0],
        inference_bytes=peaks[False][1],
        inference_bytes_checkpointed=peaks[True][1],
        measured_on=f"{words}, {device.type}, {str(next(model.parameters()).dtype).removeprefix('torch.')}",
    )


@contextmanager
def _as_in_training(model: nn.Module, family: FamilyMap) -> Iterator[None]:
    """Training mode, frozen weights, and gradients that flow through every block: what an adapter's training step does."""
    training = {module: module.training for module in model.modules()}
    buffers = {
        buffer: buffer.clone() for buffer in model.buffers()
    }  # running statistics move in training mode
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        try:
            stack.enter_context(torch.random.fork_rng())  # dropout draws
            for parameter in trainable:
                parameter.requires_grad_(False)
            for name in family.stacks:
                first = model.get_submodule(family.blocks(name)[0].path)
                stack.callback(first.register_forward_pre_hook(_differentiable, with_kwargs=True).remove)
            model.train()
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            for buffer, value in buffers.items():
                buffer.data.copy_(value)
            for parameter in trainable:
                parameter.requires_grad_(True)


def _differentiable(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The first hidden states that a block is given, as the start of a graph."""
    if arguments:
        return (arguments[0].detach().requires_grad_(), *arguments[1:]), named
    name = next(
        key for key, value in named.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    )
    return arguments, named | {name: named[name].detach().requires_grad_()}


def _first(output: Any) -> torch.Tensor:
    """The first floating-point tensor of a model's output: the logits, or the hidden states."""
    values = output.values() if isinstance(output, Mapping) else output
    return next(
        v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.requires_grad
    )


def _share(without: int | None, with_it: int | None) -> float | None:
    """How much of the first is gone in the second."""
    return None if without is None or with_it is None else 1 - with_it / without
