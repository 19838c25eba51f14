"""BLEU as the E2E NLG challenge's script computes it: case ignored, an order without any match is not smoothed.

On a test set of some hundred sentences this is `bleu` to four places. They part where a whole corpus has no match of
some order: there sacrebleu smooths, and this score is nearly 0.

Source: tuetschek/e2e-metrics, metrics/pymteval.py, a port of mteval-v13a; Papineni et al. 2002.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftlab.metric import Score
from peftlab.ngram_scores import bleu_statistics, challenge_bleu
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references
from peftlab.word_splitting import split_like_mteval

NAME = "bleu_e2e"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Corpus BLEU by the E2E challenge's definition.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.", "A cheap pub is Aromi."))]
        >>> print(score(["Aromi is a nice pub."], examples, seed=42))
        bleu_e2e 0.01 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    rows = [
        bleu_statistics(split_like_mteval(prediction), [split_like_mteval(r) for r in example.references])
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return corpus_score(
        NAME,
        np.asarray(rows),
        lambda sums: 100 * challenge_bleu(sums),
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature="e2e-metrics|tok:13a|case:lc|smooth:none|refs:closest length",
        seed=seed,
        examples=examples,
    )
