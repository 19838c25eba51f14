"""Attention patterns: who looks at whom in chosen layers and heads, while the rest of the model stays fused.

The maps equal those of the same model loaded with `attn_implementation="eager"` under `output_attentions=True`; only the
asked ones are computed, and the model's setting, mode and configs are as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.family import FamilyMap
from peftlab.inspection.attention_choice import Kind, choose
from peftlab.inspection.attention_inputs import model_inputs, side_of
from peftlab.inspection.attention_source import Rows, Source, read_rows
from peftlab.mapping import map_model


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPatterns:
    """Attention of chosen layers and heads.

    Attributes:
        weights: `layer_i` to probabilities (batch, heads, query, key), float32 on the CPU. The row of a real query sums to 1
            (less its mass on a learnt sink), the row of a pad is zero.
        sinks: `layer_i` to the mass (batch, heads, query) on the learnt sink (gpt-oss); empty in models without.
        query_real: (batch, query), True where no pad.
        key_real: (batch, key), True where no pad.
        query_ids: (batch, query) token ids; None where the queries are not the tokens alone.
        key_ids: (batch, key) token ids; None likewise.
        stack: The stack that the layers are in.
        kind: Self or cross attention.
        heads: The heads along the second axis; None for all.
        source: "probe": recomputed beside the model's own attention and proved by its output; "output_attentions": as the
            model hands them out.
        note: Why not by the probe, or which layers have no attention; "" where there is nothing to say.
    """

    weights: Mapping[str, torch.Tensor]
    sinks: Mapping[str, torch.Tensor]
    query_real: torch.Tensor
    key_real: torch.Tensor
    query_ids: torch.Tensor | None
    key_ids: torch.Tensor | None
    stack: str
    kind: Kind
    heads: tuple[int, ...] | None
    source: Source
    note: str = ""


def get_attention_patterns(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str] | None,
    layers: Iterable[int] | None = None,
    *,
    heads: Iterable[int] | None = None,
    kind: Kind = "self",
    stack: str | None = None,
    decoder_texts: Iterable[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    family: FamilyMap | None = None,
) -> AttentionPatterns:
    """Attention of chosen layers and heads on some texts, which make one batch.

    Args:
        model: A transformers model, bare or wrapped by peft.
        tokenizer: Its tokenizer; may be None where `inputs` is given.
        texts: What it reads; None where `inputs` is given.
        layers: Layers of the stack, from 0; None for all that have attention.
        heads: Heads, from 0; None for all.
        kind: "self", or "cross" for a decoder's attention to its encoder.
        stack: Which stack of blocks; None takes the first that has this kind (of an encoder-decoder the encoder).
        decoder_texts: For a decoder's attention: what the decoder has written, one for each text.
        inputs: The model's own arguments in place of texts, e.g. `{"pixel_values": ...}`, or beside them.
        max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.
        family: The model's map where it is at hand.

    Returns:
        The patterns.

    Raises:
        ConfigError: No such stack, layer or head, or max_length is more than the model has positions.
        DataError: No texts, no input for the decoder, or what the model cannot read: a text that is too long or has no
            tokens, token ids outside its vocabulary.
        EvaluationError: The model hands out something that is no attention.
        ModelError: The model has no attention that can be had; the message says why.

    Source: transformers, each model's `eager_attention_forward`.
    """
    family = family or map_model(model)
    choice = choose(
        family,
        kind=kind,
        stack=stack,
        layers=None if layers is None else list(layers),
        heads=None if heads is None else list(heads),
    )
    decoder = side_of(model, family, choice.stack) == "decoder_"
    made = model_inputs(
        model,
        tokenizer,
        texts,
        decoder_texts=decoder_texts,
        inputs=inputs,
        needs_decoder=decoder,
        max_length=max_length,
    )
    maps: dict[int, Rows] = {}
    source, note = read_rows(
        model, family, choice, made, lambda rows: maps.update({rows.layer: _on_host(rows)})
    )
    first = next(iter(maps.values()))
    query, key = first.query_real, first.key_real
    key_ids = "input_ids" if kind == "cross" or not decoder else "decoder_input_ids"
    query_ids = "decoder_input_ids" if decoder and "decoder_input_ids" in made else "input_ids"
    return AttentionPatterns(
        weights={f"layer_{i}": maps[i].probabilities for i in choice.layers or sorted(maps)},
        sinks={f"layer_{i}": rows.sinks for i, rows in sorted(maps.items()) if rows.sinks is not None},
        query_real=query,
        key_real=key,
        query_ids=_ids(made, query_ids, query),
        key_ids=_ids(made, key_ids, key),
        stack=choice.stack,
        kind=kind,
        heads=choice.heads,
        source=source,
        note=note,
    )


def _on_host(rows: Rows) -> Rows:
    """A layer's whole map as float32 on the CPU, the rows of pads zero: one copy, and none of the map on the device."""
    pads = ~rows.query_real[:, None, :]
    rows.probabilities.masked_fill_(pads[..., None], 0.0)
    return Rows(
        rows.layer,
        rows.start,
        rows.probabilities.to("cpu", torch.float32),
        None if rows.sinks is None else rows.sinks.masked_fill(pads, 0.0).to("cpu", torch.float32),
        rows.query_real.cpu(),
        rows.key_real.cpu(),
    )


def _ids(inputs: Mapping[str, Any], name: str, real: torch.Tensor) -> torch.Tensor | None:
    """Token ids of one side, where its positions are the tokens alone."""
    ids = inputs.get(name)
    return ids.cpu() if isinstance(ids, torch.Tensor) and ids.shape == real.shape else None
