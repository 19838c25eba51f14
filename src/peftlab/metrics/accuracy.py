"""Accuracy: the share of examples whose class was predicted.

A prediction is the class index written as a string and is right where it equals `str(example.label)`, character by
character: "1" is class 1, while "1 ", "01" and a class name are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.errors import EvaluationError
from peftlab.metric import Score, require_pairs
from peftlab.task import Example
from peftlab.text_scores import mean_score

NAME = "accuracy"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of predictions that equal their example's label.

    Args:
        predictions: Predicted class indices, as strings.
        examples: The examples, each with a label.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no label.

    Example:
        >>> score(["0", "2"], [Example("test-0", "s", label=0), Example("test-1", "t", label=1)], seed=42).value
        0.5
    """
    require_pairs(NAME, predictions, examples)
    for example in examples:
        if example.label is None:
            raise EvaluationError(
                f"{NAME}: example '{example.id}' has no label; this metric is for label tasks, "
                "for texts use bleu, rouge_l or exact_match"
            )
    hits = [float(p == str(example.label)) for p, example in zip(predictions, examples, strict=True)]
    return mean_score(
        NAME, hits, unit=UNIT, higher_is_better=True, signature="exact", seed=seed, examples=examples
    )
