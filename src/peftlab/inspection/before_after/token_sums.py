"""How far the hidden states of tokens have moved: sums over tokens as they stream by, and a bounded sample for CKA.

Drift of a token: ||h' - h|| / ||h||, with h the base's state and h' the tuned model's. The first token of most trained
models carries states hundreds of times longer than the others' (Sun et al. 2024, arXiv 2402.17762), so each mean is given
with it and without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peftlab.inspection.before_after.passages import Batch
from peftlab.inspection.before_after.sides import Tensors
from peftlab.inspection.similarity import (
    FEWEST,
    TOP_DIMENSIONS,
    chance_level,
    cka_matrix,
    without_top_dimensions,
)

SAMPLE_TOKENS = 512
"""Tokens that CKA is taken over: its cost is quadratic in them."""
_SAMPLE_BYTES = 1 << 28
_NUMBERS = ("drift", "cosine")


class TokenSums:
    """Sums of drift and cosine over tokens, layer by layer.

    Args:
        layers: Layers of the base.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._sums = {layer: torch.zeros(2, 2, dtype=torch.float64) for layer in layers}
        self._counts = torch.zeros(2, dtype=torch.float64)

    def add(self, base: Tensors, tuned: Tensors, real: torch.Tensor) -> None:
        """Take a batch.

        Args:
            base: Layer to states (batch, seq, hidden) of the base.
            tuned: The same of the tuned model.
            real: (batch, seq), True where no pad; passages begin in the first column.
        """
        first = torch.zeros_like(real)
        first[:, 0] = real[:, 0]
        parts = torch.stack([first, real & ~first]).double()
        self._counts += parts.sum(dim=(1, 2))
        for layer, sums in self._sums.items():
            one, other = _precise(base[layer]), _precise(tuned[layer])
            drift = (other - one).norm(dim=-1) / one.norm(dim=-1)
            cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1)
            for number, values in enumerate((drift, cosine)):
                kept = torch.where(real, values.double().cpu(), 0.0)
                sums[number] += (parts * kept).sum(dim=(1, 2))

    def means(self) -> dict[int, dict[str, float | None]]:
        """The means.

        Returns:
            Layer to drift, drift_without_first, cosine, cosine_without_first; None where there was no token.
        """
        found: dict[int, dict[str, float | None]] = {}
        for layer, sums in self._sums.items():
            found[layer] = {}
            for name, (first, others) in zip(_NUMBERS, sums.tolist(), strict=True):
                found[layer][name] = _ratio(first + others, float(self._counts.sum()))
                found[layer][f"{name}_without_first"] = _ratio(others, float(self._counts[1]))
        return found


class TokenSample:
    """States of an evenly spread sample of tokens, first tokens left out.

    Args:
        lengths: Tokens of each passage, in the order of their numbers.
        layers: Layers of the base.
        hidden_size: Width of the states.
    """

    def __init__(self, lengths: Sequence[int], layers: Sequence[int], hidden_size: int) -> None:
        most = min(SAMPLE_TOKENS, max(64, _SAMPLE_BYTES // (8 * hidden_size * max(1, len(layers)))))
        passage = np.repeat(np.arange(len(lengths)), [max(0, n - 1) for n in lengths])
        column = np.concatenate([np.arange(1, max(1, n)) for n in lengths])
        if len(passage) > most:
            chosen = np.linspace(0, len(passage) - 1, most).round().astype(int)
            passage, column = passage[chosen], column[chosen]
        self._columns = {i: column[passage == i] for i in range(len(lengths))}
        self._kept: dict[int, tuple[list[Any], list[Any]]] = {layer: ([], []) for layer in layers}

    def add(self, base: Tensors, tuned: Tensors, batch: Batch) -> None:
        """Keep what is wanted of a batch.

        Args:
            base: Layer to states (batch, seq, hidden) of the base.
            tuned: The same of the tuned model.
            batch: Which passages these are.
        """
        rows = np.repeat(np.arange(len(batch.numbers)), [len(self._columns[i]) for i in batch.numbers])
        columns = np.concatenate([self._columns[i] for i in batch.numbers])
        if not len(rows):
            return
        for layer, sides in self._kept.items():
            for kept, states in zip(sides, (base[layer], tuned[layer]), strict=True):
                kept.append(_precise(states[rows, columns]).cpu().numpy())

    def similarity(self) -> dict[str, Any]:
        """Debiased linear CKA of every layer of the base with every layer of the tuned model.

        Returns:
            tokens, layers, all_dimensions and without_top (rows: the base's layers), chance, chance_without_top, left_out;
            or tokens and note where there are too few.
        """
        layers = list(self._kept)
        sides = [[_joined(self._kept[layer][side]) for layer in layers] for side in (0, 1)]
        tokens = len(sides[0][0])
        if tokens < FEWEST:
            return {"tokens": tokens, "note": f"{tokens} tokens are too few: CKA needs {FEWEST} at least"}
        cut = [[without_top_dimensions(layer) for layer in side] for side in sides]
        return {
            "tokens": tokens,
            "layers": layers,
            "all_dimensions": _plain(cka_matrix(*sides)),
            "chance": chance_level(*sides),
            "without_top": _plain(cka_matrix(*cut)),
            "chance_without_top": chance_level(*cut),
            "left_out": TOP_DIMENSIONS,
        }


def diagonal(similarity: Mapping[str, Any], name: str) -> list[float | None]:
    """The similarity of each layer with itself.

    Args:
        similarity: From `TokenSample.similarity`.
        name: "all_dimensions" or "without_top".

    Returns:
        One number for each layer; empty where there is none.
    """
    return [row[i] for i, row in enumerate(similarity.get(name, ()))]


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _joined(parts: list[Any]) -> npt.NDArray[np.floating]:
    """The kept rows of one layer."""
    return np.concatenate(parts) if parts else np.zeros((0, 1))


def _plain(matrix: npt.NDArray[np.float64]) -> list[list[float | None]]:
    """A matrix for JSON; None where a layer does not vary."""
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]


def _ratio(total: float, count: float) -> float | None:
    """A mean; None without terms or where it is no number."""
    return total / count if count and np.isfinite(total) else None
