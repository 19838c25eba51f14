"""What every module of a model was given and gave in one forward pass, and what it gives when something is changed.

An experiment replays one module with its own recorded arguments, adds noise somewhere and looks where the result moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

TOLERANCE = 1e-4
"""Two float32 tensors are equal where they differ by less than this times their largest value."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        args: Positional arguments.
        kwargs: Named arguments.
        output: What came back, as it came.
        turn: When it came back, counted over all calls of a forward pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    turn: int = 0

    @property
    def result(self) -> torch.Tensor | None:
        """The first tensor of the output; None where there is none."""
        return first_tensor(self.output)

    @property
    def hidden(self) -> torch.Tensor | None:
        """The first floating tensor among the arguments: what the module works on."""
        return next((t for t in self.tensors() if t.is_floating_point() and t.dim() >= 2), None)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, positional ones first."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, torch.Tensor)]

    def with_tensor(self, old: torch.Tensor, new: torch.Tensor) -> Call:
        """The same call with one argument exchanged wherever it stands.

        Args:
            old: The argument.
            new: What replaces it.

        Returns:
            The call; its output is still the old one.
        """
        args = tuple(new if value is old else value for value in self.args)
        return Call(args, {k: new if v is old else v for k, v in self.kwargs.items()}, self.output)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor in what a module gave back: the hidden states, by transformers' convention.

    Args:
        output: A tensor, a tuple, a mapping.

    Returns:
        The tensor, or None.
    """
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, tuple | list) or isinstance(output, Mapping):
        return next((found for found in map(first_tensor, values) if found is not None), None)
    return None


def record(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> tuple[dict[str, list[Call]], Any]:
    """Run a model once and keep every call of every module.

    Args:
        model: A small model.
        inputs: Arguments of its forward.
        options: Further arguments.

    Returns:
        Path to its calls, in order; and the model's output. A shared module's calls stand under its first path.
    """
    calls: dict[str, list[Call]] = {}
    turns = count()

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs, output = _copies((args, kwargs, output))
            calls.setdefault(path, []).append(Call(args, kwargs, output, next(turns)))

        return hook

    handles = [
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            output = model(**inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _copies(values: Any) -> Any:
    """The same nested values with every tensor copied: a model may go on to change it in place (Falcon)."""
    made: dict[int, torch.Tensor] = {}
    return tree_map_only(torch.Tensor, lambda t: made.setdefault(id(t), t.clone()), values)


def replay(module: nn.Module, call: Call) -> torch.Tensor | None:
    """The first tensor that a module gives for recorded arguments.

    Args:
        module: The module.
        call: Its arguments.

    Returns:
        The tensor, or None.
    """
    with torch.no_grad():
        return first_tensor(module(*call.args, **call.kwargs))


@contextmanager
def noise_on(
    module: nn.Module, *, seed: int = 1, scale: float = 1.0, at: Any = None, like: torch.Size | None = None
) -> Iterator[None]:
    """Add noise to the first tensor that a module gives.

    Args:
        module: The module.
        seed: Seeds the noise.
        scale: Factor on the noise, which otherwise has the output's own size.
        at: An index into the output where noise is added; None for everywhere.
        like: Leave outputs of another shape alone, where a module runs on several sequences.

    Yields:
        Nothing; within, the module is noisy.
    """

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        tensor = first_tensor(output)
        if tensor is None or (like is not None and tensor.shape != like):
            return output
        noisy = tensor + noise_like(tensor, seed=seed, scale=scale, at=at)
        if tensor is output:
            return noisy
        return type(output)(noisy if item is tensor else item for item in output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def noise_like(tensor: torch.Tensor, *, seed: int = 1, scale: float = 1.0, at: Any = None) -> torch.Tensor:
    """Seeded noise of a tensor's shape and size.

    Args:
        tensor: The tensor.
        seed: Seeds the noise.
        scale: Factor.
        at: An index; elsewhere the noise is zero.

    Returns:
        The noise.
    """
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=source).to(tensor.dtype) * tensor.detach().std() * scale
    if at is None:
        return noise
    masked = torch.zeros_like(noise)
    masked[at] = noise[at]
    return masked


def equal(a: torch.Tensor | None, b: torch.Tensor | None, *, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are the same up to rounding.

    Args:
        a: A tensor or None.
        b: A tensor or None.
        tolerance: Share of the largest value by which they may differ.

    Returns:
        True where both are tensors of one shape and close.
    """
    if a is None or b is None or a.shape != b.shape:
        return False
    largest = float(b.detach().abs().max())
    return bool((a - b).detach().abs().max() <= tolerance * max(1e-6, largest))
