"""How attention can be had from a model, measured against its own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from peftlab.attention_interface import AttentionCall, observed_attention
from peftlab.errors import EvaluationError, ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.attention import AttentionPatterns, get_attention_patterns
from peftlab.inspection.attention_choice import Choice, Kind, Numbering, choose, mixers
from peftlab.inspection.attention_source import recorded_attention, run, undisturbed
from peftlab.mapping import map_model

Answer = Literal["probe", "output_attentions", "refused"]

EQUAL = 1e-4
"""Most that recomputed and eager probabilities may differ by."""


@dataclass(frozen=True, slots=True)
class AttentionVerdict:
    """How attention can be had from one model.

    Attributes:
        answer: "probe" where the recomputed probabilities equal the eager ones in every stack and kind that runs;
            "output_attentions" where some must come from the model itself; else "refused".
        reason: Why it is not "probe"; "" where it is.
        difference: The largest difference between recomputed and eager probabilities; None where none were compared.
        unchanged: Whether the model's output was bit-equal while it was watched.
    """

    answer: Answer
    reason: str
    difference: float | None
    unchanged: bool

    def __str__(self) -> str:
        return f"refused: {self.reason}" if self.answer == "refused" else self.answer


def measure_attention(
    model: nn.Module, inputs: Mapping[str, Any], *, family: FamilyMap | None = None
) -> AttentionVerdict:
    """Measure how attention can be had from a model.

    Args:
        model: A small model in float32; all its maps are kept at once.
        inputs: Arguments of its forward pass, a decoder's input included.
        family: Its map where it is at hand.

    Returns:
        The verdict.
    """
    unchanged = _unchanged(model, inputs)
    try:
        family = family or map_model(model)
        found = [
            _compare(model, family, inputs, stack, kind) for stack, kind in _that_run(model, family, inputs)
        ]
    except (ModelError, EvaluationError) as error:
        return AttentionVerdict("refused", str(error), None, unchanged)
    reasons = [reason for reason, _ in found if reason]
    difference = max((value for _, value in found if value is not None), default=None)
    if not found:
        reasons = [f"no token mixer in the map of this {family.model_type} model"]
    elif difference is not None and not difference <= EQUAL:
        if next(model.parameters()).dtype == torch.float32:
            return _measure_precisely(model, inputs, family, difference)
        reasons = [f"recomputed and eager attention differ by {difference:.2g}"]
        found = []
    answer: Answer = "refused" if not found else "output_attentions" if reasons else "probe"
    return AttentionVerdict(answer, "; ".join(reasons), difference, unchanged)


def _measure_precisely(
    model: nn.Module, inputs: Mapping[str, Any], family: FamilyMap, difference: float
) -> AttentionVerdict:
    """The verdict in float64: where scores are in the thousands (MobileBERT), float32 runs differ by rounding alone."""
    precise = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    try:
        return measure_attention(copy.deepcopy(model).double(), precise, family=family)
    except RuntimeError as error:
        reason = f"recomputed and eager attention differ by {difference:.2g}, and in float64 it does not run: {error}"
        return AttentionVerdict("refused", reason, difference, True)


def _unchanged(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether what a model gives is bit-equal while it is watched."""
    calls: list[AttentionCall] = []
    with undisturbed(model):
        before = run(model, inputs)
        with observed_attention(model, calls.append):
            watched = run(model, inputs)
    return torch.equal(_first(before), _first(watched))


def _first(outputs: Any) -> torch.Tensor:
    """The first tensor that a model gives."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return next(value for value in values if isinstance(value, torch.Tensor))


def _that_run(model: nn.Module, family: FamilyMap, inputs: Mapping[str, Any]) -> list[tuple[str, Kind]]:
    """The stacks and kinds of attention that these inputs reach: a tower for images rests where there are none."""
    ran: set[nn.Module] = set()
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: ran.add(module))
    try:
        with undisturbed(model):
            run(model, inputs)
    finally:
        hook.remove()
    return [
        (stack, kind)
        for stack in family.stacks
        for kind in get_args(Kind)
        if any(model.get_submodule(site.path) in ran for site in mixers(family, stack, kind))
    ]


def _compare(
    model: nn.Module, family: FamilyMap, inputs: Mapping[str, Any], stack: str, kind: Kind
) -> tuple[str, float | None]:
    """Attention of one stack and kind against the model's eager one: why not by the probe ("" where by it), difference."""
    patterns = get_attention_patterns(model, None, None, inputs=inputs, stack=stack, kind=kind, family=family)
    if patterns.source == "output_attentions":
        return patterns.note, None
    choice = choose(family, stack=stack, kind=kind)
    reference = _eager_maps(model, family, choice, inputs)
    beside = {name: rows for name, rows in reference.items() if name not in patterns.weights}
    alone = [name for name, rows in beside.items() if _is_attention(rows, patterns.query_real)]
    alone += [name for name in patterns.weights if name not in reference]
    if alone:
        raise ModelError(f"recomputed and eager attention are not of the same layers: {', '.join(alone)}")
    difference = max(_difference(patterns, name, reference[name]) for name in patterns.weights)
    return "", difference


def _eager_maps(
    model: nn.Module, family: FamilyMap, choice: Choice, inputs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The maps that a model's own eager attention makes, as it records them, or as they pass where it records none."""
    passing: dict[int, torch.Tensor] = {}
    number = Numbering(model, family, choice)

    def keep(call: AttentionCall) -> None:
        layer = number(call)
        if layer is not None and call.weights is not None:
            passing[layer] = call.weights

    with undisturbed(model), observed_attention(model, keep):
        try:
            maps = recorded_attention(model, family, choice, inputs, "")
        except ModelError:
            maps = passing
    return {f"layer_{layer}": rows for layer, rows in maps.items()}


def _is_attention(rows: torch.Tensor, real: torch.Tensor) -> bool:
    """Whether what a model records has rows that sum to one (MiniMax records its linear attention too)."""
    if rows.dim() != 4 or rows.shape[::2] != real.shape:
        return False
    return bool((rows.float().sum(dim=-1).movedim(1, 2)[real] - 1).abs().max() < EQUAL)


def _difference(patterns: AttentionPatterns, name: str, eager: torch.Tensor) -> float:
    """The largest difference of one layer's maps at real queries."""
    ours, sinks = patterns.weights[name], patterns.sinks.get(name)
    real = patterns.query_real[:, None, :, None].expand(*ours.shape[:-1], 1)
    if ours.shape != eager.shape:
        return torch.inf
    ours, eager = ours[real[..., 0]], eager.cpu().float()[real[..., 0]]
    if sinks is not None and eager.sum(dim=-1).min() > 1 - EQUAL:
        ours = ours / ours.sum(dim=-1, keepdim=True)  # Granite's map is before its sink's share
    return float((ours - eager).abs().max())
