"""BLEU as CodeXGLUE scores code: words as white space splits them, case counted, one added to every count.

The score of code translation and refinement, over the whole test set. Code is to be given as tokens with spaces between,
as those data sets have it.

Source: microsoft/CodeXGLUE, Code-Code/code-to-code-trans/evaluator/bleu.py; Lin and Och 2004.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftlab.metric import Score
from peftlab.ngram_scores import added_bleu, bleu_statistics
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references

NAME = "bleu_codexglue"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Corpus BLEU by CodeXGLUE's definition.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples; CodeXGLUE rounds it to two places.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> print(score(["return a + b ;"], [Example("test-0", "s", ("return a - b ;",))], seed=42))
        bleu_codexglue 45.18 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    rows = [
        bleu_statistics(prediction.split(), [r.split() for r in example.references], length="shortest")
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return corpus_score(
        NAME,
        np.asarray(rows),
        lambda sums: 100 * added_bleu(sums),
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature="codexglue|corpus|tok:white space|case:mixed|smooth:add 1|refs:shortest length",
        seed=seed,
        examples=examples,
    )
