"""The adapters of several runs in one layer as blocks of one: peft's own layer, which reads A and B of all as one A and B.

    A = [A_1; A_2; ...],  B = [B_1, B_2, ...],  h = A x, zero where row and block belong to different runs

The layer of peft that computes with them is the layer itself, with one adapter whose parts are these: what it makes of A, B,
dropout and scale is peft's. Six products of a layer take the place of six for each run; thin ones cost much the same
whatever their width, up to `WIDEST`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peftlab.joint.shares import Shares

WIDEST, MOST = 96, 1 << 16
"""The sum of ranks, and the entries of h, up to which runs are blocks of one: beyond, what is zero costs more than calls do.

On two cores, a Llama of 768 features in bfloat16, four runs of 36 ranks and 440 tokens in all: the thin products of a pass
took 134 ms instead of 266. The limits lie where the zeros would take this gain, by their number."""
_ALL = "all"


class Blocks:
    """Which entries of a joint batch's h belong to whom, and each row's scale; kept for one pass.

    Args:
        shares: Which part of the batch is whose.
    """

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self._masks: dict[Any, torch.Tensor] = {}
        self._scales: dict[Any, torch.Tensor | float] = {}

    def mask(self, ranks: Mapping[str, int], hidden: torch.Tensor) -> torch.Tensor:
        """One where a row of h and a block belong to one run, else zero.

        Args:
            ranks: Run to rank, in the order of the blocks.
            hidden: h, (..., sum of ranks).

        Returns:
            A tensor that is broadcast over h.
        """
        key = (tuple(ranks.items()), hidden.shape[:-1], hidden.dtype)
        if key not in self._masks:
            numbers = [self.shares.names.index(name) for name, rank in ranks.items() for _ in range(rank)]
            columns = torch.tensor(numbers, device=hidden.device)
            owners = self.shares.owners(hidden.shape[:-1], hidden.device)
            self._masks[key] = (owners.unsqueeze(-1) == columns).to(hidden.dtype)
        return self._masks[key]

    def scale(self, scales: Mapping[str, float], like: torch.Tensor) -> torch.Tensor | float:
        """Each row's scale.

        Args:
            scales: Run to scale.
            like: What is scaled, (..., features).

        Returns:
            A number where it is one for all, else a tensor (..., 1).
        """
        if len(set(scales.values())) == 1:
            return next(iter(scales.values()))
        key = (tuple(scales.items()), like.shape[:-1], like.dtype)
        if key not in self._scales:
            own = torch.tensor(
                [scales.get(name, 0.0) for name in self.shares.names], device=like.device, dtype=like.dtype
            )
            self._scales[key] = own[self.shares.owners(like.shape[:-1], like.device)].unsqueeze(-1)
        return self._scales[key]


class BlockLayer:
    """A layer of peft in which the adapters of runs are blocks of one.

    Args:
        layer: The layer; plain LoRA of linear A and B.
        names: The runs whose adapters are blocks.
        drop: Gives dropout's input as each run's own dropout leaves it.
    """

    def __init__(
        self, layer: Any, names: Sequence[str], drop: Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
    ) -> None:
        self.names, self._drop = tuple(names), drop
        self._downs = {name: layer.lora_A[name] for name in names}
        self._ups = {name: layer.lora_B[name] for name in names}
        self._ranks = {name: int(layer.r[name]) for name in names}
        self._scaling = layer.scaling
        first = next(iter(self._downs.values()))
        self._now: tuple[str, ...] = ()
        self._blocks: Blocks | None = None
        kind: Any = type(layer)
        self._view: Any = kind.__new__(kind)
        vars(self._view).update(vars(layer))
        vars(self._view).update(
            _modules={"base_layer": layer.base_layer},
            _active_adapter=[_ALL],
            lora_A={_ALL: _Part(self._down, first)},
            lora_B={_ALL: _Part(self._up, first)},
            lora_dropout={_ALL: self._dropped},
            lora_variant={},
            scaling={_ALL: _Scale(self)},
        )
        self._forward = kind.forward

    def fits(self, names: Sequence[str], x: torch.Tensor) -> bool:
        """Whether blocks are the faster way for runs of this layer.

        Args:
            names: Those of its runs that take part in a pass.
            x: What the layer reads, (..., in).
        """
        width = sum(self._ranks[name] for name in names)
        return len(names) > 1 and width <= WIDEST and width * x.numel() // x.shape[-1] <= MOST

    def __call__(
        self, blocks: Blocks, names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The layer's answer for the rows of all; rows of other runs get the base's.

        Args:
            blocks: Of this pass.
            names: Those of its runs that take part in the pass.
            x: What the layer reads, (..., in).
            args: What else it is given.
            kwargs: What else it is given.
        """
        self._blocks, self._now = blocks, tuple(names)
        try:
            return self._forward(self._view, x, *args, **kwargs)
        finally:
            self._blocks, self._now = None, ()

    def scaled(self, delta: torch.Tensor) -> torch.Tensor:
        """Each run's rows times its scale.

        Args:
            delta: B A x, (..., out).
        """
        assert self._blocks is not None
        return delta * self._blocks.scale({name: self._scaling[name] for name in self._now}, delta)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """What dropout leaves of the layer's input."""
        return self._drop(x, self._now)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        """h, zero beside the diagonal blocks."""
        assert self._blocks is not None
        hidden = F.linear(x, self._whole(self._downs, 0))
        return hidden * self._blocks.mask({name: self._ranks[name] for name in self._now}, hidden)

    def _up(self, hidden: torch.Tensor) -> torch.Tensor:
        """B h."""
        return F.linear(hidden, self._whole(self._ups, 1))

    def _whole(self, parts: Mapping[str, nn.Module], dim: int) -> torch.Tensor:
        """The weights of all runs as one, in the dtype that they are read in."""
        weights: list[Any] = [parts[name]._parameters["weight"] for name in self._now]
        first: Any = parts[self._now[0]]
        return torch.cat(weights, dim=dim).to(first.weight.dtype)


class _Part:
    """Stands in for a linear layer of peft's: called as one, with a weight to ask for its dtype."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor], linear: Any) -> None:
        self._compute, self._linear = compute, linear

    @property
    def weight(self) -> torch.Tensor:
        """A weight of the dtype that is computed in."""
        found: torch.Tensor = self._linear.weight
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._compute(x)


class _Scale:
    """Stands in for the number that peft scales B A x with: each row has its run's."""

    def __init__(self, layer: BlockLayer) -> None:
        self._layer = layer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """A tensor times the scale."""
        delta, scale = args
        return scale._layer.scaled(delta)


def can_be_block(layer: Any, name: str) -> bool:
    """Whether a run's adapter in a layer is plain LoRA of two linear layers without biases.

    Args:
        layer: A layer of peft.
        name: The adapter.
    """
    if name in getattr(layer, "lora_variant", {}):
        return False
    parts = [layer.lora_A[name], layer.lora_B[name]]
    return all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
