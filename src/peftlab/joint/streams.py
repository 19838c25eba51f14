"""Random draws in a joint pass: each run draws from its own stream, in the order and in the shapes of a run alone.

A stream stands where the run's trainer has seeded it. Dropout of the base is taken apart and drawn run by run; a draw that
cannot be taken apart is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftlab.errors import ModelError
from peftlab.joint.shares import Shares

_UNDIVIDED: dict[Any, str] = {
    torch.rand: "torch.rand",
    torch.rand_like: "torch.rand_like",
    torch.randn: "torch.randn",
    torch.randn_like: "torch.randn_like",
    torch.randint: "torch.randint",
    torch.bernoulli: "torch.bernoulli",
    torch.multinomial: "torch.multinomial",
    torch.dropout: "torch.dropout",
    torch.Tensor.uniform_: "Tensor.uniform_",
    torch.Tensor.normal_: "Tensor.normal_",
    torch.Tensor.bernoulli_: "Tensor.bernoulli_",
    torch.Tensor.exponential_: "Tensor.exponential_",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
}
"""Draws that are not taken apart."""


class Stream:
    """One run's place in its random stream.

    Args:
        device: Where the run computes; the stream stands where torch's own generators stand now.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.get_rng_state()
        self._card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def copied(self) -> Stream:
        """Another stream that stands at the same place."""
        return copy(self)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A context whose draws go on in this stream."""
        torch.set_rng_state(self._host)
        if self._card is not None:
            torch.cuda.set_rng_state(self._card, self._device)
        try:
            yield
        finally:
            self._host = torch.get_rng_state()
            if self._card is not None:
                self._card = torch.cuda.get_rng_state(self._device)


class DividedDraws(TorchFunctionMode):
    """A context in which dropout over a joint batch is drawn run by run.

    Args:
        shares: Which part of the batch is whose.
        streams: Run to its stream.
    """

    def __init__(self, shares: Shares, streams: Mapping[str, Stream]) -> None:
        super().__init__()
        self._shares, self._streams = shares, streams
        self._aside = False

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """A context whose draws are one run's.

        Args:
            name: The run.
        """
        self._aside = True
        try:
            with self._streams[name].drawn():
                yield
        finally:
            self._aside = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Any function of torch, as it is called; dropout once for each run."""
        options = kwargs or {}
        if self._aside:
            return func(*args, **options)
        if func is F.dropout and _argument(args, options, 2, "training", True):
            if _argument(args, options, 1, "p", 0.5) > 0:
                return self._dropout(_argument(args, options, 0, "input", None), args[1:], options)
        elif func is F.scaled_dot_product_attention and _argument(args, options, 4, "dropout_p", 0.0) > 0:
            return self._attention(args, options)
        elif func in _UNDIVIDED:
            self._refuse(_UNDIVIDED[func])
        return func(*args, **options)

    def _refuse(self, what: str) -> None:
        """A draw that runs would share.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"this model draws random numbers by {what}, which cannot be drawn for each run alone: train these one by one"
        )

    def _dropout(self, tensor: torch.Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
        """F.dropout of hidden states (batch, seq, ...), pooled ones (batch, features) or attention's weights (4 axes)."""
        axes = (2, 3) if tensor.dim() == 4 else (1,)
        own = {key: value for key, value in options.items() if key not in ("input", "inplace")}
        return self._each(lambda piece: F.dropout(piece, *args[:2], **own), tensor, axes)

    def _each(
        self,
        compute: Callable[[torch.Tensor], torch.Tensor],
        tensor: torch.Tensor,
        axes: tuple[int, ...],
    ) -> torch.Tensor:
        """Each run's part computed with its own draws."""
        done = []
        for name, piece in zip(self._shares.names, self._shares.split(tensor, axes=axes), strict=True):
            with self.of(name):
                done.append(compute(piece.contiguous()))
        return self._shares.merge(done, tensor, axes=axes)

    def _attention(self, args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
        """Attention of torch with dropout on its weights."""
        query, key, value = args[:3] if len(args) > 2 else [options[n] for n in ("query", "key", "value")]
        mask = _argument(args, options, 3, "attn_mask", None)
        rest = {n: v for n, v in options.items() if n not in ("query", "key", "value", "attn_mask")}
        rest |= dict(zip(("dropout_p", "is_causal"), args[4:], strict=False))
        parts = [self._shares.split(tensor, axes=(2,)) for tensor in (query, key, value)]
        masks: list[Any] = [None] * len(self._shares.names)
        if mask is not None:
            mask = (
                mask.expand(len(query), *mask.shape[1:])
                if mask.dim() == 4
                else mask.expand(len(query), 1, *mask.shape[-2:])
            )
            masks = self._shares.split(mask, axes=(2, 3))
        done = []
        for name, q, k, v, m in zip(self._shares.names, *parts, masks, strict=True):
            with self.of(name):
                done.append(F.scaled_dot_product_attention(q, k, v, m, **rest))
        return self._shares.merge(done, query, axes=(2,))


def _argument(args: tuple[Any, ...], options: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    """An argument that may be given by place or by name."""
    return args[place] if len(args) > place else options.get(name, default)
