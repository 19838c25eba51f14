"""Rows one behind the other in a single sequence, each alone: no pads, and attention within each row only.

In a packed batch positions begin anew at each row, and transformers masks what lies outside of a row. Computed whole, its
attention would still cost the square of the sequence. `Isolation` hands the model's own attention function the rows side by
side instead, with the blocks of the model's own mask: the same numbers, at the cost of the rows.

Source: rows kept apart by their positions, transformers `masking_utils.find_packed_sequence_indices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from peftlab.errors import ModelError

_COMPUTE_FROM_MASKS = ("eager", "sdpa")
"""The implementations that are told by a mask what may be seen; others read the positions themselves."""
_LONGEST_EAGER = 256
"""Tokens of a row up to which plain products are faster on a CPU in half precision than the fused kernel. Forwards and
backwards, a Llama of 6 layers and 768 features: rows of 128 8 % faster, of 512 10 % slower, of 1,024 39 % slower."""


class Isolation:
    """Computes a model's attention row by row in packed batches.

    Args:
        model: A transformers model, bare or wrapped by peft.
        strict: Whether each mask is looked at: nothing outside of a row may be seen.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False) -> None:
        self._members, self._strict = set(model.modules()), strict
        self.num_calls = 0
        first = next(model.parameters())
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        # on a CPU the fused kernel's backward pass is slow in half precision
        self._eager = half and first.device.type == "cpu"

    @contextmanager
    def rows(self, position_ids: torch.Tensor) -> Iterator[None]:
        """A context in which the rows of one packed batch are computed apart, forwards and backwards.

        Args:
            position_ids: (1, tokens), 0 where a row begins.

        Yields:
            Nothing. Calls of attention in other shapes, as of another model, are computed as ever.

        Raises:
            ModelError: A strict look at a mask finds that a token may see another row.
        """
        from transformers.modeling_utils import AttentionInterface

        answer, rows = AttentionInterface.get_interface, _Rows(position_ids[0], self._strict)

        def get_interface(interface: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
            compute = answer(interface, attn_implementation, default)
            if (attn_implementation or "eager") not in _COMPUTE_FROM_MASKS:
                return compute

            def isolated(
                module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
            ) -> Any:
                shapes = {(tensor.shape[0], tensor.shape[2]) for tensor in (query, key, value)}
                if module not in self._members or shapes != {(1, rows.num_tokens)}:
                    return compute(module, query, key, value, attention_mask, **options)
                self.num_calls += 1
                beside = [rows.beside(tensor) for tensor in (query, key, value)]
                eager = self._eager and attn_implementation == "sdpa" and rows.longest <= _LONGEST_EAGER
                blocks = rows.blocks(attention_mask)
                if eager:
                    blocks = rows.additive(attention_mask, blocks, query.dtype)
                output, _ = (default if eager else compute)(module, *beside, blocks, **options)
                return rows.behind(output), None

            return isolated

        AttentionInterface.get_interface = get_interface
        try:
            yield
        finally:
            AttentionInterface.get_interface = answer


@dataclass(slots=True)
class _Rows:
    """Where the rows of a packed batch lie.

    Attributes:
        position_ids: (tokens,).
        strict: Whether masks are looked at.
        index: (rows, longest): the token's number; beyond a row's end its last token's.
        real: (rows, longest): whether it is a token of the row.
        place: (tokens,): where each token lies in a flat `index`.
        seen: The blocks of each mask that was met.
        added: The same as what eager attention adds.
    """

    position_ids: torch.Tensor
    strict: bool
    index: torch.Tensor = field(init=False)
    real: torch.Tensor = field(init=False)
    place: torch.Tensor = field(init=False)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(init=False, default_factory=dict)
    added: dict[tuple[int, torch.dtype], torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        begins = (self.position_ids == 0).nonzero().squeeze(1)
        ends = torch.cat([begins[1:], begins.new_tensor([self.num_tokens])])
        across = torch.arange(int((ends - begins).max()), device=begins.device)
        self.index = torch.minimum(begins[:, None] + across, ends[:, None] - 1)
        self.real = across < (ends - begins)[:, None]
        self.place = self.real.flatten().nonzero().squeeze(1)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return int(self.position_ids.shape[0])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.index.shape[1])

    def beside(self, tensor: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens, head) as (rows, heads, longest, head)."""
        chosen: torch.Tensor = _Regrouped.apply(  # type: ignore[no-untyped-call]
            tensor[0].transpose(0, 1), self.index.flatten(), self.place, None
        )
        return chosen.view(*self.index.shape, *chosen.shape[1:]).transpose(1, 2)

    def behind(self, tensor: torch.Tensor) -> torch.Tensor:
        """(rows, longest, heads, head) as (1, tokens, heads, head)."""
        back: torch.Tensor = _Regrouped.apply(  # type: ignore[no-untyped-call]
            tensor.flatten(0, 1), self.place, self.index.flatten(), self.real.flatten()
        )
        return back.unsqueeze(0)

    def blocks(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The blocks of a mask (1, 1 or heads, tokens, tokens) on its diagonal, (rows, 1 or heads, longest, longest).

        Args:
            mask: Boolean or additive; None where causality alone masks.

        Returns:
            The blocks; None where they are what causality alone gives.

        Raises:
            ModelError: A token may see another row.
        """
        if mask is None:
            return None
        if id(mask) not in self.seen:  # the mask is kept, so that no other one has its id
            self.seen[id(mask)] = mask, self._blocks(mask)
        return self.seen[id(mask)][1]

    def additive(
        self, mask: torch.Tensor | None, blocks: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Blocks as what eager attention adds to its scores.

        Args:
            mask: The mask that they were made of.
            blocks: From `blocks`.
            dtype: Of the scores.

        Returns:
            (rows or 1, 1 or heads, longest, longest).
        """
        if blocks is not None and blocks.dtype != torch.bool:
            return blocks
        key = (id(mask), dtype)
        if key not in self.added:
            if blocks is None:
                longest = self.index.shape[1]
                shape = (1, 1, longest, longest)
                blocks = torch.ones(shape, dtype=torch.bool, device=self.index.device).tril()
            hidden = torch.zeros(blocks.shape, dtype=dtype, device=blocks.device)
            self.added[key] = hidden.masked_fill_(~blocks, torch.finfo(dtype).min)
        return self.added[key]

    def _blocks(self, mask: torch.Tensor) -> torch.Tensor | None:
        """The blocks of a mask that was not met before."""
        boolean = mask.dtype == torch.bool
        blocks = mask[0][:, self.index[:, :, None], self.index[:, None, :]].transpose(0, 1)
        real = self.real[:, None, None, :]
        visible = (blocks if boolean else blocks > torch.finfo(mask.dtype).min / 2) & real
        if self.strict:
            seen = mask if boolean else mask > torch.finfo(mask.dtype).min / 2
            within = (visible & self.real[:, None, :, None]).sum()
            if seen.sum() != within:
                raise ModelError("its mask lets a token see another row of a packed batch")
        if boolean:
            longest = self.index.shape[1]
            causal = torch.ones(longest, longest, dtype=torch.bool, device=mask.device).tril() & real
            queries = self.real[:, None, :, None]
            return None if torch.equal(visible & queries, causal & queries) else visible
        return blocks.masked_fill(~real, torch.finfo(mask.dtype).min)


class _Regrouped(torch.autograd.Function):
    """Chosen rows of a tensor, whose gradients are chosen back: each token has one place, and places of pads get nothing."""

    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, index: torch.Tensor, back: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """`tensor[index]`; `tensor[index][back]` is the tensor again, at the places that are `real`."""
        ctx.save_for_backward(back, real)
        return tensor.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of the tensor."""
        back, real = ctx.saved_tensors
        found = gradient.index_select(0, back)
        if real is not None:
            found.masked_fill_(~real.view(-1, *[1] * (found.dim() - 1)), 0)
        return found, None, None, None
