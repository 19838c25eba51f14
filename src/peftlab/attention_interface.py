"""Seeing what attention computes: queries, keys and values of every layer, through transformers' own interface.

Models that call transformers' `AttentionInterface` give each layer's query, key, value, mask and scaling to a function
chosen by name in their config. `observed_attention` puts a function there that first shows them to an observer and then
does what the model did before. Nothing is patched; the configs are restored when the context ends.

Source: transformers `modeling_utils.AttentionInterface`, `masking_utils.AttentionMaskInterface`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_NAME = "peftlab_observed"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer's attention is given.

    Attributes:
        module: The attention core that calls.
        query: (batch, heads, query, head).
        key: (batch, key heads, key, head).
        value: (batch, key heads, key, head).
        mask: Additive or boolean, broadcast over (batch, heads, query, key); None where nothing or causality alone masks.
        scaling: Factor on the scores; None stands for head ** -0.5.
        options: What else the layer passes: position_bias, sinks, softcap, sliding_window, is_causal, dropout.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict)


Observer = Callable[[AttentionCall], None]


@contextmanager
def observed_attention(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show every attention call of a model to an observer; the model computes what it did before.

    Args:
        model: A transformers model, bare or wrapped by peft.
        observer: Is given each call, before the attention is computed.

    Yields:
        Nothing; within, the model is observed.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    configs = attention_configs(model)
    before = {id(config): config._attn_implementation_internal for config in configs}

    def observed(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        observer(AttentionCall(module, query, key, value, attention_mask, scaling, options))
        compute = _function_of(module, before.get(id(getattr(module, "config", None))))
        if scaling is not None:
            options["scaling"] = scaling
        return compute(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(_NAME, observed)
    masks = AttentionMaskInterface()
    implementation = next((name for name in before.values() if name in masks), "sdpa")
    AttentionMaskInterface.register(_NAME, masks[implementation])
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config in configs:
            config._attn_implementation_internal = before[id(config)]
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


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


def _function_of(module: nn.Module, implementation: str | None) -> Callable[..., Any]:
    """The attention function that a module would have called.

    Args:
        module: The attention core.
        implementation: What its config named.

    Returns:
        The function.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Callable[..., Any] | None = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", None
    )
    if implementation in (None, "eager") and eager is not None:
        return eager
    chosen: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[
        implementation if implementation != "eager" else "sdpa"
    ]
    return chosen
