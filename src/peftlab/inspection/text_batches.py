"""Texts as batches of a model's inputs: read, held against what the model can read, sorted by length, padded to the right.

Padding to the right leaves the positions of real tokens as they are in every architecture; a mask keeps pads from being
attended to, where the model heeds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peftlab.errors import ConfigError, DataError
from peftlab.inspection.reading_limits import ReadingLimits, as_texts
from peftlab.inspection.tokenized import TokenizedText, TokenReader
from peftlab.loading import hash_tokenizer

_READ_AT_ONCE = 1024
"""Texts that are tokenized in one call while their lengths are counted."""


@dataclass(frozen=True, slots=True)
class TextRow:
    """One row of a model's inputs.

    Attributes:
        source: What the model (the encoder of an encoder-decoder) reads.
        target: What the decoder reads, where it is looked at.
    """

    source: TokenizedText
    target: TokenizedText | None = None

    @property
    def read(self) -> TokenizedText:
        """What the stack that is looked at reads."""
        return self.source if self.target is None else self.target

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of source and target."""
        return len(self.source), 0 if self.target is None else len(self.target)


class TextBatches:
    """Reads texts and makes batches of them.

    Args:
        model: The model that will read them.
        tokenizer: Its tokenizer.
        texts: The texts.
        decoder_texts: What the decoder reads beside each: a text, shifted by one as in training, or ids as they are.
        max_length: Cut texts to so many tokens; None refuses those that are too long.
        batch_tokens: Most tokens of a batch, pads included; a longer row has a batch to itself.

    Attributes:
        texts: The texts, as a sequence.
        arguments: The arguments that a part of the model must take to read them.

    Raises:
        ConfigError: max_length is more than the model has positions.
        DataError: There are no texts, something is no text, or there is not one decoder text for each.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        decoder_texts: Iterable[str | Sequence[int]] | None = None,
        max_length: int | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self.texts = as_texts(texts)
        self.decoder_texts = None if decoder_texts is None else _as_written(decoder_texts, len(self.texts))
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens {batch_tokens}: expected a positive number of tokens")
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.arguments = ("input_ids", "decoder_input_ids")[: 1 + (decoder_texts is not None)]
        self._model: Any = model
        self._limits = ReadingLimits(model, tokenizer, max_length)
        self._reader = TokenReader(tokenizer)
        for number, given in enumerate(self.decoder_texts or ()):
            if not isinstance(given, str):
                self._limits.check_ids(f"decoder text {number}", given, decoder=True)

    def read(self, start: int, end: int) -> list[TextRow]:
        """Some of the texts.

        Args:
            start: The first.
            end: The last + 1.

        Returns:
            Their rows.

        Raises:
            DataError: One has no tokens, more than the model has positions, or some that the model does not know.
        """
        rows = [
            TextRow(tokens) for tokens in self._reader.read(self.texts[start:end], max_length=self.max_length)
        ]
        if self.decoder_texts is not None:
            rows = [
                TextRow(row.source, self._decoder_row(given))
                for row, given in zip(rows, self.decoder_texts[start:end], strict=True)
            ]
        targets = [None if row.target is None else row.target.ids for row in rows]
        self._check(start, [row.source.ids for row in rows], targets)
        return rows

    def windows(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Cut the texts into runs of about so many tokens; the cuts depend on the texts and the settings alone.

        Args:
            num_tokens: Tokens of a run; a longer text is a run of its own.

        Yields:
            First and last + 1 text of each run.
        """
        first = tokens = 0
        for start in range(0, len(self.texts), _READ_AT_ONCE):
            for number, lengths in enumerate(self._lengths(start, start + _READ_AT_ONCE), start):
                if tokens and tokens + sum(lengths) > num_tokens:
                    yield first, number
                    first, tokens = number, 0
                tokens += sum(lengths)
        yield first, len(self.texts)

    def batches(self, rows: Sequence[TextRow], *, padded: bool) -> list[list[int]]:
        """Rows of like length together, the longest first.

        Args:
            rows: The rows.
            padded: Whether rows of different lengths may share a batch.

        Returns:
            Row numbers of each batch.
        """
        lengths = [row.lengths for row in rows]
        made: list[list[int]] = []
        widths = (0, 0)
        for i in sorted(range(len(rows)), key=lambda i: (*(-n for n in lengths[i]), i)):
            wider = (max(widths[0], lengths[i][0]), max(widths[1], lengths[i][1]))
            full = not made or (len(made[-1]) + 1) * sum(wider) > self.batch_tokens
            if full or not (padded or lengths[i] == widths):
                made.append([])
                wider = lengths[i]
            made[-1].append(i)
            widths = wider
        return made

    def inputs(
        self, rows: Sequence[TextRow], *, device: torch.device, widths: tuple[int, int] = (0, 0)
    ) -> tuple[dict[str, torch.Tensor], int]:
        """One batch of inputs.

        Args:
            rows: The rows.
            device: Where they go.
            widths: Fewest positions of source and target; the longest row decides where it is longer.

        Returns:
            Argument names to tensors (batch, seq), and the positions of the stack that is looked at, pads included.
        """
        made = self._padded([row.source for row in rows], "", widths[0])
        if self.decoder_texts is not None:
            made |= self._padded([row.read for row in rows], "decoder_", widths[1])
        width = made[self.arguments[-1]].shape[1]
        return {name: tensor.to(device, non_blocking=True) for name, tensor in made.items()}, width

    def made_from(self) -> dict[str, str]:
        """Everything about the texts that decides what is computed, bit by bit.

        Returns:
            What it is to its hash or value.
        """
        decoded = [t if isinstance(t, str) else list(map(int, t)) for t in self.decoder_texts or ()]
        return {
            "tokenizer": hash_tokenizer(self._reader.tokenizer),
            "texts": _hash(self.texts),
            "decoder_texts": _hash(decoded),
            "max_length": str(self.max_length),
            "batch_tokens": str(self.batch_tokens),
        }

    def _padded(self, rows: Sequence[TokenizedText], side: str, width: int) -> dict[str, torch.Tensor]:
        """Token ids, mask and segment ids of one side."""
        width = max(width, *map(len, rows))
        window = getattr(self._model.config, "attention_window", None)  # Longformer pads to it within itself
        if window:
            step = max(window) if isinstance(window, Sequence) else window
            width = -(-width // step) * step
        columns = {
            "input_ids": ([row.ids for row in rows], self._fill),
            "attention_mask": ([np.ones_like(row.ids) for row in rows], 0),
        }
        types = [row.token_type_ids for row in rows if row.token_type_ids is not None]
        if len(types) == len(rows):
            columns["token_type_ids"] = (types, 0)
        made = {}
        for name, (values, fill) in columns.items():
            table = np.full((len(rows), width), fill, np.int64)
            for i, value in enumerate(values):
                table[i, : len(value)] = value
            made[f"{side}{name}"] = torch.from_numpy(table)
        return made

    @property
    def _fill(self) -> int:
        """A token for pads, whatever it is: they are masked."""
        tokenizer, known = self._reader.tokenizer, min(n or 2**31 for n in self._limits.vocabulary)
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return next((i for i in named if i is not None and i < known), 0)

    def _decoder_row(self, given: str | Sequence[int]) -> TokenizedText:
        """What a decoder reads: ids as they are, or a text shifted by one behind the model's start token."""
        special = sorted(self._reader.special_ids)
        if not isinstance(given, str):
            ids = np.array(given, np.int32)
            return TokenizedText("", ids, np.zeros((len(ids), 2), np.int32), np.isin(ids, special))
        (tokens,) = self._reader.read([given], max_length=self.max_length, target=True)
        shift = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:  # mBART opens with the text's language
            ids = (
                shift(labels=torch.from_numpy(tokens.ids[None].astype(np.int64)))[0].numpy().astype(np.int32)
            )
        else:
            ids = np.concatenate([[_start_token(self._model)], tokens.ids[:-1]]).astype(np.int32)
        offsets = np.concatenate([np.zeros((1, 2), np.int32), tokens.offsets[:-1]])
        return TokenizedText(given, ids, offsets, np.isin(ids, special), rebuilt=tokens.rebuilt)

    def _lengths(self, start: int, end: int) -> list[tuple[int, int]]:
        """Tokens of some texts, checked, without their offsets."""
        texts = self.texts[start:end]
        sources = self._reader.ids(texts, max_length=self.max_length)
        targets: list[Sequence[int] | None] = [None] * len(sources)
        for i, given in enumerate(self.decoder_texts[start:end] if self.decoder_texts is not None else ()):
            if isinstance(given, str):
                (targets[i],) = self._reader.ids([given], max_length=self.max_length, target=True)
            else:
                targets[i] = given
        self._check(start, sources, targets)
        return [(len(source), len(target or ())) for source, target in zip(sources, targets, strict=True)]

    def _check(self, start: int, sources: Sequence[Any], targets: Sequence[Any]) -> None:
        """Refuse texts that the model cannot read."""
        for number, (source, target) in enumerate(zip(sources, targets, strict=True), start):
            self._limits.check_length(number, len(source), text=self.texts[number])
            self._limits.check_ids(f"text {number}", source)
            if target is not None:
                self._limits.check_length(number, len(target), decoder=True)
                self._limits.check_ids(f"decoder text {number}", target, decoder=True)


def _as_written(given: Iterable[Any], num_texts: int) -> list[str | Sequence[int]]:
    """What a decoder has written, one for each text: a text, or token ids."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise DataError(f"decoder_texts {str(given)[:60]!r}: expected a list with one for each text")
    written = list(given)
    if len(written) != num_texts:
        raise DataError(f"{len(written)} decoder_texts for {num_texts} texts: expected one for each")
    for number, item in enumerate(written):
        if isinstance(item, str):
            continue
        ids = item.tolist() if hasattr(item, "tolist") else item
        if not isinstance(ids, Sequence) or not all(isinstance(token, int) for token in ids):
            raise DataError(
                f"decoder_texts[{number}] is {str(item)[:40]!r} of type {type(item).__name__}: expected a text, or a list of"
                " token ids"
            )
        written[number] = ids
    return written


def _hash(items: Sequence[Any]) -> str:
    """SHA-256 of a list of JSON-ready things, one after another."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def _start_token(model: Any) -> int:
    """The token that opens a decoder's input."""
    sources = (model.config, getattr(model, "generation_config", None))
    found = [getattr(s, name, None) for name in ("decoder_start_token_id", "bos_token_id") for s in sources]
    start = next((token for token in found if token is not None), None)
    if start is None:
        raise DataError(
            "the model names no decoder_start_token_id: set it in its config, or give decoder_texts as ids"
        )
    return int(start)
