"""Smoothed BLEU-4 of sentences, as CodeXGLUE scores summaries of code: mean over examples.

Each sentence has a BLEU of its own, one added to matches and counts of order 2 to 4. Lower-cased, each punctuation mark
a word. Not `bleu`, which counts over the whole test set.

Source: microsoft/CodeXGLUE, Code-Text/code-to-text/evaluator/evaluator.py; Lin and Och 2004.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.ngram_scores import bleu_statistics, sentence_bleu
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references
from peftlab.word_splitting import split_like_codexglue

NAME = "smoothed_bleu_4"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean smoothed BLEU-4 of sentences.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> examples = [Example("test-0", "s", ("Returns the sum of a list .",))]
        >>> print(score(["Returns the sum ."], examples, seed=42))
        smoothed_bleu_4 38.81 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    values = [
        100
        * sentence_bleu(
            bleu_statistics(
                split_like_codexglue(prediction),
                [split_like_codexglue(reference) for reference in example.references],
                length="shortest",
            )
        )
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    signature = (
        "codexglue|sentence|tok:words and marks|case:lc|smooth:add 1 to order 2-4|refs:shortest length|mean"
    )
    return mean_score(
        NAME, values, unit=UNIT, higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
