"""How far each head's attention has moved: rows of the base against rows of the tuned model, for the same queries.

Total variation 1/2 sum |p - q| and the Jensen-Shannon divergence in nats (0 to ln 2), mean over real queries. The first
query is left out: a causal one sees itself alone. Keys that the adapter puts before the text (virtual tokens, prefixes)
count as one key of their own, on which the base has no mass; so does a learnt sink.

Source: Lin 1991, "Divergence measures based on the Shannon entropy".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peftlab.errors import EvaluationError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_choice import Choice, Kind, choose
from peftlab.inspection.attention_source import Receiver, Rows, Source, read_rows
from peftlab.inspection.before_after.passages import Batch
from peftlab.inspection.before_after.sides import Sides

_MOST_BYTES = 1 << 28
"""Rows of the base that are kept while the tuned model runs, where it takes two passes."""
_CHUNK = 128


class AttentionDrift:
    """Sums over queries, layer by layer and head by head.

    Args:
        sides: Both sides.
        stack: The stack that is looked at.
        kind: Self or cross attention.

    Raises:
        ModelError: The model has no such attention.
    """

    def __init__(self, sides: Sides, stack: str, kind: Kind) -> None:
        self.sides, self.kind = sides, kind
        self.choice = choose(sides.base_family, kind=kind, stack=stack)
        self.pairs = dict(sides.layers(stack).pairs)
        self.source: Source = "probe"
        self.note = ""
        self._sums: dict[int, torch.Tensor] = {}
        self._counts: dict[int, int] = {}
        self._fresh: dict[int, tuple[torch.Tensor, int]] = {}

    def add(self, batch: Batch) -> None:
        """Take a batch.

        Args:
            batch: The passages.

        Raises:
            ModelError: Attention cannot be had from this model; the message says why.
            EvaluationError: The model hands out something that is no attention.
        """
        inputs, rows = self._complete(batch), len(batch.numbers)
        self._fresh = {}
        if self.sides.num_passes == 1:
            self.sides.both(rows, self._reader(inputs, None, lambda seen: self._add(*_halves(seen))))
        else:
            for group in self._groups(batch):
                kept: dict[int, Rows] = {}
                of_base, of_both = self._keeper(kept), self._comparer(kept)
                self.sides.both(rows, self._reader(inputs, group, of_base, of_both))
        for layer, (found, queries) in self._fresh.items():
            self._sums[layer] = self._sums[layer] + found if layer in self._sums else found
            self._counts[layer] = self._counts.get(layer, 0) + queries

    def means(self) -> list[dict[str, Any]]:
        """The means.

        Returns:
            For each layer of the base: layer, js (nats) and tv (rate), a number for each head.
        """
        return [
            {"layer": layer, **_numbers(self._sums[layer] / max(1, self._counts[layer]))}
            for layer in sorted(self._sums)
        ]

    @property
    def queries(self) -> int:
        """Queries that each head was looked at for."""
        return max(self._counts.values(), default=0)

    def _reader(self, inputs: Mapping[str, torch.Tensor], group: list[int] | None, *receive: Receiver) -> Any:
        """What reads the rows of a side: with one receiver of both at once, with two of the base and the tuned model."""

        def read(model: Any, family: FamilyMap, times: int) -> None:
            device = next(model.parameters()).device
            placed = {name: torch.cat([t.to(device)] * times) for name, t in inputs.items()}
            is_base = family is self.sides.base_family
            layers = None if group is None else tuple(i if is_base else self.pairs[i] for i in group)
            choice = Choice(self.choice.stack, self.kind, layers, None, self.choice.repeated)
            receiver = receive[0] if times == 2 or is_base else receive[1]
            chunk = _CHUNK if times == 2 else None
            self.source, self.note = read_rows(model, family, choice, placed, receiver, chunk=chunk)

        return read

    @staticmethod
    def _keeper(kept: dict[int, Rows]) -> Receiver:
        """Keeps the rows of the base."""

        def keep(rows: Rows) -> None:
            kept[rows.layer] = rows

        return keep

    def _comparer(self, kept: dict[int, Rows]) -> Receiver:
        """Holds the rows of the tuned model against those of the base that were kept."""
        layers = {tuned: layer for layer, tuned in self.pairs.items()}

        def compare(rows: Rows) -> None:
            layer = layers.get(rows.layer)
            if layer in kept:
                self._add(kept[layer], rows)

        return compare

    def _add(self, base: Rows, tuned: Rows) -> None:
        """Sum what differs between rows of one layer; those that begin at 0 replace what this batch gave before."""
        one, other = _fitted(_with_sinks(base), _with_sinks(tuned), base.key_real.shape[1])
        other = other[:, :, -one.shape[2] :]  # virtual tokens ask too
        queries = base.query_real[:, base.start : base.start + one.shape[2]].clone()
        if base.start == 0:
            queries[:, 0] = False
        total = 0.5 * (one - other).abs().sum(dim=-1)
        entropy = torch.special.entr
        divergence = (entropy(0.5 * (one + other)) - 0.5 * (entropy(one) + entropy(other))).sum(dim=-1)
        counted = queries[:, None].to(total.device)
        found = torch.stack(
            [
                torch.where(counted, values, 0.0).double().sum(dim=(0, 2)).cpu()
                for values in (divergence.clamp_min(0.0), total)
            ]
        )
        before, seen = self._fresh.get(base.layer, (torch.zeros_like(found), 0))
        if base.start == 0:
            before, seen = torch.zeros_like(found), 0
        self._fresh[base.layer] = before + found, seen + int(queries.sum())

    def _known_layers(self) -> list[int]:
        """Layers of the base that have this attention."""
        if self.choice.repeated:
            return list(self.pairs)
        roles = {"self": "attention", "cross": "cross_attention"}
        sites = self.sides.base_family.mixers(self.choice.stack)
        return sorted({s.layer for s in sites if s.role == roles[self.kind] and s.layer is not None})

    def _groups(self, batch: Batch) -> list[list[int]]:
        """Layers whose rows are kept together."""
        layers = self._known_layers()
        heads = max(1, int(getattr(self.sides.tuned.config, "num_attention_heads", 0) or 16))
        length = max(batch.width, batch.inputs["input_ids"].shape[1])
        most = max(1, _MOST_BYTES // (4 * len(batch.numbers) * heads * length * length))
        return [layers[i : i + most] for i in range(0, len(layers), most)]

    def _complete(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The batch's arguments, with something for a decoder that is not looked at."""
        inputs = dict(batch.inputs)
        if getattr(self.sides.tuned.config, "is_encoder_decoder", False):
            inputs.setdefault("decoder_input_ids", torch.zeros(len(batch.numbers), 1, dtype=torch.long))
        return inputs


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Rows of the first and of the second half of a batch."""

    def part(tensor: torch.Tensor | None, number: int) -> Any:
        return None if tensor is None else tensor.chunk(2)[number]

    return tuple(  # type: ignore[return-value]
        Rows(rows.layer, rows.start, *(part(t, i) for t in _tensors(rows))) for i in (0, 1)
    )


def _tensors(rows: Rows) -> tuple[Any, ...]:
    """What of some rows has the batch first."""
    return rows.probabilities, rows.sinks, rows.query_real, rows.key_real


def _with_sinks(rows: Rows) -> torch.Tensor:
    """Probabilities with learnt sinks as one key before the others."""
    p = rows.probabilities
    sinks = torch.zeros_like(p[..., :1]) if rows.sinks is None else rows.sinks[..., None].to(p.dtype)
    return torch.cat([sinks, p], dim=-1)


def _fitted(base: torch.Tensor, tuned: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both over the same keys: what the adapter puts before the text is one key, the first.

    Raises:
        EvaluationError: They are not over the same text.
    """
    before = tuned.shape[-1] - 1 - num_keys
    if before < 0 or base.shape[-1] != num_keys + 1:
        raise EvaluationError(
            f"the base attends to {base.shape[-1] - 1} keys and the tuned model to {tuned.shape[-1] - 1}; expected the same"
            " text in both"
        )
    extra = tuned[..., : before + 1].sum(dim=-1, keepdim=True)
    return base, torch.cat([extra, tuned[..., before + 1 :]], dim=-1)


def _numbers(means: torch.Tensor) -> dict[str, list[float | None]]:
    """Js and tv of one layer's heads."""
    return {
        name: [value if value == value else None for value in row.tolist()]
        for name, row in zip(("js", "tv"), means, strict=True)
    }
