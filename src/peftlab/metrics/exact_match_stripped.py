"""Exact match with white space counted: the share of answers that equal one of their references but for both ends.

Both sides are stripped, and nothing else is changed: two spaces are not one. This is the exact match of CodeXGLUE;
`exact_match` reads every run of white space as one space.

Source: microsoft/CodeXGLUE, Code-Code/code-to-code-trans/evaluator/evaluator.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "exact_match_stripped"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of predictions that equal a reference after both are stripped.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> score([" SELECT a"], [Example("test-0", "s", ("SELECT a", "SELECT b"))], seed=42).value
        1.0
    """
    require_references(NAME, predictions, examples)
    hits = [
        float(prediction.strip() in {reference.strip() for reference in example.references})
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    signature = "whitespace:stripped|case:mixed|refs:any"
    return mean_score(
        NAME, hits, unit=UNIT, higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
