"""What heads do, without keeping their maps: statistics and word-by-word attention, streamed over chunks of queries.

For each layer, head and text: the mean over real queries of the entropy, of the mass on the first token, on the previous
and on the same token, and of the distance looked over. No tensor of seq x seq is made beside the model's own; what is made
is heads x chunk x seq.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from peftlab.errors import ConfigError, DataError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_choice import Kind, choose
from peftlab.inspection.attention_inputs import model_inputs, side_of
from peftlab.inspection.attention_source import Rows, Source, read_rows
from peftlab.inspection.reading_limits import as_texts
from peftlab.mapping import map_model


@dataclass(frozen=True, slots=True, eq=False)
class HeadStatistics:
    """What the heads of one layer do in each text; means over real queries, shape (texts, heads), float32 on the CPU.

    Attributes:
        entropy: -sum p ln p over keys, in nats: how widely a query looks.
        sink_mass: Probability on the first real key.
        learnt_sink_mass: Probability on a learnt sink (gpt-oss); None in models without.
        distance: sum p |query - key|, in tokens; None for cross attention, whose two sides share no positions.
        same_token_mass: Probability of a query on itself; None for cross attention.
        previous_token_mass: Probability on the token before, over the queries that have one (NaN in a text of one token);
            None for cross attention.
        words: For each text (heads, query words, key words): probability summed over the tokens of a key word, mean over
            those of a query word. What it lacks to 1 is on tokens of no word. None where no words were given.
    """

    entropy: torch.Tensor
    sink_mass: torch.Tensor
    learnt_sink_mass: torch.Tensor | None
    distance: torch.Tensor | None
    same_token_mass: torch.Tensor | None
    previous_token_mass: torch.Tensor | None
    words: tuple[torch.Tensor, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionStatistics:
    """Statistics of chosen layers and heads.

    Attributes:
        layers: `layer_i` to what its heads do.
        stack: The stack that the layers are in.
        kind: Self or cross attention.
        heads: The heads along the second axis; None for all.
        source: "probe" or "output_attentions", as in `AttentionPatterns`.
        note: Why not by the probe, or which layers have no attention; "" where there is nothing to say.
    """

    layers: Mapping[str, HeadStatistics]
    stack: str
    kind: Kind
    heads: tuple[int, ...] | None
    source: Source
    note: str = ""


def get_attention_statistics(
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
    words: Sequence[Sequence[int]] | None = None,
    key_words: Sequence[Sequence[int]] | None = None,
    chunk: int = 128,
    batch_size: int = 8,
    family: FamilyMap | None = None,
) -> AttentionStatistics:
    """Statistics of attention on some texts, without keeping the maps.

    A model that does not reach transformers' attention interface hands out whole maps; they are reduced layer by layer.

    Args:
        model: A transformers model, bare or wrapped by peft.
        tokenizer: Its tokenizer; may be None where `inputs` is given.
        texts: What it reads; None where `inputs` is given.
        layers: Layers of the stack, from 0; None for all that have attention.
        heads: Heads, from 0; None for all.
        kind: "self", or "cross" for a decoder's attention to its encoder.
        stack: Which stack of blocks; None takes the first that has this kind.
        decoder_texts: For a decoder's attention: what the decoder has written, one for each text.
        inputs: The model's own arguments in place of texts, one batch.
        max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.
        words: For each text the word of each real token that asks (the decoder's for a decoder), -1 where of none.
        key_words: The same for the tokens looked at, in cross attention; else they are those of `words`.
        chunk: Queries at a time.
        batch_size: Texts at a time.
        family: The model's map where it is at hand.

    Returns:
        The statistics, in the order of the texts.

    Raises:
        ConfigError: No such stack, layer or head, or max_length is more than the model has positions.
        DataError: No texts, no input for the decoder, words that do not match the tokens, or what the model cannot read: a
            text that is too long or has no tokens, token ids outside its vocabulary.
        EvaluationError: The model hands out something that is no attention.
        ModelError: The model has no attention that can be had; the message says why.
    """
    family = family or map_model(model)
    choice = choose(
        family,
        kind=kind,
        stack=stack,
        layers=None if layers is None else list(layers),
        heads=None if heads is None else list(heads),
    )
    read = None if texts is None else as_texts(texts)
    written = None if decoder_texts is None else as_texts(decoder_texts, "decoder_texts")
    _check(read, batch_size, {"decoder_texts": written, "words": words, "key_words": key_words})
    options: dict[str, Any] = {
        "inputs": inputs,
        "needs_decoder": side_of(model, family, choice.stack) == "decoder_",
        "max_length": max_length,
    }
    batches = [  # every text is checked before any runs
        (
            picked,
            model_inputs(
                model,
                tokenizer,
                _pick(read, picked),
                decoder_texts=_pick(written, picked),
                numbers=picked or None,
                **options,
            ),
        )
        for picked in _batches(read, batch_size)
    ]
    parts: list[dict[int, HeadStatistics]] = []
    order: list[int] = []
    source: Source = "probe"
    note = ""
    for picked, made in batches:
        asking = _pick(words, picked)
        asked = _pick(key_words, picked) if kind == "cross" else asking
        streams: dict[int, _Stream] = {}

        def take(rows: Rows, streams: dict[int, _Stream] = streams, words: Any = (asking, asked)) -> None:
            if rows.start == 0:
                streams[rows.layer] = _Stream(rows, *words, positions=kind == "self")
            streams[rows.layer].add(rows)

        source, note = read_rows(model, family, choice, made, take, chunk=chunk)
        parts.append({layer: stream.finish() for layer, stream in streams.items()})
        order += picked
    return AttentionStatistics(
        layers={
            f"layer_{i}": _joined([p[i] for p in parts], order) for i in choice.layers or sorted(parts[0])
        },
        stack=choice.stack,
        kind=kind,
        heads=choice.heads,
        source=source,
        note=note,
    )


class _Stream:
    """One layer's sums over the queries that have passed.

    Args:
        rows: Its first rows, for sizes.
        words: For each text the word of each real query, -1 where of none; None where words are not asked for.
        key_words: The same for keys.
        positions: Whether queries and keys are the same tokens, so that distances mean something.
    """

    def __init__(
        self,
        rows: Rows,
        words: Sequence[Sequence[int]] | None,
        key_words: Sequence[Sequence[int]] | None,
        *,
        positions: bool,
    ) -> None:
        batch, heads, _, num_keys = rows.probabilities.shape
        self.real, self.positions = rows.query_real, positions
        self.first_key = rows.key_real.int().argmax(dim=1)
        self.offset = num_keys - self.real.shape[1]  # keys that peft's prefix puts before the tokens
        self.totals: dict[str, torch.Tensor] = {}
        self.words: torch.Tensor | None = None
        if words is not None and key_words is not None:
            self.query_index = _word_index(words, self.real, before=0)
            self.key_index = _word_index(key_words, rows.key_real, before=self.offset if positions else 0)
            sizes = [int(index.max()) + 1 for index in (self.query_index, self.key_index)]
            self.words = rows.probabilities.new_zeros(batch, heads, *sizes)

    def add(self, rows: Rows) -> None:
        """Take some rows.

        Args:
            rows: The next ones.
        """
        p = rows.probabilities
        num_queries, num_keys = p.shape[-2:]
        stop = rows.start + num_queries
        real = self.real[:, rows.start : stop]
        self._sum("entropy", torch.special.entr(p).sum(dim=-1), real)
        self._sum("sink_mass", _at(p, self.first_key[:, None].expand(-1, num_queries)), real)
        if rows.sinks is not None:
            self._sum("learnt_sink_mass", rows.sinks, real)
        if self.positions:
            own = torch.arange(rows.start, stop, device=p.device) + self.offset
            distance = (own[:, None] - torch.arange(num_keys, device=p.device)).abs().to(p.dtype)
            self._sum("distance", torch.einsum("bhqk,qk->bhq", p, distance), real)
            self._sum("same_token_mass", _at(p, own.expand(len(p), -1)), real)
            has_previous = real & (own > self.first_key[:, None])
            self._sum("previous_token_mass", _at(p, (own - 1).clamp_min(0).expand(len(p), -1)), has_previous)
        if self.words is not None:
            keys = self.key_index[:, None, None, :].expand(p.shape)
            by_word = p.new_zeros(*p.shape[:-1], self.words.shape[-1]).scatter_add_(-1, keys, p)
            queries = self.query_index[:, None, rows.start : stop, None].expand(by_word.shape)
            self.words.scatter_add_(-2, queries, by_word)

    def _sum(self, name: str, values: torch.Tensor, counted: torch.Tensor) -> None:
        """Add values (batch, heads, rows) where counted (batch, rows), and count them."""
        total = torch.where(counted[:, None], values, 0.0).sum(dim=-1)
        count = counted.sum(dim=-1, keepdim=True).expand_as(total)
        both = torch.stack([total, count.to(total.dtype)])
        self.totals[name] = self.totals[name] + both if name in self.totals else both

    def finish(self) -> HeadStatistics:
        """The means, on the CPU.

        Returns:
            One row for each text.
        """
        names = list(self.totals)
        total, count = torch.stack([self.totals[name] for name in names]).to("cpu", torch.float32).unbind(1)
        means = dict(zip(names, (total / count).unbind(0), strict=True))
        words = None
        if self.words is not None:
            words = tuple(
                _word_means(*parts)
                for parts in zip(self.words.cpu(), self.query_index.cpu(), self.key_index.cpu(), strict=True)
            )
        return HeadStatistics(
            entropy=means["entropy"],
            sink_mass=means["sink_mass"],
            learnt_sink_mass=means.get("learnt_sink_mass"),
            distance=means.get("distance"),
            same_token_mass=means.get("same_token_mass"),
            previous_token_mass=means.get("previous_token_mass"),
            words=words,
        )


def _at(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Probabilities (batch, heads, rows) at one key for each row, keys (batch, rows)."""
    return rows.gather(-1, keys[:, None, :, None].expand(*rows.shape[:-1], 1)).squeeze(-1)


def _word_index(words: Sequence[Sequence[int]], real: torch.Tensor, *, before: int) -> torch.Tensor:
    """The slot of each position, (batch, seq): 0 for pads and tokens of no word, word + 1 for the others."""
    if len(words) != len(real):
        raise DataError(f"words for {len(words)} texts, but there are {len(real)} texts")
    index = torch.zeros(real.shape, dtype=torch.long)
    for row, (given, places) in enumerate(zip(words, real.cpu(), strict=True)):
        slots = torch.as_tensor([0] * before + [int(word) + 1 for word in given], dtype=torch.long)
        if len(slots) != int(places.sum()) or (len(slots) and int(slots.min()) < 0):
            raise DataError(
                f"words of text {row} are {len(given)} numbers, but it has {int(places.sum()) - before} tokens: expected for"
                " each token, special ones included, the index of its word, or -1"
            )
        index[row, places] = slots
    return index.to(real.device)


def _word_means(sums: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
    """Word by word of one text (heads, query words, key words), from sums with the slot of no word in front."""
    counts = torch.bincount(query_index, minlength=sums.shape[1])[1 : int(query_index.max()) + 1]
    kept = sums[:, 1 : int(query_index.max()) + 1, 1 : int(key_index.max()) + 1]
    return (kept / counts[:, None]).to(torch.float32)


def _check(read: Sequence[str] | None, batch_size: int, beside: Mapping[str, Sequence[Any] | None]) -> None:
    """Refuse what does not go with the texts."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: expected a positive number of texts")
    for name, given in beside.items():
        if read is not None and given is not None and len(given) != len(read):
            raise DataError(f"{name} for {len(given)} texts, but there are {len(read)} texts")


def _batches(texts: Sequence[str] | None, batch_size: int) -> Iterator[list[int]]:
    """Indices of texts of like length, a batch at a time; one empty list where the inputs are one batch."""
    order = sorted(range(len(texts or ())), key=lambda i: len(texts[i]) if texts else 0)
    yield from (order[i : i + batch_size] for i in range(0, max(len(order), 1), batch_size))


def _pick(items: Sequence[Any] | None, picked: list[int]) -> Sequence[Any] | None:
    """The picked items; all where nothing is picked."""
    return items if items is None or not picked else [items[i] for i in picked]


def _joined(parts: list[HeadStatistics], order: list[int]) -> HeadStatistics:
    """The statistics of all batches, in the order of the texts."""
    back = sorted(range(len(order)), key=order.__getitem__)

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if name == "words":
            flat = [matrix for value in values for matrix in value]
            return tuple(flat[i] for i in back) if back else tuple(flat)
        together = torch.cat(values)
        return together[back] if back else together

    return HeadStatistics(**{field.name: joined(field.name) for field in fields(HeadStatistics)})
