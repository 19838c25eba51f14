"""What the norms of a model do to its hidden states: RMSNorm against LayerNorm, on real texts.

LayerNorm takes the mean of a vector off and divides by its standard deviation; RMSNorm divides by its root mean square
and keeps the mean. How much that matters is one number: the share of a vector's energy that lies in its mean, which is
what LayerNorm takes off and RMSNorm leaves in.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.errors import ConfigError
from peftlab.family import FamilyMap
from peftlab.inspection.reading_limits import ReadingLimits
from peftlab.mapping import unwrap


@dataclass(frozen=True, slots=True)
class NormStatistics:
    """What one norm does to the real positions of some texts.

    Attributes:
        path: The norm.
        layer: Its block.
        kind: "layernorm" if adding a constant to its input leaves its output as it is, else "rmsnorm": tried on these
            hidden states with the real weights.
        input_mean: Mean of its input's components, averaged over positions.
        input_std: Standard deviation of its input's components, averaged over positions.
        input_rms: Root mean square of its input.
        output_rms: Root mean square of its output, gain and bias included.
        mean_share: Share of the input's energy that lies in its mean, 0 to 1.
    """

    path: str
    layer: int
    kind: str
    input_mean: float
    input_std: float
    input_rms: float
    output_rms: float
    mean_share: float


@contextmanager
def watched_modules(
    model: nn.Module, paths: Iterable[str], calls: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Keep what goes into some modules and what comes out, last call each.

    Args:
        model: The model.
        paths: Modules of it.
        calls: Filled within the block: path to first argument and (first) output.

    Yields:
        Nothing.
    """
    hooks = []
    try:
        for path in paths:

            def keep(_module: nn.Module, arguments: Any, output: Any, path: str = path) -> None:
                calls[path] = (arguments[0], output if isinstance(output, torch.Tensor) else output[0])

            hooks.append(model.get_submodule(path).register_forward_hook(keep))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def norm_statistics(
    model: nn.Module,
    family: FamilyMap,
    inputs: Mapping[str, Any],
    *,
    stack: str,
    layers: Sequence[int] | None = None,
    real: torch.Tensor | None = None,
) -> list[NormStatistics]:
    """Statistics of the norms whose input is one vector for each position; those on the heads of queries are left out.

    Args:
        model: A model, in evaluation mode.
        family: Its map.
        inputs: Arguments of its forward pass, one batch.
        stack: A stack of the map.
        layers: Blocks of that stack; None takes all.
        real: (batch, seq), True where the stack reads no pad; None where there is none.

    Returns:
        One entry for each norm, in the model's order.

    Raises:
        ConfigError: There is no such layer.
        DataError: The inputs have more positions than the model reads, or unknown token ids.
    """
    blocks = range(family.num_blocks(stack))
    wanted = set(blocks if layers is None else layers)
    if not wanted <= set(blocks):
        raise ConfigError(
            f"layers {sorted(wanted)}: the norms of stack '{stack}' lie in its blocks 0 to {len(blocks) - 1}"
        )
    sites = [s for s in family.sites if s.role == "norm" and s.stack == stack and s.layer in wanted]
    ReadingLimits(model).check_inputs(inputs)
    calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode():
        with watched_modules(model, [site.path for site in sites], calls):
            model(**inputs)
        found = []
        for site in sites:
            rows = [_real_rows(t, real, family.layout(stack)) for t in calls.get(site.path, ())]
            if rows and rows[0] is not None and rows[1] is not None and site.layer is not None:
                norm = unwrap(model.get_submodule(site.path))
                found.append(_statistics(site.path, site.layer, norm, rows[0], rows[1]))
    return found


def _real_rows(hidden: torch.Tensor, real: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    """Hidden states of real positions, (positions, hidden); None where there is not one vector for each position."""
    rows = hidden.flatten(0, -2)
    if real is None:
        return rows if hidden.dim() == 3 else None
    places = (real.T if layout == "sbh" else real).flatten().to(rows.device)
    return rows[places] if len(places) == len(rows) else None


def _statistics(
    path: str, layer: int, norm: nn.Module, before: torch.Tensor, after: torch.Tensor
) -> NormStatistics:
    """One norm's statistics over rows (positions, hidden)."""
    rows = before.double()
    mean, energy = rows.mean(dim=-1), rows.square().mean(dim=-1)
    shifted = norm(before + before.std())
    takes_mean_off = torch.allclose(shifted, norm(before), rtol=1e-2, atol=1e-2 * float(after.abs().mean()))
    return NormStatistics(
        path=path,
        layer=layer,
        kind="layernorm" if takes_mean_off else "rmsnorm",
        input_mean=float(mean.mean()),
        input_std=float(rows.std(dim=-1, correction=0).mean()),
        input_rms=float(energy.mean().sqrt()),
        output_rms=float(after.double().square().mean().sqrt()),
        mean_share=float(mean.square().sum() / energy.sum()),
    )
