"""Gradient norms per tensor, group and layer, with one reduction and one transfer per step.

|g_group| = sqrt(sum over the group's tensors of |g|^2), L2, of the gradient as it stands in `.grad` when asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peftlab.family import FamilyMap
from peftlab.mapping import map_model
from peftlab.schedule import GROUPS


@dataclass(frozen=True, slots=True)
class Reading:
    """The norms of one step's gradients.

    Attributes:
        norms: Parameter name to the L2 norm of its gradient; parameters without a gradient are absent.
    """

    norms: Mapping[str, float]

    def not_finite(self) -> list[str]:
        """Names of the tensors whose gradient holds NaN or an infinity."""
        return [name for name, norm in self.norms.items() if not math.isfinite(norm)]

    def zero(self) -> list[str]:
        """Names of the tensors whose gradient is exactly zero."""
        return [name for name, norm in self.norms.items() if norm == 0]


@dataclass(frozen=True, slots=True)
class DeviceNorms:
    """The norms of one step's gradients, still where the gradients are.

    Attributes:
        names: The tensors with a gradient, in the order of the parameters.
        parts: For each device the tensors' names and their norms, (tensors,).
        scale: What the loss was multiplied by.
    """

    names: tuple[str, ...]
    parts: tuple[tuple[tuple[str, ...], torch.Tensor], ...]
    scale: float

    def read(self) -> Reading:
        """The norms on the host, in one transfer per device."""
        norms: dict[str, float] = {}
        for names, values in self.parts:
            found = values.tolist()
            norms |= {name: value / self.scale for name, value in zip(names, found, strict=True)}
        return Reading({name: norms[name] for name in self.names})


def take_norms(parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0) -> DeviceNorms:
    """Norms of the gradients that stand in `.grad` now; the host waits for nothing.

    Args:
        parameters: The tensors to look at, by name.
        scale: What the loss was multiplied by (fp16 loss scaling); divided out when they are read.

    Returns:
        The norms, taken in the gradient's dtype (half precisions in float32).
    """
    found: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is not None:
            found.setdefault(gradient.device, []).append((name, gradient.detach()))
    parts = []
    for tensors in found.values():
        wide = [g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for _, g in tensors]
        each = torch._foreach_norm(wide)
        widest = torch.float64 if any(n.dtype == torch.float64 for n in each) else torch.float32
        parts.append((tuple(name for name, _ in tensors), torch.stack([n.to(widest) for n in each])))
    taken = {name for names, _ in parts for name in names}
    return DeviceNorms(tuple(name for name in parameters if name in taken), tuple(parts), scale)


def read_gradients(parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0) -> Reading:
    """Norms of the gradients that stand in `.grad` now.

    Args:
        parameters: The tensors to look at, by name.
        scale: What the loss was multiplied by (fp16 loss scaling); divided out.

    Returns:
        The reading; one reduction and one transfer per device.
    """
    return take_norms(parameters, scale=scale).read()


class GradientGroups:
    """Sums a reading into groups and layers for one model.

    Args:
        family: The model's map.
        parameters: All tensors that can train, by name.
    """

    def __init__(self, family: FamilyMap, parameters: Mapping[str, nn.Parameter]) -> None:
        sites = {name: family.locate(name) for name in parameters}
        self._group = {name: site.group for name, site in sites.items()}
        self._column = {name: family.column(site) for name, site in sites.items()}
        self._size = {name: p.numel() for name, p in parameters.items()}
        self.columns = list(dict.fromkeys(c for c in self._column.values() if c is not None))

    def sum(self, reading: Reading, *, layers: bool = True) -> dict[str, Any]:
        """Group and layer norms of one reading.

        Args:
            reading: The norms per tensor.
            layers: Whether to sum layers too.

        Returns:
            `attention_norm`, `mlp_norm`, `embed_norm`, `lm_head_norm`, `other_norm`, `total_norm`: floats, None where
            no tensor of the group has a gradient; `layer_data`: column to float or None; `num_parameters`: group to
            the number of its parameters that had a gradient.
        """
        squares: dict[str, list[float]] = {group: [] for group in GROUPS}
        columns: dict[str, list[float]] = {column: [] for column in self.columns}
        counts = dict.fromkeys(GROUPS, 0)
        for name, norm in reading.norms.items():
            squares[self._group[name]].append(norm * norm)
            counts[self._group[name]] += self._size[name]
            column = self._column[name]
            if column is not None:
                columns[column].append(norm * norm)
        result: dict[str, Any] = {f"{group}_norm": _root(terms) for group, terms in squares.items()}
        result["total_norm"] = _root([term for terms in squares.values() for term in terms])
        result["layer_data"] = {c: _root(terms) for c, terms in columns.items()} if layers else {}
        result["num_parameters"] = counts | {"total": sum(counts.values())}
        return result


def _root(squares: list[float]) -> float | None:
    """Square root of a sum, None for nothing to sum; infinities and NaN come through."""
    return float(np.sqrt(np.sum(squares))) if squares else None


def measure_gradient_norms(model: nn.Module) -> dict[str, Any]:
    """Gradient norms of a model after a backward pass.

    Args:
        model: A transformers model, bare or wrapped by peft, whose trainable tensors have gradients.

    Returns:
        `attention_norm`, `mlp_norm`, `embed_norm`, `lm_head_norm`, `other_norm`, `total_norm` (None for a group without
        a gradient), `layer_data` (`layer_0_attention`, ... to float or None) and `num_parameters`.

    Raises:
        ModelError: The model has no transformer blocks.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or p.grad is not None}
    groups = GradientGroups(map_model(model), parameters)
    return groups.sum(read_gradients(parameters))
