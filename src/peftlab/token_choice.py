"""How the next token is drawn, and where an answer ends: what decoding adds to transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from peftlab.decoding import DecodingSettings
from peftlab.errors import EvaluationError
from peftlab.streams import seed_for


class StopTexts:
    """Ends rows whose answer holds a text that ends it.

    `StopStringCriteria` of transformers reads the vocabulary instead and fails on tokenizers that cannot write its probe.

    Args:
        tokenizer: The model's tokenizer.
        stop: The texts.
        begins: Where answers begin in a row.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], begins: int) -> None:
        self.tokenizer, self.stop, self.begins = tokenizer, tuple(stop), begins
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self.special = [mark for mark in self.stop if any(token in mark for token in special)]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Say which rows have ended.

        Args:
            input_ids: Prompts and answers so far, shape (batch, seq).
            scores: Not looked at.

        Returns:
            Truth values, shape (batch,).
        """
        texts = self.tokenizer.batch_decode(
            input_ids[:, self.begins :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ended = [any(mark in text for mark in self.stop) for text in texts]
        if (
            self.special
        ):  # what an answer's text leaves out; a decoder's own first token is none of its answer
            rows = input_ids[:, max(1, self.begins) :]
            written = self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
            pairs = zip(ended, written, strict=True)
            ended = [before or any(mark in text for mark in self.special) for before, text in pairs]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def until_stop(text: str, stop: Sequence[str]) -> str:
    """An answer up to the first text that ends it.

    Args:
        text: The answer.
        stop: The texts.

    Returns:
        What stands before, stripped.
    """
    ends = [text.index(mark) for mark in stop if mark in text]
    return text[: min(ends, default=len(text))].strip()


def make_draws(decoding: DecodingSettings, ids: Sequence[str], seed: int) -> list[Any]:
    """The warpers of transformers and the draw itself.

    Args:
        decoding: How tokens are drawn.
        ids: What the draws of each row are keyed by.
        seed: Root of the streams.

    Returns:
        A list of logits processors; empty where nothing is drawn.
    """
    if decoding.decoding != "sample":
        return []
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    made: list[Any] = LogitsProcessorList()
    if decoding.temperature is not None:
        made.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        made.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p is not None:
        made.append(TopPLogitsWarper(decoding.top_p))
    made.append(KeyedDraw(ids, seed))
    return made


class FiniteLogits:
    """Refuses logits that are no numbers, from which `argmax` and a draw would take a token all the same.

    A logit of minus infinity rules a token out and is none of these. Rows whose answers have ended are not looked at.

    Args:
        ids: What each prompt is called.
        end_id: The token that ends an answer.
    """

    def __init__(self, ids: Sequence[str], end_id: int | None) -> None:
        self.ids, self.end_id, self.begins = list(ids), end_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at the logits of the next token.

        Args:
            input_ids: What there is so far, shape (batch, seq); with beams all beams of a prompt one after the other.
            scores: Logits or log-probabilities of the next token, shape (batch, vocab).

        Returns:
            The scores, as they are.

        Raises:
            EvaluationError: One is NaN or plus infinity.
        """
        self.begins = self.begins or input_ids.shape[1]
        highest = scores.amax(dim=1)  # NaN where one is
        wrong = highest.isnan() | highest.isposinf()
        if self.end_id is not None:
            wrong &= ~(input_ids[:, self.begins :] == self.end_id).any(dim=1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0]) * len(self.ids) // len(scores)
            name = self.ids[row]
            raise EvaluationError(
                f"the model's logits are not finite at token {input_ids.shape[1] - self.begins + 1} of the answer to"
                f" '{name[:60]}', so no token is the likeliest; the model or its adapter has diverged, or {scores.dtype}"
                " is too narrow for it (model.dtype)"
            )
        return scores

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone.

        Args:
            rows: Their places in the batch so far.
        """
        self.ids = [self.ids[row] for row in rows]


class KeyedDraw:
    """Draws one token for each row from a stream of its own, so that a draw depends on no other row and on no batch.

    The likeliest token is taken afterwards: of the draws alone, as everything else is ruled out here.

    Args:
        ids: What the draws of each row are keyed by.
        seed: Root of the streams.
    """

    def __init__(self, ids: Sequence[str], seed: int) -> None:
        self.ids, self.seed, self.step = list(ids), seed, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Rule out everything but the tokens drawn.

        Args:
            input_ids: What there is so far, shape (batch, seq).
            scores: Logits of the next token, shape (batch, vocab).

        Returns:
            0 for the tokens drawn, minus infinity for all others.
        """
        uniform = [
            np.random.default_rng(seed_for(self.seed, "sampling", name, self.step)).random()
            for name in self.ids
        ]
        self.step += 1
        heights = scores.double().softmax(dim=-1).cumsum(dim=-1)
        wanted = torch.tensor(uniform, dtype=torch.float64, device=scores.device)[:, None] * heights[:, -1:]
        drawn = torch.searchsorted(heights, wanted, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone.

        Args:
            rows: Their places in the batch so far.
        """
        self.ids = [self.ids[row] for row in rows]


def decoding_config(tokenizer: Any, max_new_tokens: int, decoding: DecodingSettings | None = None) -> Any:
    """The decoding that was asked for, whatever the model's own generation config says.

    Draws are made by a logits processor of their own (`KeyedDraw`), so for transformers sampling is greedy too.

    Args:
        tokenizer: The model's tokenizer.
        max_new_tokens: Longest answer in tokens.
        decoding: How; greedy where None.

    Returns:
        transformers' `GenerationConfig`.
    """
    from transformers import GenerationConfig

    told = (decoding or DecodingSettings()).describe(seed=0)
    beams = {"length_penalty": told["length_penalty"]} if told["kind"] == "beam" else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=told.get("num_beams", 1),
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **beams,
    )


@contextmanager
def only_config(config: Any, model: Any) -> Iterator[Any]:
    """A decoding config that the model's own cannot fill up, as `generate` would do where a setting is not given.

    What the model's own says about structure, the token a decoder starts with, is taken over.

    Args:
        config: How to decode; completed.
        model: A generating model, bare or wrapped by peft.

    Yields:
        The config; the model's own is put back afterwards.
    """
    own = {m: vars(m)["generation_config"] for m in model.modules() if "generation_config" in vars(m)}
    starts = [getattr(c, "decoder_start_token_id", None) for c in own.values()]
    config.decoder_start_token_id = next((start for start in starts if start is not None), None)
    try:
        for module in own:
            module.generation_config = config
        yield config
    finally:
        for module, kept in own.items():
            module.generation_config = kept
