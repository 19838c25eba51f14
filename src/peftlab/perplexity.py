"""Perplexity: how many tokens a model wavers between, on average, where it is told the right answer up to there.

It is a score of a model and not of texts, so it is no leaf of `metrics/`: it reads the model's logits over rows that
are collated as for training, and counts the tokens that carry a label alone. Values depend on the tokenizer: compare
only models that share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.metric import Score
from peftlab.text_scores import corpus_score

NAME = "perplexity"
IGNORED = -100  # the label of a token that is not to be answered: prompt and padding


def perplexity(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int,
    groups: Sequence[int] | None = None,
    left_out: int = 0,
) -> Score:
    r"""Perplexity over the tokens with a label.

    $\exp(-\frac{1}{T} \sum_t \log p(y_t | y_{<t}, x))$ over all T labelled tokens of all rows together.

    Args:
        model: A causal or encoder-decoder language model, with or without an adapter; scored in eval mode, and left in
            the mode it was in.
        batches: Collated rows on the model's device, each with `labels` of shape (batch, seq), -100 where a token does
            not count.
        seed: Seeds the bootstrap.
        groups: Number of the example that each row answers, from 0: rows of one example are resampled together. None
            takes each row for an example.
        left_out: Rows that could not be made, for the signature.

    Returns:
        The perplexity, smaller is better, with a 95 % interval over examples; `count` is the number of examples with a
        labelled token, and the signature has the numbers of tokens and of rows left out.

    Raises:
        EvaluationError: There is no labelled token, a batch has no labels, or a logit is not finite.

    Source: Jelinek et al. 1977; transformers' causal models for the shift by one token.
    """
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = [row for batch in batches for row in _losses(model, batch)]
    finally:
        model.train(was_training)
    counted = _by_example(rows, range(len(rows)) if groups is None else groups)
    if not len(counted):
        raise EvaluationError(f"{NAME}: none of {len(rows)} rows has a token to score; check the labels")
    if not np.isfinite(counted).all():
        raise EvaluationError(
            f"{NAME}: the model's logits are not finite; check the model and its number type"
        )
    return corpus_score(
        NAME,
        counted,
        lambda sums: float(np.exp(sums[0] / sums[1])),
        unit="perplexity",
        higher_is_better=False,
        signature=f"tokens:{int(counted[:, 1].sum())}|labelled tokens alone|micro"
        + (f"|rows left out:{left_out}" if left_out else ""),
        seed=seed,
    )


def _by_example(rows: Sequence[tuple[float, int]], groups: Sequence[int]) -> np.ndarray:
    """Summed loss and number of tokens of each example with a labelled token, shape (examples, 2)."""
    if len(groups) != len(rows):
        raise EvaluationError(f"{NAME}: {len(groups)} groups for {len(rows)} rows; give each row one")
    sums = np.zeros((max(groups, default=-1) + 1, 2))
    for group, row in zip(groups, rows, strict=True):
        sums[group] += row
    return sums[sums[:, 1] > 0]


def _losses(model: Any, batch: Mapping[str, Any]) -> list[tuple[float, int]]:
    """Summed loss in nats and number of labelled tokens of each row."""
    import torch
    from torch.nn.functional import cross_entropy

    labels = batch.get("labels")
    if labels is None:
        raise EvaluationError(f"{NAME}: a batch has no labels; there is: {', '.join(sorted(batch))}")
    logits = model(**batch).logits[:, -labels.shape[1] :]  # behind an adapter's virtual tokens
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(precise.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    sums, numbers = losses.sum(dim=1, dtype=torch.float64), (labels != IGNORED).sum(dim=1)
    return list(zip(sums.tolist(), numbers.tolist(), strict=True))
