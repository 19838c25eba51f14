"""Which tokens make which word, by characters, and how often that is right with a tokenizer.

A word is a longest run of characters that are not white space. A token belongs to every word of which it stands for a
character, so that a token which merges parts of two words is seen and reported, not given to one of them in silence. The
`word_ids` of fast tokenizers are not used: they count pieces of the tokenizer's own, which split at punctuation or do not
split at all.

Source: measurements in section 3.6 of `inspection.md` of the project's research.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.errors import DataError
from peftlab.inspection.tokenized import IntArray, TokenizedText, TokenReader, find_words

__all__ = [
    "PROBE_LINES",
    "AlignmentReport",
    "WordSpans",
    "align_words",
    "find_words",
    "measure_alignment",
    "special_positions",
    "word_spans",
]

PROBE_LINES = (
    "The committee's decision wasn't unanimous, but it's final: we'll start on Monday.",
    'Prices rose by 3.5% in May, 1,200 shops closed, and the mayor said "no comment".',
    "def f(x: int = 3) -> list[str]: return [str(i) for i in range(x)]  # comment",
    "Family day 👨‍👩‍👧‍👦 at the zoo 🦁🐘 was great 👍🏽!",
    "日本語の文には空白がありません。 しかし この行には あります。",
    "caf\u0065\u0301 and café look alike; naïve Übergröße, Łódź, ﬁnal",
    "non\u00a0breaking\u00a0space,   runs   of blanks,\ttabs",
    "مرحبا بالعالم हिन्दी में क्षत्रिय Привет, мир!",
)
"""Lines that a tokenizer is measured on when it is loaded: plain ones and difficult ones."""

_MOST_EXAMPLES = 5
_NAMES = ("cls_token", "sep_token", "mask_token", "bos_token", "eos_token", "pad_token")


@dataclass(frozen=True, slots=True, eq=False)
class WordSpans:
    """The words of one text and the tokens that make them.

    Attributes:
        characters: First and last + 1 character of each word, shape (words, 2).
        tokens: First and last + 1 token of each word, shape (words, 2); equal where a word has no token (the tokenizer
            dropped it, or the text was cut before it).
        word_of_token: The first word that each token stands for a character of, -1 for none, shape (tokens,).
        spanning: Positions of tokens that belong to more than one word.
    """

    characters: IntArray
    tokens: IntArray
    word_of_token: IntArray
    spanning: tuple[int, ...]


def word_spans(tokens: TokenizedText) -> WordSpans:
    """The words of a text and their tokens.

    Args:
        tokens: The text as the model reads it.

    Returns:
        The spans; the words in the order of the text.
    """
    words = find_words(tokens.text)
    starts, ends = tokens.offsets[:, 0], tokens.offsets[:, 1]
    first = np.searchsorted(words[:, 1], starts, side="right").astype(
        np.int32
    )  # the first word that ends later
    last = np.searchsorted(words[:, 0], ends, side="left").astype(
        np.int32
    )  # the first that begins at the end
    touches = (starts < ends) & (first < last)
    counts = np.where(touches, last - first, 0)
    position = np.repeat(
        np.arange(len(counts)), counts
    )  # each token as often as it has words, in the tokens' order
    word = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    spans = np.zeros((len(words), 2), np.int32)
    spans[word, 1] = position + 1  # of assignments to one place the last one stays
    spans[word[::-1], 0] = position[::-1]
    return WordSpans(
        characters=words,
        tokens=spans,
        word_of_token=np.where(touches, first, -1).astype(np.int32),
        spanning=tuple(np.flatnonzero(touches & (last - first > 1)).tolist()),
    )


def special_positions(
    tokenizer: Any, ids: Sequence[int] | npt.NDArray[np.int32]
) -> dict[int, tuple[str, ...]]:
    """Where a model reads special tokens, and which.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids of one text.

    Returns:
        Position to the names of the token there: cls, sep, mask, bos, eos, pad (one token can have several), or its
        own spelling where it has no such name. The unknown token stands for text and is not among them.
    """
    names: dict[int, list[str]] = {}
    for attribute in _NAMES:
        token = getattr(tokenizer, f"{attribute}_id", None)
        if token is not None:
            names.setdefault(token, []).append(attribute.removesuffix("_token"))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return {
        position: tuple(names.get(token) or [tokenizer.convert_ids_to_tokens(token)])
        for position, token in enumerate(map(int, ids))
        if token in special or (token in names and token != tokenizer.unk_token_id)
    }


@dataclass(frozen=True, slots=True, eq=False)
class AlignedText:
    """One text with its tokens, words and special positions.

    Attributes:
        tokens: The text as the model reads it.
        words: Its words and their tokens.
        special: Position to the names of the special token there.
    """

    tokens: TokenizedText
    words: WordSpans
    special: Mapping[int, tuple[str, ...]]


def align_words(tokenizer: Any, text: str, *, max_length: int | None = None) -> AlignedText:
    """The tokens of a text, the words they make and the special positions.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
        text: The text.
        max_length: Cut to so many tokens; None cuts nothing.

    Returns:
        All three.

    Example:
        >>> align_words(tokenizer, "Hello world").words.tokens.tolist()
        [[1, 2], [2, 3]]
    """
    (tokens,) = TokenReader(tokenizer).read([text], max_length=max_length)
    return AlignedText(tokens, word_spans(tokens), special_positions(tokenizer, tokens.ids))


@dataclass(frozen=True, slots=True)
class AlignmentReport:
    """How well words and tokens meet with one tokenizer.

    Attributes:
        num_lines: Lines measured.
        num_words: Words in them.
        num_exact: Words whose tokens are exactly right, see `measure_alignment`.
        num_lost: Words that the tokenizer gives no token at all, alone or in the line; right where the span is empty.
        num_spanning: Tokens that belong to more than one word.
        num_rebuilt: Lines whose offsets had to be rebuilt by decoding.
        examples: Some words that are not exact: the word, what its tokens say.
    """

    num_lines: int
    num_words: int
    num_exact: int
    num_lost: int
    num_spanning: int
    num_rebuilt: int
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def rate(self) -> float:
        """Share of words whose tokens are exactly right, 0 to 1."""
        return self.num_exact / self.num_words

    def __str__(self) -> str:
        text = f"words: {100 * self.rate:.1f} % of {self.num_words} have exactly the right tokens"
        if self.num_lost:
            text += f"; {self.num_lost} have none in this vocabulary"
        if self.num_spanning:
            text += f"; {self.num_spanning} tokens span words"
        if self.num_rebuilt:
            text += f"; offsets rebuilt in {self.num_rebuilt} of {self.num_lines} lines"
        return text


def measure_alignment(tokenizer: Any, lines: Sequence[str] = PROBE_LINES) -> AlignmentReport:
    """How often the tokens that make a word are exactly right.

    The tokens are judged by what they say, not by the offsets that chose them. A word is exact where (1) its tokens,
    decoded, say what the word says when the tokenizer reads it alone, white space apart; (2) none of them belongs to
    another word; (3) they come after the tokens of all words before it. No word is left out of the count: one whose
    letters all become the unknown token must have just that, one that the tokenizer drops must have no token (and
    is counted in `num_lost`).

    Args:
        tokenizer: A transformers tokenizer, fast or slow.
        lines: Texts to measure on.

    Returns:
        The counts.

    Raises:
        DataError: There is no word in the lines.
    """
    reader = TokenReader(tokenizer)
    alone: dict[str, str] = {}
    exact = lost = spanning = words = rebuilt = 0
    examples: list[tuple[str, str]] = []
    for tokens in reader.read(lines):
        spans = word_spans(tokens)
        shared = {word for position in spans.spanning for word in _words_of(tokens, spans, position)}
        spanning, rebuilt, words = (
            spanning + len(spans.spanning),
            rebuilt + tokens.rebuilt,
            words + len(spans.tokens),
        )
        reached = 0
        for number, ((start, end), (first, last)) in enumerate(
            zip(spans.characters.tolist(), spans.tokens.tolist(), strict=True)
        ):
            word = tokens.text[start:end]
            if word not in alone:
                ids = tokenizer(word, add_special_tokens=False)["input_ids"]
                alone[word] = reader.says(ids) if len(ids) else ""
            said = reader.says(tokens.ids[first:last].tolist())
            right = said == alone[word] and number not in shared and (first >= reached or first == last)
            reached = max(reached, last)
            exact, lost = exact + right, lost + (alone[word] == "" and first == last)
            if not right and len(examples) < _MOST_EXAMPLES:
                examples.append((word, said))
    if not words:
        raise DataError("no word to measure an alignment on; give lines with text in them")
    return AlignmentReport(len(lines), words, exact, lost, spanning, rebuilt, tuple(examples))


def _words_of(tokens: TokenizedText, spans: WordSpans, position: int) -> range:
    """The words that a spanning token belongs to."""
    first = int(spans.word_of_token[position])
    end = int(tokens.offsets[position, 1])
    return range(first, int(np.searchsorted(spans.characters[:, 0], end, side="left")))
