"""Seeing what attention computes: queries, keys, values, mask and output of every layer, as the model runs.

Models that use transformers' `AttentionInterface` ask it, at every call, for the function that computes attention.
`observed_attention` answers with that very function, followed by a look at what went in and came out. No config changes,
so masks, kernels and every branch on the implementation's name stay as they are, and what the model gives is bit-equal.
`attention_rows` computes the probabilities that such a call used, for chosen heads and queries.

Source: transformers `modeling_utils.AttentionInterface`, `integrations/sdpa_attention.py`, each model's
`eager_attention_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlab.errors import ModelError


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """What one layer's attention is given, and what it makes of it.

    Attributes:
        module: The attention core that calls.
        query: (batch, heads, query, head).
        key: (batch, key heads, key, head); heads are a multiple of key heads.
        value: (batch, key heads, key, value head).
        mask: Additive or boolean (True may be seen), broadcast over (batch, heads, query, key); (batch, key) under flash
            attention; None where nothing or causality alone masks.
        scaling: Factor on the scores; None stands for head ** -0.5.
        options: What else the layer passes: position_bias, sinks or s_aux, softcap, sliding_window, is_causal, dropout.
        implementation: Which one computes: "eager", "sdpa", "flash_attention_2" ...; it decides what mask None means.
        output: (batch, query, heads, value head): what it computed, before the output projection.
        weights: (batch, heads, query, key): the probabilities, where the implementation gives them (eager); else None.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict)
    implementation: str = "eager"
    output: torch.Tensor | None = None
    weights: torch.Tensor | None = None


Observer = Callable[[AttentionCall], None]


@contextmanager
def observed_attention(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show every attention call of a model to an observer; the model computes what it did before.

    Contexts nest: each observer sees the calls of its own model. Other models are not observed.

    Args:
        model: A transformers model, bare or wrapped by peft, or a part of one.
        observer: Is given each call, after the attention is computed. What it raises ends the forward pass.

    Yields:
        Nothing; within, the model is observed.
    """
    from transformers.modeling_utils import AttentionInterface

    members = set(model.modules())
    answer = AttentionInterface.get_interface

    def get_interface(interface: Any, attn_implementation: str, default: Callable[..., Any]) -> Any:
        compute = answer(interface, attn_implementation, default)

        def observed(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any
        ) -> Any:
            computed = compute(module, query, key, value, attention_mask, **options)
            if module in members:
                output, weights = computed
                seen = {name: option for name, option in options.items() if name != "scaling"}
                observer(
                    AttentionCall(
                        module, query, key, value, attention_mask, options.get("scaling"), seen,
                        attn_implementation or "eager", output, weights,
                    )
                )  # fmt: skip
            return computed

        return observed

    # A name registered in the interface would have to be set in the configs, and models that read the name there build
    # other masks, or skip their sparse index; and no name stands for each model's own eager function.
    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = answer


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention eagerly, so that `output_attentions=True` gives weights.

    Args:
        model: Any transformers model, bare or wrapped by peft.

    Yields:
        Nothing; within, every config of the model names the eager implementation.
    """
    configs = attention_configs(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def attention_configs(model: nn.Module) -> list[Any]:
    """Every config object in a model that names an attention implementation, each once.

    Args:
        model: Any model.

    Returns:
        The config objects, those inside composite configs included.
    """
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", None) or {}:
            add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


@torch.no_grad()
def attention_rows(
    call: AttentionCall, *, heads: Sequence[int] | None = None, start: int = 0, stop: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The probabilities of an observed call, computed anew beside it.

    p = softmax(cap(q k^T scaling) + bias + mask | sink), in float32 at least and without gradients; only the asked heads
    and queries are computed.

    Args:
        call: What was observed.
        heads: Query heads, in the order wanted; None takes all.
        start: First query.
        stop: One past the last query; None goes to the end.

    Returns:
        Probabilities (batch, heads, stop - start, key); a query that may see nothing has zeros. And the mass on the learnt
        sink (batch, heads, stop - start), which the probabilities lack to one; None in models without learnt sinks.

    Raises:
        ModelError: The call's shapes or mask are of a kind that this does not know.
    """
    rows = slice(start, call.query.shape[-2] if stop is None else stop)
    query, key = _chosen(call, heads)
    scaling = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = (query[..., rows, :].to(precise) @ key.to(precise).transpose(-1, -2)).mul_(scaling)
    cap = call.options.get("softcap")
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    bias = call.options.get("position_bias")
    if bias is not None:
        scores += _part(bias, heads, rows, scores.shape[-1])
    _mask(scores, call, heads, rows)
    sinks = _sinks(call, heads, rows)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(precise).expand(*scores.shape[:-1], -1)], dim=-1)
    probabilities = scores.softmax(dim=-1)
    if call.mask is not None:
        probabilities.nan_to_num_(nan=0.0)  # softmax over nothing
    if sinks is None:
        return probabilities, None
    num_keys = key.shape[-2]
    return probabilities[..., :num_keys], probabilities[..., num_keys:].sum(dim=-1)


def attention_output(
    call: AttentionCall, rows: torch.Tensor, *, heads: Sequence[int] | None = None
) -> torch.Tensor:
    """What attention gives under some probabilities: the proof that they are the ones that the model used.

    Args:
        call: What was observed.
        rows: Probabilities (batch, heads, query, key).
        heads: The query heads that the rows are of; None for all.

    Returns:
        (batch, query, heads, value head), to be compared with the same part of `call.output`.
    """
    value = call.value[:, _key_heads(call, heads)].to(rows.dtype)
    return (rows @ value).transpose(1, 2)


def _chosen(call: AttentionCall, heads: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the chosen heads, the keys repeated where heads share them."""
    query, key = call.query, call.key
    if query.dim() != 4 or key.dim() != 4 or query.shape[1] % key.shape[1]:
        raise ModelError(
            f"{type(call.module).__name__} computes attention on queries of shape {tuple(query.shape)} and keys of shape"
            f" {tuple(key.shape)}; expected (batch, heads, seq, head) with heads a multiple of the key heads"
        )
    if heads is not None:
        query = query[:, list(heads)]
    return query, key[:, _key_heads(call, heads)]


def _key_heads(call: AttentionCall, heads: Sequence[int] | None) -> slice | list[int]:
    """The key heads that query heads read; a slice where it is all of them, so that nothing is copied."""
    num_heads, num_key_heads = call.query.shape[1], call.key.shape[1]
    if heads is None and num_heads == num_key_heads:
        return slice(None)
    group = num_heads // num_key_heads
    return [head // group for head in (range(num_heads) if heads is None else heads)]


def _part(tensor: torch.Tensor, heads: Sequence[int] | None, rows: slice, num_keys: int) -> torch.Tensor:
    """The part of something broadcast over (batch, heads, query, key) that chosen heads and queries need."""
    if heads is not None and tensor.shape[1] > 1:
        tensor = tensor[:, list(heads)]
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, rows]
    return tensor[..., :num_keys]


def _mask(scores: torch.Tensor, call: AttentionCall, heads: Sequence[int] | None, rows: slice) -> None:
    """Put scores under the call's mask, as its implementation reads it, in place."""
    mask, num_keys = call.mask, scores.shape[-1]
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4)):
        raise ModelError(
            f"{type(call.module).__name__} masks attention by a {type(mask).__name__}"
            f" ({call.implementation}); its probabilities can be computed under eager, sdpa and flash attention"
        )
    if mask is not None and mask.dim() == 4:
        part = _part(mask, heads, rows, num_keys)
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, -torch.inf)
        else:
            scores += part
        return
    seen = _seen_without_mask(call, rows, num_keys, scores.device)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~mask[:, None, None, :num_keys].bool(), -torch.inf)


def _seen_without_mask(
    call: AttentionCall, rows: slice, num_keys: int, device: torch.device
) -> torch.Tensor | None:
    """Which keys a query may see where no mask says so, (query, key); None stands for all.

    Under sdpa causality counts from the first key, under flash attention from the last, where a window may apply too; eager
    attention is causal by its mask alone.
    """
    flash = "flash" in call.implementation
    num_queries = call.query.shape[-2]
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if call.implementation == "eager" or (not flash and num_queries == 1):
        return None
    window = call.options.get("sliding_window") if flash else None
    if not causal and window is None:
        return None
    offset = num_keys - num_queries if flash else 0
    distance = (
        torch.arange(rows.start, rows.stop, device=device)[:, None]
        + offset
        - torch.arange(num_keys, device=device)
    )
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def _sinks(call: AttentionCall, heads: Sequence[int] | None, rows: slice) -> torch.Tensor | None:
    """Scores of the learnt sinks, broadcast over (batch, heads, query, sinks); sdpa knows none."""
    sinks: torch.Tensor | None = call.options.get("sinks", call.options.get("s_aux"))
    if sinks is None or call.implementation == "sdpa":
        return None
    sinks = sinks if sinks.dim() == 4 else sinks.reshape(1, -1, 1, 1)
    return _part(sinks, heads, rows, sinks.shape[-1])
