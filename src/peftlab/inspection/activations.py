"""Activations of chosen blocks for many texts, fast: no head, no later blocks, little padding, one transfer per batch.

`layer i` is what block i puts out: transformers' `hidden_states[i + 1]`, save the last of those, which transformers gives
after the final norm. Every row is the mean over a run of tokens: one token, a word, a whole text. Pads never enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.block_outputs import (
    BlockOutputs,
    choose_stack,
    evaluation_mode,
    reads_target,
)
from peftlab.inspection.model_fingerprint import fingerprint
from peftlab.inspection.reading_limits import repeatable
from peftlab.inspection.shards import ROW, Activations, ActivationStore, open_activations
from peftlab.inspection.text_batches import TextBatches, TextRow
from peftlab.inspection.tokenized import TokenizedText
from peftlab.inspection.words import word_spans
from peftlab.mapping import map_model

Pooling = Literal["token", "word", "mean", "last", "cls"]
"""What a row is: a token; a word, as the mean of its tokens; a text, as the mean of its tokens (special ones included), its
last token, or its CLS token."""

Rows = npt.NDArray[np.void]
"""Records of `ROW`."""

_BATCHES_AT_ONCE = 8
"""Batches whose texts are sorted by length together, and stored together, where activations go to disk."""


def extract_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    layers: Iterable[int],
    *,
    family: FamilyMap | None = None,
    stack: str | None = None,
    decoder_texts: Iterable[str | Sequence[int]] | None = None,
    pooling: Pooling = "token",
    max_length: int | None = None,
    batch_tokens: int = 2048,
    dtype: torch.dtype | None = None,
    output: Path | str | None = None,
    unproven: bool = False,
) -> Activations[Any]:
    """What chosen blocks of a model put out for texts.

    Args:
        model: A transformers model, bare or wrapped by peft; its mode, config and hooks are left as they were.
        tokenizer: Its tokenizer. It needs no pad token: pads are masked and have no rows.
        texts: What the model reads.
        layers: Layers of the stack, from 0.
        family: The model's map where it is at hand.
        stack: A name from the map's stacks; None takes the only one, or the encoder of an encoder-decoder.
        decoder_texts: For a decoder's stack, what the decoder has written, one for each of `texts`: a text, which it reads
            shifted by one as in training, or ids, which it reads as they are. The rows are theirs.
        pooling: What a row is.
        max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.
        batch_tokens: Most tokens of a batch, pads included; a longer text has a batch to itself.
        dtype: Of the values; None keeps the model's (bfloat16 goes to disk as float32, numpy has none).
        output: A folder: write there (see `shards.py`), and go on where an extraction of the same stopped. Memory does
            not grow with the number of texts, and what is made in two goes is bit-equal to what is made in one.
        unproven: Take what the blocks put out also where it is not proved to be the model's hidden states; `proof` of what
            comes back says why not.

    Returns:
        The activations: torch tensors on the CPU, or with `output` numpy arrays mapped from the folder.

    Raises:
        ConfigError: No such stack, layer, pooling or dtype, or settings that do not go together.
        DataError: No texts, something that is no text, a text that has no tokens or is too long, token ids outside the
            model's vocabulary, a decoder without input, a float16 overflow.
        ModelError: The model cannot be looked at so, or it is not proved what its blocks put out; the message says why.
        OutputError: The folder cannot be written or holds something else.
        CheckpointError: The folder is damaged.

    Example:
        >>> found = extract_activations(model, tokenizer, ["Hello world"], [0, 6], pooling="word")
        >>> found["layer_6"].shape
        torch.Size([2, 768])
    """
    family = family or map_model(model)
    stack = choose_stack(family, stack)
    decoder_texts = repeatable(decoder_texts)
    _check(tokenizer, stack, reads_target(model, family, stack), decoder_texts, pooling, dtype)
    source = TextBatches(
        model, tokenizer, texts, decoder_texts=decoder_texts, max_length=max_length, batch_tokens=batch_tokens
    )
    proof_of(family, stack, unproven=unproven)
    blocks = BlockOutputs(model, family, stack=stack, layers=list(layers), inputs=source.arguments)
    extraction = _Extraction(blocks, source, tokenizer, pooling, dtype)
    with evaluation_mode(model):
        if output is not None:
            _store(extraction, model, Path(output))
            return open_activations(output)
        values, rows = extraction.run(0, len(source.texts))
    return Activations(values, rows, len(source.texts), stack, pooling, blocks.proof)


def proof_of(family: FamilyMap, stack: str, *, unproven: bool = False) -> str:
    """What the map says of a stack's outputs against the model's hidden states.

    Args:
        family: The model's map.
        stack: A name from its stacks.
        unproven: Whether to go on where they are not proved to be these.

    Returns:
        "equal", or how they are equal, or why that is not proved.

    Raises:
        ModelError: It is not proved, and that was not asked for.
    """
    proof = family.proofs[stack].outputs if stack in family.proofs else "no certificate"
    if not (unproven or proof.startswith("equal")):
        why = "; ".join(dict.fromkeys([proof, *(c.problem for c in family.certificates if c.problem)]))
        raise ModelError(
            f"what the blocks of the {stack} of this {family.model_type} model put out is not proved to be its hidden"
            f" states: {why}. Give unproven=True to have it nevertheless"
        )
    return proof


@dataclass(frozen=True, slots=True)
class _Extraction:
    """What is extracted from which texts.

    Attributes:
        blocks: Runs the model.
        source: The texts.
        tokenizer: The model's tokenizer.
        pooling: What a row is.
        dtype: Of the values; None keeps the model's.
    """

    blocks: BlockOutputs
    source: TextBatches
    tokenizer: Any
    pooling: Pooling
    dtype: torch.dtype | None

    @property
    def names(self) -> list[str]:
        """The keys of the layers."""
        return [f"layer_{layer}" for layer in self.blocks.layers]

    def run(self, start: int, end: int) -> tuple[dict[str, torch.Tensor], Rows]:
        """The values of some texts, and what their rows stand for, in the order of the texts."""
        texts = self.source.read(start, end)
        records = [self._records(text.read, number) for number, text in enumerate(texts, start)]
        last = np.cumsum([len(rows) for rows in records])
        values: dict[str, torch.Tensor] = {}
        for batch, copies in _one_behind(self._launch(texts, records)):
            places = np.concatenate([np.arange(last[i] - len(records[i]), last[i]) for i in batch])
            for name, copy in zip(self.names, copies.wait(), strict=True):
                if name not in values:
                    values[name] = torch.empty((int(last[-1]), copy.shape[1]), dtype=copy.dtype)
                values[name][torch.from_numpy(places)] = copy
        return values, np.concatenate(records)

    def _launch(self, texts: list[TextRow], records: list[Rows]) -> Iterator[tuple[list[int], _Copies]]:
        """Start one batch after another: its texts and the values that are on their way to the host."""
        for batch in self.source.batches(texts, padded=self._pads_are_harmless(texts)):
            with torch.inference_mode():
                hidden = self._forward([texts[i] for i in batch])
                tokens, lengths = _gather([records[i] for i in batch], hidden[0].shape[1])
                copies = _Copies([_means(h, tokens, lengths).to(self.dtype or h.dtype) for h in hidden])
            yield batch, copies

    @torch.inference_mode()
    def _pads_are_harmless(self, texts: list[TextRow]) -> bool:
        """Whether pads leave the other tokens alone: tried on the shortest text, padded to the length of the longest.

        They do not in models that mix tokens past the mask (ConvBERT, Nystromformer, YOSO, FNet); these are given texts of
        one length at a time. A false alarm costs time, nothing else.
        """
        ordered = sorted(texts, key=lambda text: text.lengths)
        short, long = ordered[0], ordered[-1]
        if short.lengths == long.lengths:
            return True
        length = len(short.read)
        for alone, padded in zip(self._forward([short]), self._forward([short], long.lengths), strict=True):
            bound = (3e-2 if alone.element_size() < 4 else 1e-3) * alone[:, :length].abs().max()
            if not (padded[:, :length] - alone[:, :length]).abs().max() <= bound:
                return False
        return True

    def _forward(self, texts: list[TextRow], widths: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
        """The hidden states of each layer, (batch, seq, hidden), padded to `widths` at least."""
        inputs, width = self.source.inputs(texts, device=self.blocks.device, widths=widths)
        return list(self.blocks.run(inputs, width=width).values())

    def _records(self, tokens: TokenizedText, text: int) -> Rows:
        """What the rows of one text stand for."""
        length = len(tokens)
        words = word_spans(tokens)
        if self.pooling == "token":
            spans = np.arange(length, dtype=np.int32)[:, None] + np.array([0, 1], np.int32)
            characters, word = tokens.offsets, words.word_of_token
        elif self.pooling == "word":
            word = np.flatnonzero(words.tokens[:, 0] < words.tokens[:, 1]).astype(np.int32)
            spans, characters = words.tokens[word], words.characters[word]
        else:
            first = 0 if self.pooling == "mean" else length - 1
            if self.pooling == "cls":
                found = np.flatnonzero(tokens.ids == self.tokenizer.cls_token_id)
                if not len(found):
                    raise DataError(f"text {text} is read without a CLS token; use pooling mean or last")
                first = int(found[0])
            spans = np.array([[first, length if self.pooling == "mean" else first + 1]], np.int32)
            inside = tokens.offsets[first : spans[0, 1]]
            inside = inside[inside[:, 0] < inside[:, 1]]
            ends = [inside[:, 0].min(), inside[:, 1].max()] if len(inside) else [0, 0]
            characters = np.array([ends], np.int32)
            word = np.array([-1], np.int32)
        rows = np.zeros(len(spans), ROW)
        columns = (np.full(len(spans), text), *spans.T, *characters.T, word)
        for name, column in zip(ROW.names or (), columns, strict=True):
            rows[name] = column
        return rows


class _Copies:
    """Values on their way to the host: on CUDA into pinned memory, while the next batch computes.

    Args:
        values: On the device.
    """

    def __init__(self, values: list[torch.Tensor]) -> None:
        self._source, self._events = values, []
        if any(value.device.type != "cuda" for value in values):
            self._host = [value.cpu() for value in values]
            return
        self._host = [
            torch.empty(v.shape, dtype=v.dtype, pin_memory=True).copy_(v, non_blocking=True) for v in values
        ]
        for device in {value.device for value in values}:
            self._events.append(torch.cuda.current_stream(device).record_event())

    def wait(self) -> list[torch.Tensor]:
        """The values on the host.

        Returns:
            One tensor (rows, hidden) for each layer.

        Raises:
            DataError: float16 cannot hold them.
        """
        for event in self._events:
            event.synchronize()
        if self._host[0].dtype == torch.float16 and any(
            bool(torch.isinf(value).any()) for value in self._host
        ):
            raise DataError(
                "some activations are larger than float16 holds (65504): give dtype=torch.float32"
            )
        return self._host


def _one_behind(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each when the next one has been started."""
    before = next(items, None)
    for item in items:
        yield before
        before = item
    if before is not None:
        yield before


def _gather(records: list[Rows], width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which tokens of a flattened batch make its rows.

    Args:
        records: What the rows of each text of the batch stand for.
        width: Positions of a text, pads included.

    Returns:
        Positions in (batch * width), row after row, and how many belong to each row; None for one each.
    """
    starts = np.concatenate([rows["token_start"] + i * width for i, rows in enumerate(records)]).astype(
        np.int64
    )
    lengths = np.concatenate([rows["token_end"] - rows["token_start"] for rows in records]).astype(np.int64)
    if np.all(lengths == 1):
        return torch.from_numpy(starts), None
    before = np.cumsum(lengths) - lengths
    tokens = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


def _means(hidden: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The rows of one layer.

    Args:
        hidden: (batch, seq, hidden).
        tokens: From `_gather`.
        lengths: From `_gather`.

    Returns:
        (rows, hidden); means are taken in float32 at least.
    """
    flat = hidden.flatten(0, 1)
    chosen = flat.index_select(0, tokens.to(flat.device, non_blocking=True))
    if lengths is None:
        return chosen
    if chosen.device.type not in ("cpu", "cuda"):  # nowhere else is there a segment_reduce
        chosen = chosen.cpu()
    exact = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    means = torch.segment_reduce(exact, "mean", lengths=lengths.to(exact.device), axis=0, unsafe=True)
    return means.to(hidden.dtype)


def _check(
    tokenizer: Any,
    stack: str,
    decoder: bool,
    decoder_texts: Iterable[str | Sequence[int]] | None,
    pooling: str,
    dtype: torch.dtype | None,
) -> None:
    """Refuse settings that do not go together."""
    if pooling not in get_args(Pooling):
        raise ConfigError(f"pooling '{pooling}': expected one of {', '.join(get_args(Pooling))}")
    if pooling == "cls" and tokenizer.cls_token_id is None:
        raise ConfigError("pooling 'cls': the tokenizer has no CLS token; use mean or last")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype {dtype}: expected a floating-point dtype")
    if decoder and decoder_texts is None:
        raise DataError("a decoder's activations need what it reads: give decoder_texts=, one for each text")
    if decoder_texts is not None and not decoder:
        raise ConfigError(
            f"decoder_texts are given but the {stack} is looked at, which does not read them; give stack='decoder' of an"
            " encoder-decoder, or leave them out"
        )
    if pooling == "word" and any(not isinstance(given, str) for given in decoder_texts or ()):
        raise ConfigError("pooling 'word' needs decoder_texts as texts: ids have no words")


def _store(extraction: _Extraction, model: nn.Module, folder: Path) -> None:
    """Extract window after window into a folder, from where it stands."""
    blocks, source = extraction.blocks, extraction.source
    dtype = extraction.dtype or next(p.dtype for p in blocks.module.parameters() if p.is_floating_point())
    if dtype == torch.bfloat16:
        dtype = torch.float32
    windows = list(
        source.windows(_BATCHES_AT_ONCE * source.batch_tokens)
    )  # all texts are checked before any runs
    made_from = {"model": fingerprint(model), **source.made_from(), "dtype": str(dtype)}
    with ActivationStore(
        folder,
        layers=extraction.names,
        stack=blocks.stack,
        pooling=extraction.pooling,
        proof=blocks.proof,
        num_texts=len(source.texts),
        made_from=made_from,
    ) as store:
        for start, end in windows:
            if start >= store.texts_done:
                store.append(*replace(extraction, dtype=dtype).run(start, end), texts_done=end)
