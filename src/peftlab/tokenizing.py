"""Texts to tokens, many at a time: a fast tokenizer shares a list among its threads, a single text costs a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Tokenizing:
    """A tokenizer that knows the texts it was told of beforehand.

    Args:
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[str, bool], list[int]] = {}

    def read_ahead(self, prompts: Iterable[str], plain: Iterable[str]) -> None:
        """Tokenise texts together; those that were known before are forgotten.

        Args:
            prompts: Texts that will be asked for with the special tokens that open and close a text.
            plain: Texts that will be asked for without them.
        """
        self._known.clear()
        for special, wanted in ((True, prompts), (False, plain)):
            if texts := list(dict.fromkeys(wanted)):
                found = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
                self._known |= {(text, special): ids for text, ids in zip(texts, found, strict=True)}

    def ids(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text.

        Args:
            text: The text; one that is not known is tokenised alone.
            special: Whether special tokens open and close it.

        Returns:
            The tokens, a list of the caller's own.
        """
        known = self._known.get((text, special))
        if known is None:
            known = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return list(known)
