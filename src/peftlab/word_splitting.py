"""How several metrics split words: as the E2E challenge's scorer does, as mteval does, and as CodeXGLUE does.

A score is comparable with a published one only where both split alike, so each metric names its rule in its signature.
"""

from __future__ import annotations

import re
from functools import cache

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_TOKEN = re.compile(
    r"[-+]?\d+(?:[.,:]\d+)+|[-+]\d+|[^\W\d_]+\.(?=[,;:])|\.{3,}|-{2,}|[^\W_]+(?:['\-/&][^\W_]+)*|\S"
)
_CLITIC = re.compile(r"(.+)(n't|'(?:s|re|ve|ll|d|m))")
_DROPPED = frozenset(["'", "`", '"', "“", "”", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_ALIKE = str.maketrans({"’": "'", "‘": "'", "–": "-", "—": "-", "£": "#"})


def split_like_stanford(text: str) -> list[str]:
    """Words as the E2E challenge's scorer sees them: lower-cased, clitics split off, punctuation dropped.

    The challenge's scorer splits with Stanford's PTB tokenizer in Java. This gives the same words for every reference of
    its test set and for all 15 outputs of TGen (14,143 texts, a pound sign read as "#" as Stanford's does); for other
    texts (abbreviations, addresses of web pages, fractions) that is not shown.

    Args:
        text: A prediction or a reference.

    Returns:
        The words.

    Example:
        >>> split_like_stanford("It isn't family-friendly: £20-25, rated 3.5.")
        ['it', 'is', "n't", 'family-friendly', '#', '20-25', 'rated', '3.5']
    """
    words: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_ALIKE)):
        if token == "cannot":
            words += ["can", "not"]
        elif clitic := _CLITIC.fullmatch(token):
            words += clitic.groups()
        elif token not in _DROPPED and not re.fullmatch(r"\.{3,}|-{2,}", token):
            words.append(token)
    return words


@cache
def _mteval() -> Tokenizer13a:
    return Tokenizer13a()


def split_like_mteval(text: str) -> list[str]:
    """Words as mteval-v13a splits them, by sacrebleu, lower-cased.

    Args:
        text: A prediction or a reference.

    Returns:
        The words; punctuation marks are words of their own.

    Example:
        >>> split_like_mteval("A pub, cheap.")
        ['a', 'pub', ',', 'cheap', '.']
    """
    words: list[str] = _mteval()(text.lower()).split()
    return words


def split_like_codexglue(text: str) -> list[str]:
    """Words as CodeXGLUE's code summarisation scorer splits them: lower-cased, each punctuation mark a word.

    Args:
        text: A prediction or a reference.

    Returns:
        The words.

    Example:
        >>> split_like_codexglue("Returns self.x()")
        ['returns', 'self', '.', 'x', '(', ')']
    """
    return re.findall(r"\w+|[^\s\w]", text.strip().lower())
