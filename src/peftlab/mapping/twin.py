"""A twin: a tiny random model of the same architecture, on which proofs are cheap.

The twin has the model's class and a config of the same shape with small sizes (`twin_sizes.py`); norm gains, biases and
gates are random, because a model as it is initialised hides faults.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftlab.mapping.twin_sizes import FILLED, HEADS, KEY_VALUE_HEADS, LAYERS, SIZES, VOCABULARY

ROWS, LENGTH = 2, 12
"""Rows, and tokens of a row, in the experiments."""
_MORE = 3
"""Tokens by which the sequences of a twin's encoder and decoder differ."""
_CLASSIFIES = "ForSequenceClassification"
"""How transformers' classes are called that answer with a class of a text."""


def twin_config(config: Any, *, num_layers: int = 4, changes: Mapping[str, Any] | None = None) -> Any:
    """A config of the same architecture with small sizes.

    Args:
        config: A transformers config; not changed.
        num_layers: Most layers of a stack.
        changes: What this model type needs beyond the table: attribute to value.

    Returns:
        The small config.
    """
    small = copy.deepcopy(config)
    _shrink(small, num_layers, changes or {})
    return small


def _shrink(config: Any, num_layers: int, changes: Mapping[str, Any]) -> None:
    """Make one config and those inside it small, in place."""
    kept = dict(vars(config))
    depth = max([v for k, v in kept.items() if k in LAYERS and isinstance(v, int)] or [0])
    heads = max(
        [v for k, v in kept.items() if SIZES.get(k) == HEADS and "head" in k and isinstance(v, int)]
        or [HEADS]
    )
    for name, value in kept.items():
        if name in changes:
            continue
        if _is_config(value):
            _shrink(value, num_layers, {})
        elif name.endswith(("token_id", "token_index")):
            _set(config, name, _small_token(value))
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int):
            _set(config, name, _small(name, value, num_layers, heads))
        elif isinstance(value, list | tuple):
            cut = value[:num_layers] if len(value) == depth > num_layers else value
            _set(config, name, type(value)(_small_item(name, item) for item in cut))
    if kept.get("head_dim") is not None and kept.get("head_dim") == kept.get("qk_rope_head_dim"):
        _set(config, "head_dim", SIZES["qk_rope_head_dim"])  # DeepSeek's rotary width under its other name
    for name in FILLED & kept.keys():
        if kept[name] is None:
            _set(config, name, SIZES.get(name, HEADS))
    _set(
        config, "_attn_implementation_internal", None
    )  # the library's own choice: a twin runs on any machine
    if "use_cache" in kept:
        _set(config, "use_cache", False)
    for name, value in changes.items():
        if isinstance(value, Mapping) and _is_config(kept.get(name)):
            _shrink(kept[name], num_layers, value)
        else:
            _set(config, name, value)


def _small(name: str, value: int, num_layers: int, heads: int) -> int:
    """The size of one attribute in a twin."""
    if name in LAYERS:
        return min(value, num_layers)
    if name in KEY_VALUE_HEADS:
        own = min(heads, HEADS)  # as many as the twin has heads, one, or in between
        return own if value >= heads else 1 if value == 1 else max(1, own // 2)
    return min(value, SIZES.get(name, value))


def _small_item(name: str, item: Any) -> Any:
    """One item of a list that holds a size for each layer (Gemma 3n's widths)."""
    return min(item, SIZES.get(name, item)) if isinstance(item, int) and not isinstance(item, bool) else item


def _small_token(value: Any) -> Any:
    """Token ids inside a twin's vocabulary."""
    if isinstance(value, int) and value >= VOCABULARY:
        return 3 + value % 5
    if isinstance(value, list):
        return [_small_token(item) for item in value]
    return value


def _set(config: Any, name: str, value: Any) -> None:
    """Set an attribute without a config's own checks, which see a half-changed config."""
    object.__setattr__(config, name, value)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def build_twin(
    model_class: type[nn.Module], config: Any, *, seed: int = 0, told_apart: bool = True
) -> nn.Module:
    """A tiny random model.

    Args:
        model_class: The class of the model.
        config: From `twin_config`.
        seed: Seeds every tensor.
        told_apart: Whether an encoder-decoder that classifies, and reads one text twice, has some tokens more in its
            encoder: experiments tell two sequences by their lengths.

    Returns:
        The twin in evaluation mode, float32, on the CPU.
    """
    build = getattr(model_class, "_from_config", model_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin: nn.Module = build(config)
        randomise(twin)
    if told_apart and classifies_by_decoder(twin):
        encoder: Any = twin
        encoder.get_encoder().register_forward_pre_hook(_lengthen, with_kwargs=True)
    return twin.float().eval()


def randomise(model: nn.Module) -> None:
    """Move every vector (norm gains, biases, gates) away from its initial value and give matrices a useful size.

    Args:
        model: A model; changed in place.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * noise)


def twin_inputs(model: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """What one forward pass of a model takes.

    Args:
        model: A model.
        seed: Seeds the tokens.

    Returns:
        input_ids (2, 12), decoder_input_ids (2, 9) for encoder-decoder models that generate, pixel_values for models that
        see. An encoder-decoder that classifies gives its decoder the same text, and answers from the eos that ends each row.
    """
    config: Any = model.config
    source = torch.Generator().manual_seed(seed)
    main = getattr(model, "main_input_name", "input_ids")
    vocabulary = min(VOCABULARY, getattr(config.get_text_config(), "vocab_size", VOCABULARY) or VOCABULARY)
    ids = torch.randint(10, vocabulary - 10, (ROWS, LENGTH), generator=source)
    inputs: dict[str, torch.Tensor] = {}
    if main != "pixel_values":
        inputs["input_ids"] = ids
    if main == "pixel_values" or _has_two_towers(config):
        seen = getattr(config, "vision_config", config)
        size = seen.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.randn(ROWS, seen.num_channels, height, width, generator=source)
    if classifies_by_decoder(model):
        inputs["input_ids"] = with_end(model, ids)
    elif getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(0)[:, : LENGTH - _MORE]
    return inputs


def classifies_by_decoder(model: Any) -> bool:
    """Whether a model is an encoder-decoder that classifies: its decoder reads the encoder's own text.

    Args:
        model: A model.

    Returns:
        Whether it is.
    """
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(decodes) and type(model).__name__.endswith(_CLASSIFIES)


def _lengthen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let an encoder read its first tokens once more at the end."""
    ids: Any = kwargs.get("input_ids", args[0] if args else None)
    longer = torch.cat((ids, ids[:, :_MORE]), dim=1)
    return (longer, *args[1:]) if args else args, kwargs if args else kwargs | {"input_ids": longer}


def with_end(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Rows whose last token is the one that ends a text.

    Args:
        model: A model.
        ids: Token rows, (rows, tokens).

    Returns:
        New rows of the same shape.
    """
    end = getattr(model.config, "eos_token_id", None)
    token = end[0] if isinstance(end, list) else 1 if end is None else end
    return torch.cat((ids[:, :-1], torch.full_like(ids[:, :1], int(token))), dim=1)


def _has_two_towers(config: Any) -> bool:
    """Whether a model reads a text and a picture beside each other (CLIP), not pictures inside a text."""
    names = ("image_token_id", "image_token_index")
    return hasattr(config, "vision_config") and not any(hasattr(config, name) for name in names)
