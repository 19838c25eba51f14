"""Exact match: the share of answers that equal one of their references.

Both sides are stripped and every run of white space becomes one space; case and punctuation count.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "exact_match"
UNIT = "rate"
HIGHER_IS_BETTER = True


def normalize(text: str) -> str:
    r"""The form in which texts are compared.

    Args:
        text: A prediction or a reference.

    Returns:
        The text stripped, every run of white space turned into one space, case kept.

    Example:
        >>> normalize("  SELECT a\n  FROM b ")
        'SELECT a FROM b'
    """
    return " ".join(text.split())


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of predictions that equal a reference after `normalize`.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> score(["SELECT  a"], [Example("test-0", "s", ("SELECT a", "SELECT b"))], seed=42).value
        1.0
    """
    require_references(NAME, predictions, examples)
    hits = [
        float(normalize(prediction) in {normalize(reference) for reference in example.references})
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    signature = "whitespace:collapsed|case:mixed|refs:any"
    return mean_score(
        NAME, hits, unit=UNIT, higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
