"""Where rows of attention come from: recomputed beside the model's own attention, or handed out by the model.

The asked layers are observed while the model runs as it is, and their probabilities are computed anew (`attention_rows`).
Each is proved on the spot: applied to the values, it must give what the model's attention gave. Where a model does not
reach transformers' attention interface, or the proof fails, `output_attentions=True` is asked instead, eagerly, for that
call only. Where neither answers, the model is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from peftlab.attention_interface import (
    AttentionCall,
    attention_output,
    attention_rows,
    eager_attention,
    observed_attention,
)
from peftlab.errors import ConfigError, EvaluationError, ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_choice import Choice, Numbering, check_heads, mixers, ranges
from peftlab.inspection.attention_inputs import RealPositions, base_of, side_of

Source = Literal["probe", "output_attentions"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of one layer's attention.

    Attributes:
        layer: The layer in its stack.
        start: The first query among them; rows that begin at 0 replace what was handed out for this layer before.
        probabilities: (batch, heads, rows, key), float32 at least, on the model's device; those of pads hold anything.
        sinks: (batch, heads, rows), the mass on learnt sinks; None in models without.
        query_real: (batch, query) over all queries, True where no pad.
        key_real: (batch, key), True where no pad.
    """

    layer: int
    start: int
    probabilities: torch.Tensor
    sinks: torch.Tensor | None
    query_real: torch.Tensor
    key_real: torch.Tensor


Receiver = Callable[[Rows], None]


def read_rows(
    model: nn.Module,
    family: FamilyMap,
    choice: Choice,
    inputs: Mapping[str, Any],
    receive: Receiver,
    *,
    chunk: int | None = None,
) -> tuple[Source, str]:
    """Run a model once and hand out the asked rows of attention.

    The model runs in evaluation mode and no further than the last asked layer; its mode is restored.

    Args:
        model: The mapped model.
        family: Its map.
        choice: What is asked for.
        inputs: Arguments of its forward pass, on its device.
        receive: Is given the rows of each layer, in order of queries.
        chunk: Queries at a time; None for all at once.

    Returns:
        Where the rows came from; and why not from the probe, or which layers have no attention ("" where nothing is to say).

    Raises:
        ConfigError: There is no such head.
        EvaluationError: The model hands out something that is no attention.
        ModelError: Neither way gives attention; the message says why.
    """
    with undisturbed(model):
        try:
            return "probe", _probe(model, family, choice, inputs, receive, chunk)
        except _Unproved as failure:
            _recorded(model, family, choice, inputs, receive, str(failure))
            return "output_attentions", str(failure)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is restored.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Unproved(Exception):
    """The probe could not give rows that are proved; says why."""


class _Enough(Exception):
    """The last asked layer has run; the rest of the forward pass is not needed."""


class _Watch:
    """Hands the rows of the asked layers on, as the model computes them, with their proof.

    Args:
        model: The mapped model.
        family: Its map.
        choice: What is asked for.
        real: Which positions are real.
        receive: Is given the rows.
        chunk: Queries at a time; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        choice: Choice,
        real: RealPositions,
        receive: Receiver,
        chunk: int | None,
    ) -> None:
        self.choice, self.real, self.receive, self.chunk = choice, real, receive, chunk
        self.number = Numbering(model, family, choice)
        self.seen: set[int] = set()

    def __call__(self, call: AttentionCall) -> None:
        """Take one call.

        Args:
            call: What was observed.

        Raises:
            _Unproved: A layer computes attention more than once, or not by these probabilities.
        """
        layer = self.number(call)
        if layer is None or not self.choice.includes(layer):
            return
        if layer in self.seen:
            raise _Unproved(f"layer {layer} computes attention more than once")
        self.seen.add(layer)
        try:
            with torch.autocast(call.query.device.type, enabled=False):  # float32 in any surroundings
                self._hand_on(layer, call)
        except ModelError as error:
            raise _Unproved(str(error)) from error

    def _hand_on(self, layer: int, call: AttentionCall) -> None:
        """Compute, prove and pass on the rows of one layer."""
        heads, num_queries = self.choice.heads, call.query.shape[-2]
        check_heads(heads, call.query.shape[1])
        real, key_real = self.real.fit(call.query, call.key.shape[-2], masked=call.mask is not None)
        worst = call.value.new_zeros((), dtype=torch.float32)
        chunk = self.chunk or num_queries
        for start in range(0, num_queries, chunk):
            rows, sinks = attention_rows(call, heads=heads, start=start, stop=min(start + chunk, num_queries))
            here = real[:, start : start + rows.shape[-2]]
            worst = torch.maximum(worst, _error(call, heads, rows, sinks, start, here).float())
            self.receive(Rows(layer, start, rows, sinks, real, key_real))
        allowed = tolerance(call.value.dtype)
        if not worst <= allowed:  # NaN too
            raise _Unproved(
                f"layer {layer}'s attention is not softmax(q k) v: its output differs from that of the probabilities, or"
                f" their sum from 1, by {float(worst):.2g} of the largest value, {allowed:g} is allowed"
            )


def _error(
    call: AttentionCall,
    heads: tuple[int, ...] | None,
    rows: torch.Tensor,
    sinks: torch.Tensor | None,
    start: int,
    real: torch.Tensor,
) -> torch.Tensor:
    """How far rows are from those the model used: by what they give, relative to the largest value, and by their sum."""
    if call.output is None or call.output.dim() != 4:
        raise ModelError(f"{type(call.module).__name__} gives no attention output to compare with")
    output = call.output[:, start : start + rows.shape[-2]]
    output = output if heads is None else output[:, :, list(heads)]
    distance = (attention_output(call, rows, heads=heads) - output).abs().amax(dim=(-1, -2))
    distance = distance / call.value.abs().max().clamp_min(torch.finfo(call.value.dtype).tiny)
    total = rows.sum(dim=-1) if sinks is None else rows.sum(dim=-1) + sinks
    both = torch.maximum(distance, (total - 1).abs().amax(dim=1))
    return torch.where(real, both, 0.0).max()


def tolerance(dtype: torch.dtype) -> float:
    """How far sums of probabilities, and outputs relative to the largest value, may be off.

    Args:
        dtype: What the model computes in.

    Returns:
        1e-4 in float32 and float64, 2e-2 in the half precisions.
    """
    return 1e-4 if torch.finfo(dtype).eps < 1e-6 else 2e-2


def _probe(
    model: nn.Module,
    family: FamilyMap,
    choice: Choice,
    inputs: Mapping[str, Any],
    receive: Receiver,
    chunk: int | None,
) -> str:
    """Hand out rows that are computed beside the model's own attention; returns what layers were left out."""
    watch = _Watch(model, family, choice, RealPositions.of(model, family, choice, inputs), receive, chunk)
    with _stopped_after(model, family, choice), observed_attention(model, watch):
        run(model, inputs)
    runs = watch.number.runs
    if choice.repeated and runs:
        beyond = [layer for layer in choice.layers or () if layer >= runs]
        if beyond:
            raise ConfigError(f"no {ranges(beyond)} in '{choice.stack}': its shared blocks run {runs} times")
        return ""
    known = [site.layer for site in mixers(family, choice.stack, choice.kind)]
    missing = [layer for layer in choice.layers or known if layer not in watch.seen]
    if not missing:
        return ""
    note = f"{ranges(missing)} of '{choice.stack}' did not call transformers' attention interface"
    if choice.layers or not watch.seen:
        raise _Unproved(note)
    return note


@contextmanager
def _stopped_after(model: nn.Module, family: FamilyMap, choice: Choice) -> Iterator[None]:
    """End a forward pass when the block of the last asked layer has run: later layers and the head cost nothing."""
    blocks = [model.get_submodule(site.path) for site in family.blocks(choice.stack)]
    last = max(choice.layers) if choice.layers else len(blocks) - 1
    left = last + 1 if choice.repeated else 1
    if choice.repeated and choice.layers is None:
        blocks = []  # how often they run is not known
    elif not choice.repeated:
        blocks = blocks[last : last + 1]

    def stop(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Enough

    hooks = [block.register_forward_hook(stop) for block in blocks]
    try:
        yield
    except _Enough:
        return
    finally:
        for hook in hooks:
            hook.remove()


def _recorded(
    model: nn.Module,
    family: FamilyMap,
    choice: Choice,
    inputs: Mapping[str, Any],
    receive: Receiver,
    unproved: str,
) -> None:
    """Hand out the rows that the model itself records under `output_attentions=True`."""
    positions = RealPositions.of(model, family, choice, inputs)
    for layer, rows in recorded_attention(model, family, choice, inputs, unproved).items():
        if not isinstance(rows, torch.Tensor) or rows.dim() != 4:
            raise EvaluationError(
                f"layer {layer} of this {family.model_type} model gives {_shape(rows)} as attention; expected"
                f" (batch, heads, query, key); nor can it be recomputed: {unproved}"
            )
        check_heads(choice.heads, rows.shape[1])
        query, key = positions.fit(rows, rows.shape[3], masked=True)
        rows = rows if choice.heads is None else rows[:, list(choice.heads)]
        total = torch.where(query[:, None], rows.float().sum(dim=-1), 1.0)
        if not (total - 1).abs().max() <= tolerance(rows.dtype):
            raise EvaluationError(
                f"layer {layer} of this {family.model_type} model gives rows of attention that sum to"
                f" {float(total.min()):.4g} to {float(total.max()):.4g} where 1 is expected; nor can they be recomputed:"
                f" {unproved}"
            )
        receive(Rows(layer, 0, rows.to(torch.promote_types(rows.dtype, torch.float32)), None, query, key))


def run(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """One forward pass that keeps no cache of keys and values.

    Args:
        model: Any transformers model, bare or wrapped by peft.
        inputs: Arguments of its forward pass.
        options: More of them.

    Returns:
        What it gives.
    """
    if "use_cache" in inspect.signature(base_of(model).forward).parameters:
        options = {"use_cache": False} | options
    return model(**{**options, **inputs})


def recorded_attention(
    model: nn.Module, family: FamilyMap, choice: Choice, inputs: Mapping[str, Any], unproved: str
) -> dict[int, torch.Tensor]:
    """The attention of the asked layers that a model itself gives under `output_attentions=True`, computed eagerly.

    Args:
        model: The mapped model, undisturbed.
        family: Its map.
        choice: What is asked for.
        inputs: Arguments of its forward pass.
        unproved: Why the attention is not recomputed, for the refusal.

    Returns:
        Layer to its attention.

    Raises:
        ModelError: It gives none, not that of every asked layer, or perhaps that of another stack.
    """
    refusal = f"no {choice.kind} attention can be had from this {family.model_type} model: {unproved}, and"
    accepted = inspect.signature(base_of(model).forward).parameters.values()
    if not any(p.name == "output_attentions" or p.kind is p.VAR_KEYWORD for p in accepted):
        raise ModelError(f"{refusal} its forward pass takes no output_attentions")
    with eager_attention(model), _given_by_mixers(model, family, choice) as of_stack:
        outputs = run(model, inputs, output_attentions=True, return_dict=True)
    side = side_of(model, family, choice.stack)
    name = "cross_attentions" if choice.kind == "cross" else f"{side}attentions"
    given = list(getattr(outputs, name, None) or ())
    stacks = [
        s for s in family.stacks if mixers(family, s, choice.kind) and side_of(model, family, s) == side
    ]
    numberings = [
        list(range(family.num_outputs(choice.stack))),
        [site.layer for site in mixers(family, choice.stack, choice.kind)],
    ]
    if choice.repeated:
        numberings = [list(range(len(given)))] if len(stacks) == 1 else []
    fitting = [n for n in numberings if len(n) == len(given) and len(set(n)) == len(n)]
    by_layer = dict(zip(fitting[0], given, strict=True)) if fitting else {}
    found = {i: rows for i, rows in by_layer.items() if rows is not None and choice.includes(i)}
    if not found or len(found) < len(choice.layers or ()):
        layers = family.num_outputs(choice.stack)
        raise ModelError(
            f"{refusal} under output_attentions=True it gives {len(given) or 'no'} maps for {layers} layers"
            f" as `{name}`"
        )
    if len(stacks) > 1 and not all(any(rows is own for own in of_stack) for rows in found.values()):
        raise ModelError(f"{refusal} what it gives as `{name}` does not come from its stack '{choice.stack}'")
    return found


@contextmanager
def _given_by_mixers(model: nn.Module, family: FamilyMap, choice: Choice) -> Iterator[list[torch.Tensor]]:
    """Collect the tensors that a stack's token mixers give: `attentions` names no stack, and a model may have several."""
    tensors: list[torch.Tensor] = []

    def collect(_: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            tensors.extend(item for item in output if isinstance(item, torch.Tensor))

    parts = (
        part
        for site in mixers(family, choice.stack, choice.kind)
        for part in model.get_submodule(site.path).modules()
    )
    hooks = [part.register_forward_hook(collect) for part in parts]
    try:
        yield tensors
    finally:
        for hook in hooks:
            hook.remove()


def _shape(value: Any) -> str:
    """How a value that should be attention looks."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
