"""Texts as a model reads them: tokens, each with the characters it stands for.

A fast tokenizer says which characters a token stands for, and is mostly right. It is wrong where it drops characters that
its vocabulary lacks (what follows is shifted) and in versions that return empty offsets; a slow tokenizer says nothing. So
offsets are held against what the tokens themselves say, and where they do not agree they are rebuilt by decoding: what each
token decodes to is looked for in the text, from left to right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\S+")
_ANCHORS = ("a", "A", "0")
"""What is put before a word or a token so that it reads as it does inside a text: the first that the vocabulary has."""
_MOST_TOKENS_TOGETHER = 16
"""Tokens that are looked at together until they decode to whole characters."""

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """One text as a model reads it.

    Attributes:
        text: The text; "" where only ids were given.
        ids: Token ids, special tokens included, shape (tokens,).
        offsets: First and last + 1 character of each token in the text, shape (tokens, 2); equal where a token stands
            for no character (a special token that the tokenizer added). A blank before a word may count to its token.
        special: Whether a token is one of the tokenizer's special tokens, unknown apart, shape (tokens,).
        token_type_ids: Segment ids where the tokenizer gives them, shape (tokens,).
        rebuilt: Whether the offsets are rebuilt by decoding.
    """

    text: str
    ids: IntArray
    offsets: IntArray
    special: npt.NDArray[np.bool_]
    token_type_ids: IntArray | None = None
    rebuilt: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def find_words(text: str) -> IntArray:
    """The words of a text: its longest runs of characters that are not white space.

    White space is what Python's `str.isspace` says, the no-break and the ideographic space included. A line of Chinese or
    Thai without spaces is one word.

    Args:
        text: Any text.

    Returns:
        First and last + 1 character of each word, shape (words, 2).

    Example:
        >>> find_words("two  words").tolist()
        [[0, 3], [5, 10]]
    """
    return np.array([match.span() for match in _WORD.finditer(text)], np.int32).reshape(-1, 2)


class TokenReader:
    """Turns texts into tokens with true offsets.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self._special_array = np.array(sorted(self.special_ids), np.int32)
        self._anchor = next((a for a in _ANCHORS if tokenizer.unk_token_id not in self._encode([a])[0]), "")
        self._anchor_ids = self._encode([self._anchor])[0]
        self._anchor_text = self._decode(self._anchor_ids)
        self._surfaces: dict[int, str | None] = {}

    def read(
        self, texts: Sequence[str], *, max_length: int | None = None, target: bool = False
    ) -> list[TokenizedText]:
        """Tokens and offsets of texts.

        Args:
            texts: The texts.
            max_length: Cut each to so many tokens, at the tokenizer's truncation side; None cuts nothing.
            target: Whether these are texts that a decoder reads (some tokenizers mark them otherwise).

        Returns:
            One for each text, in their order.
        """
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        options: dict[str, Any] = {
            "truncation": max_length is not None,
            "max_length": max_length,
            "return_offsets_mapping": fast,
            "return_attention_mask": False,
            "verbose": False,
        }
        given = {"text_target" if target else "text": list(texts)}
        encoded = self.tokenizer(**given, **options)
        rows = []
        for i, text in enumerate(texts):
            ids = np.array(encoded["input_ids"][i], np.int32)
            types = np.array(encoded["token_type_ids"][i], np.int32) if "token_type_ids" in encoded else None
            offsets = np.array(encoded["offset_mapping"][i], np.int32).reshape(-1, 2) if fast else None
            special = np.isin(ids, self._special_array)
            true, rebuilt = self._true_offsets(text, ids, offsets)
            rows.append(TokenizedText(text, ids, true, special, types, rebuilt))
        return rows

    def ids(
        self, texts: Sequence[str], *, max_length: int | None = None, target: bool = False
    ) -> list[list[int]]:
        """The token ids of texts, without their offsets.

        Args:
            texts: The texts.
            max_length: As for `read`.
            target: As for `read`.

        Returns:
            A list for each text, special tokens included.
        """
        return self._encode(list(texts), special=True, max_length=max_length, target=target)

    def says(self, ids: Sequence[int]) -> str:
        """What tokens say, without white space.

        Args:
            ids: Consecutive token ids.

        Returns:
            The decoded text, white space left out.
        """
        return "".join(self._decode(list(ids)).split())

    def _true_offsets(self, text: str, ids: IntArray, offsets: IntArray | None) -> tuple[IntArray, bool]:
        """The offsets that agree best with what the tokens say, and whether these are rebuilt ones."""
        if offsets is not None and _covers(text, offsets):
            return offsets, False
        before = len(ids) + 1 if offsets is None else self._disagreements(text, ids, offsets)
        if offsets is not None and not before:  # a character that the tokenizer drops, or a text cut short
            return offsets, False
        rebuilt = self._rebuild(text, ids)
        if offsets is not None and self._disagreements(text, ids, rebuilt) >= before:
            return offsets, False
        return rebuilt, True

    def _disagreements(self, text: str, ids: IntArray, offsets: IntArray) -> int:
        """How many tokens say something that their characters do not."""
        wrong = 0
        for token, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
            surface = self._surface(token)
            if token in self.special_ids:
                continue
            if surface is None:  # says something, but not whole characters
                wrong += start == end
            else:
                wrong += _letters(surface) not in _letters(text[start:end])
        return wrong

    def _rebuild(self, text: str, ids: IntArray) -> IntArray:
        """Offsets by alignment: which tokens make which word, and inside a word what each token says."""
        whole, body = self._encode([text], special=True)[0], self._encode([text])[0]
        before = next((i for i in range(len(whole)) if whole[i : i + len(body)] == body), 0)
        rebuilt = np.zeros((len(body), 2), np.int32)
        words = find_words(text)
        for (first_word, last_word), (first, last) in self._meet(text, words, body):
            if first_word < last_word and first < last:
                start, end = words[first_word, 0], words[last_word - 1, 1]
                rebuilt[first:last] = start + self._align(text[start:end], body[first:last])
        offsets = np.zeros((len(ids), 2), np.int32)
        kept = min(
            len(ids) - len(whole) + len(body), len(body)
        )  # fewer than the body's where the text was cut
        left = kept < len(body) and self.tokenizer.truncation_side == "left"
        offsets[before : before + kept] = rebuilt[len(body) - kept :] if left else rebuilt[:kept]
        return offsets

    def _meet(
        self, text: str, words: IntArray, ids: list[int]
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Runs of words and the tokens that they are.

        Each word is read alone, with the blanks before it, and its tokens are looked for where the last word's end. Words
        that read otherwise alone form a run with all tokens up to the next that is found.
        """
        at = run = 0
        for word, expected in enumerate(self._read_alone(text, words)):
            ahead = range(at, len(ids) - len(expected) + 1) if run < word else range(at, at + 1)
            found = next((i for i in ahead if ids[i : i + len(expected)] == expected), None)
            if found is None or (run < word and not expected):
                continue
            yield (run, word), (at, found)
            yield (word, word + 1), (found, found + len(expected))
            at, run = found + len(expected), word + 1
        yield (run, len(words)), (at, len(ids))

    def _read_alone(self, text: str, words: IntArray) -> list[list[int]]:
        """The tokens of each word with the blanks before it, as they follow another word."""
        ends = [0, *words[:, 1].tolist()]
        parts = [text[start:end] for start, end in pairwise(ends)]
        read = self._encode([part if i == 0 else self._anchor + part for i, part in enumerate(parts)])
        return [ids if i == 0 else ids[len(self._anchor_ids) :] for i, ids in enumerate(read)]

    def _align(self, text: str, ids: list[int]) -> IntArray:
        """Offsets of tokens by greedy search: each says what begins where the last one ended, or in the next word.

        Tokens that say nothing known (the unknown token) wait for the next that is found and share the characters in
        between, word by word; each of them lets the next lie one word further on.
        """
        page = _Page(text)
        offsets = np.zeros((len(ids), 2), np.int32)
        waiting: list[int] = []
        at = 0
        for first, last, surface in self._pieces(ids):
            piece = None if surface is None else _Page(surface).letters
            if piece == "":  # blanks: no character, at the place reached
                offsets[first:last] = page.place(at)
                continue
            found = None if piece is None else page.find(piece, at, words_ahead=len(waiting) + 1)
            if found is None:
                waiting += range(first, last)
                continue
            page.share(offsets, waiting, at, found[0])
            offsets[first:last] = page.span(*found)
            waiting, at = [], found[1]
        page.share(offsets, waiting, at, len(page.letters))
        return offsets

    def _pieces(self, ids: list[int]) -> Iterator[tuple[int, int, str | None]]:
        """Runs of tokens that decode to whole characters: first, last + 1, text (None where it is not known)."""
        first = 0
        while first < len(ids):
            last, surface = first + 1, self._surface(ids[first])
            while surface is None and last < min(len(ids), first + _MOST_TOKENS_TOGETHER):
                if self.tokenizer.unk_token_id in ids[first : last + 1]:
                    break
                last += 1
                surface = self._whole_characters(ids[first:last])
            if surface is None:
                last = first + 1
            yield first, last, surface
            first = last

    def _surface(self, token: int) -> str | None:
        """What one token says inside a text; None where that is not known or not whole characters."""
        if token not in self._surfaces:
            unknown = token == self.tokenizer.unk_token_id
            self._surfaces[token] = None if unknown else self._whole_characters([token])
        return self._surfaces[token]

    def _whole_characters(self, ids: list[int]) -> str | None:
        """What tokens say inside a text, or None where they end within a character."""
        text = self._decode(self._anchor_ids + ids)
        said = text[len(self._anchor_text) :]
        whole = text.startswith(self._anchor_text) and said and "\ufffd" not in said
        return said if whole else None

    def _encode(
        self,
        texts: list[str],
        *,
        special: bool = False,
        max_length: int | None = None,
        target: bool = False,
    ) -> list[list[int]]:
        """Token ids of texts."""
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(
            **{"text_target" if target else "text": texts},
            add_special_tokens=special,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        return encoded

    def _decode(self, ids: list[int]) -> str:
        """Tokens as text, exactly."""
        if not ids:
            return ""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class _Page:
    """A text's letters without white space and differences of form, each with the character it comes from."""

    def __init__(self, text: str) -> None:
        letters: list[str] = []
        origin: list[int] = []
        for i, character in enumerate(text):
            for letter in _fold(character):
                letters.append(letter)
                origin.append(i)
        self.letters, self.origin, self._length = "".join(letters), origin, len(text)
        spans = find_words(text)
        self.word = (
            np.searchsorted(spans[:, 0], np.array(origin), side="right") - 1 if origin else np.zeros(0)
        )

    def place(self, at: int) -> int:
        """The character that a place among the letters stands before."""
        return self.origin[at] if at < len(self.origin) else self._length

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The characters of the letters from start to end."""
        return self.origin[start], self.origin[end - 1] + 1

    def find(self, piece: str, at: int, *, words_ahead: int) -> tuple[int, int] | None:
        """The first place of a piece from `at` on, not more than so many words ahead.

        Marks and invisible characters that the text has and the piece lacks are passed over.
        """
        if at >= len(self.letters):
            return None
        last_word = self.word[at] + words_ahead
        for start in range(at, len(self.letters)):
            if self.word[start] > last_word:
                return None
            if self.letters[start] != piece[0]:
                continue
            place = start
            for letter in piece:
                while (
                    place < len(self.letters)
                    and self.letters[place] != letter
                    and _is_optional(self.letters[place])
                ):
                    place += 1
                if place >= len(self.letters) or self.letters[place] != letter:
                    break
                place += 1
            else:
                return start, place
        return None

    def share(self, offsets: IntArray, tokens: list[int], start: int, end: int) -> None:
        """Give letters that no known token says to the tokens in between, a word to each as far as there are words."""
        words = sorted(set(self.word[start:end].tolist()))
        for number, token in enumerate(tokens):
            if not words:
                offsets[token] = self.place(start)
                continue
            word = words[min(number, len(words) - 1)]
            inside = [i for i in range(start, end) if self.word[i] == word]
            offsets[token] = self.span(inside[0], inside[-1] + 1)


def _covers(text: str, offsets: IntArray) -> bool:
    """Whether every character that is not white space belongs to a token."""
    length = len(text) + 1
    covered = np.cumsum(
        np.bincount(offsets[:, 0], minlength=length) - np.bincount(offsets[:, 1], minlength=length)
    )
    words = find_words(text)
    inside = np.cumsum(
        np.bincount(words[:, 0], minlength=length) - np.bincount(words[:, 1], minlength=length)
    )
    return not bool(np.any((inside > 0) & (covered <= 0)))


@lru_cache(maxsize=1 << 16)
def _fold(character: str) -> str:
    """A character in compatibility form without case; nothing for white space."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in folded if not c.isspace())


@lru_cache(maxsize=1 << 16)
def _is_optional(letter: str) -> bool:
    """Whether tokenizers may drop a letter without a trace: combining marks, control and format characters."""
    category = unicodedata.category(letter)
    return category[0] == "M" or category in ("Cc", "Cf")


def _letters(text: str) -> str:
    """A text's letters for comparison: folded, without what tokenizers may drop."""
    if text.isascii() and text.isprintable():
        return text.replace(" ", "").lower()
    return "".join(c for character in text for c in _fold(character) if not _is_optional(c))
