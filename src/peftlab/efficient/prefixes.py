"""Prefixes where attention really reads them: in a transformers model's cache, in a plain module's nn.MultiheadAttention.

Attention(Q, [P_K; K], [P_V; V]) in every layer. A transformers model finds the prefix in its key-value cache, as peft puts
it there: positions of the text come after it, an encoder-decoder has it in its decoder's self-attention, and after each
call it is checked that every layer's cache grew. An nn.MultiheadAttention becomes a `PrefixedAttention` in its place, with
the same tensors under the same names; torch's own function computes it.

Source: Li and Liang 2021, arXiv 2101.00190, section 4; peft `PeftModel.get_prompt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache

from peftlab.efficient.embeddings import PrefixTuning
from peftlab.efficient.targets import Setting, Undo, leave_shortcuts
from peftlab.efficient.text_inputs import (
    NamedArguments,
    cached_tokens,
    longer_mask,
    shifted_positions,
    text_shape,
)
from peftlab.errors import ConfigError, MethodError

BY_HAND = """wire it by hand:
    manager.apply_prefix_tuning(num_layers=..., num_heads=..., head_dimension=..., by_hand=True)
    # in the attention of layer i, keys and values of (batch, seq, heads, head_dimension):
    prefix_key, prefix_value = manager.prefix_tuning.get_prefix_states(i)
    keys = torch.cat([prefix_key.expand(keys.size(0), -1, -1, -1), keys], dim=1)
    values = torch.cat([prefix_value.expand(values.size(0), -1, -1, -1), values], dim=1)
    # attention masks get as many columns in front"""
"""What a person has to write where it cannot be done for them."""


def check_sizes(given: PrefixTuning, layers: int, heads: int, features: int, where: str) -> None:
    """Refuse a prefix of other sizes than a model's attention.

    Args:
        given: The prefix.
        layers: The model's layers.
        heads: Its heads of keys and values.
        features: Features of one head.
        where: What the model is called.

    Raises:
        ConfigError: A size differs; names all.
    """
    sizes = (
        ("num_layers", given.num_layers, layers),
        ("num_heads", given.num_heads, heads),
        ("head_dimension", given.head_dimension, features),
    )
    wrong = [f"{name}={has} (it has {needs})" for name, has, needs in sizes if has != needs]
    if wrong:
        raise ConfigError(f"the prefix does not fit the keys and values of {where}: {', '.join(wrong)}")


class CachedPrefix:
    """A prefix in the key-value cache of every call of a transformers model.

    Args:
        model: The model.
        prefix: Keys and values.

    Attributes:
        undo: What to remove to have the model as it was.

    Raises:
        ConfigError: The sizes do not fit.
        MethodError: The model reads no cache.
    """

    def __init__(self, model: Any, prefix: PrefixTuning) -> None:
        self._model, self._prefix, self._count = model, prefix, prefix.prefix_length
        reader = model.get_decoder()  # of a model without one, what its heads stand on
        self._named = NamedArguments(reader)
        if "past_key_values" not in self._named.names:
            raise MethodError(f"{type(reader).__name__} takes no keys and values from outside; {BY_HAND}")
        check_sizes(prefix, *_sizes(model.config), type(model).__name__)
        self._expected: tuple[Any, int] | None = None
        self.undo: list[Undo] = [
            reader.register_forward_pre_hook(self._put, with_kwargs=True),
            reader.register_forward_hook(self._check_read),
        ]
        self._reached = self._lent = False
        if reader is not model:
            self.undo += [
                model.register_forward_pre_hook(self._start),
                model.register_forward_hook(self._check_reached),
            ]

    def _start(self, module: nn.Module, args: Any) -> None:
        """The model is called."""
        self._reached = False

    def _check_reached(self, module: nn.Module, args: Any, output: Any) -> None:
        """See that the part with the prefix was called.

        Raises:
            MethodError: The model went past it.
        """
        if not self._reached:
            raise MethodError(
                f"{type(module).__name__} does not call the part that reads the prefix; {BY_HAND}"
            )

    def _put(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Put the prefix in the cache, and let the text see it."""
        self._expected, self._reached = None, True
        given, count = self._named(args, kwargs), self._count
        shape = text_shape(given)
        if shape is None:
            return None
        if module.training and any(
            getattr(part, "gradient_checkpointing", False) for part in module.modules()
        ):
            raise MethodError(
                "prefix tuning does not go with gradient checkpointing: checkpointed layers drop their cache, and the prefix"
                " with it; call model.gradient_checkpointing_disable()"
            )
        asked = given.get("use_cache")
        asked = getattr(self._model.config, "use_cache", True) if asked is None else asked
        self._lent = given.get("past_key_values") is None and not asked
        if cached_tokens(given) == 0:
            given["past_key_values"] = self._fill(given.get("past_key_values"), shape[0], module)
            self._expected = (given["past_key_values"], count + shape[1])
        if given.get("attention_mask") is not None:
            given["attention_mask"] = longer_mask(given["attention_mask"], count)
        if given.get("position_ids") is not None:
            given["position_ids"] = shifted_positions(given["position_ids"], count, own=False)
        return (), given

    def _fill(self, cache: Any, batch: int, module: nn.Module) -> Any:
        """A cache that holds the prefix and nothing else."""
        if cache is None:
            cache = DynamicCache()
            if self._model.config.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache())
        if cache.is_compileable:
            raise MethodError(
                "a cache of fixed size has no room for a prefix; generate with the default cache"
            )
        first = next(p for p in module.parameters() if p.is_floating_point())
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        for layer in range(self._prefix.num_layers):
            states = (
                state.transpose(0, 1).to(first.device, first.dtype).expand(batch, -1, -1, -1)
                for state in self._prefix.get_prefix_states(layer)
            )
            own.update(*states, layer)
        return cache

    def _check_read(self, module: nn.Module, args: Any, output: Any) -> Any:
        """See that every layer put its own keys behind the prefix; a cache nobody asked for is kept back.

        Raises:
            MethodError: One did not.
        """
        if self._expected is None:
            return None
        (cache, length), self._expected = self._expected, None
        found = [int(cache.get_seq_length(layer)) for layer in range(self._prefix.num_layers)]
        if found != [length] * len(found):
            raise MethodError(
                f"layers of {type(module).__name__} do not read the prefix: their caches hold {found} keys, not {length};"
                f" {BY_HAND}"
            )
        if not self._lent or isinstance(output, tuple):
            return None
        return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})


def _sizes(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and features of a head, as a transformers config tells them."""
    text = config.get_text_config()

    def told(*names: str) -> int | None:
        found = (getattr(text, name, None) for name in names)
        return next((int(value) for value in found if value is not None), None)

    decoder = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ()
    of_decoder = ("decoder_attention_heads",) if config.is_encoder_decoder else ()
    heads = told(*of_decoder, "num_attention_heads") or 1
    layers = told(*decoder, "num_hidden_layers") or 0
    return layers, told("num_key_value_heads") or heads, told("head_dim", "d_kv") or text.hidden_size // heads


class PrefixedAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that reads a prefix; its weights have columns for it in front.

    Never built: the class of a module in use is exchanged, so that its tensors, names and users stay as they are (torch's
    own parametrizations do the same).
    """

    prefix: tuple[PrefixTuning, int]
    """The prefix and the layer; in a tuple, or torch would take it for a part of this module."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention(Q, [P_K; K], [P_V; V]); arguments and results as of nn.MultiheadAttention.

        Args:
            query: (batch, seq, features), or (seq, batch, features) without `batch_first`.
            key: As the query.
            value: As the query.
            key_padding_mask: (batch, seq); True or -inf where a key is not seen.
            need_weights: Whether to give the attention weights.
            attn_mask: (seq, seq) or (batch * heads, seq, seq).
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: A hint that the mask is causal; it is not used, the mask is.

        Returns:
            The output, and weights with a column per key of the prefix in front.

        Raises:
            MethodError: The inputs have no batch dimension.
        """
        if query.dim() != 3:
            raise MethodError("a prefix needs inputs with a batch dimension")
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        count = self.prefix[0].prefix_length
        keys, values = self._with_prefix(key, value)
        made, weights = functional.multi_head_attention_forward(
            query,
            functional.pad(key, (0, 0, 0, 0, count, 0)),  # only their number counts, beside the static ones
            functional.pad(value, (0, 0, 0, 0, count, 0)),
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=_wider(key_padding_mask, count),
            need_weights=need_weights,
            attn_mask=_wider(attn_mask, count),
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            static_k=keys,
            static_v=values,
            average_attn_weights=average_attn_weights,
        )
        return (made.transpose(0, 1) if self.batch_first else made), weights

    def _with_prefix(self, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values behind their prefixes, (batch * heads, prefix + seq, head) each."""
        weights: tuple[torch.Tensor, ...] = (self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)[1:]
        biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[1:]
        made = []
        states = self.prefix[0].get_prefix_states(self.prefix[1])
        for source, weight, bias, state in zip((key, value), weights, biases, states, strict=True):
            own = functional.linear(source, weight, bias)
            own = own.view(*own.shape[:2], self.num_heads, self.head_dim)
            front = state.to(own.device, own.dtype).unsqueeze(1).expand(-1, own.shape[1], -1, -1)
            made.append(torch.cat([front, own]).flatten(1, 2).transpose(0, 1))
        return made


def _wider(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """A mask with columns in front, in which the prefix is seen."""
    return None if mask is None else functional.pad(mask, (count, 0))


def put_into_attention(model: nn.Module, prefix: PrefixTuning) -> list[Undo]:
    """Let every self-attention of a plain module read a prefix.

    Args:
        model: The module.
        prefix: Keys and values, a layer for each nn.MultiheadAttention in the module's order; those that look at another
            sequence (`multihead_attn` of nn.TransformerDecoderLayer) have none.

    Returns:
        What to remove to have the module as it was.

    Raises:
        ConfigError: The sizes do not fit.
        MethodError: There is no attention that could read it; says what to write.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not _looks_elsewhere(model, path)
    }
    name = type(model).__name__
    if not found:
        raise MethodError(f"{name} has no nn.MultiheadAttention that a prefix could be put into; {BY_HAND}")
    for path, module in found.items():
        check_sizes(prefix, len(found), module.num_heads, module.head_dim, f"'{path}' of {name}")
        if type(module) is not nn.MultiheadAttention or module.bias_k is not None:
            kind = "with bias_k" if type(module) is nn.MultiheadAttention else type(module).__name__
            raise MethodError(f"'{path}' is an attention of its own kind ({kind}); {BY_HAND}")
    return [*_exchanged(list(found.values()), prefix), *leave_shortcuts(model, list(found))]


def _exchanged(attentions: Sequence[nn.MultiheadAttention], prefix: PrefixTuning) -> list[Undo]:
    """Make each of some attentions read its layer of a prefix."""
    undo: list[Undo] = []
    for layer, module in enumerate(attentions):
        undo.append(_Exchange(module))
        module.__class__ = PrefixedAttention
        module.prefix = (prefix, layer)  # type: ignore[assignment]
    return undo


class _Exchange(Setting):
    """An attention's class that was exchanged; satisfies `Undo`."""

    __slots__ = ()

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__(module, "__class__", type(module))

    def remove(self) -> None:
        """Change it back."""
        del self.owner.prefix
        setattr(self.owner, self.name, self.before)


def _looks_elsewhere(model: nn.Module, path: str) -> bool:
    """Whether an attention is the one with which torch's decoder layer looks at the encoder."""
    parent, _, name = path.rpartition(".")
    return name == "multihead_attn" and isinstance(model.get_submodule(parent), nn.TransformerDecoderLayer)
