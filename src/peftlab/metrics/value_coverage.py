"""Value coverage: the share of names and numbers that the answers hold verbatim.

Of all `Example.values` of all examples together (micro), how many stand in their prediction, letter by letter and with
the same case. A value counts wherever its characters stand, also inside a longer word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.metric import Score, require_pairs
from peftlab.task import Example
from peftlab.text_scores import corpus_score

NAME = "value_coverage"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of values that stand in the predictions.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; those without values are left out.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; `count` is the number of examples that have values.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or no example has values.

    Example:
        >>> examples = [Example("test-0", "s", values=("Aromi", "Café Rouge"))]
        >>> score(["Aromi is a pub near the cafe."], examples, seed=42).value
        0.5
    """
    require_pairs(NAME, predictions, examples)
    pairs = [(p, e.values) for p, e in zip(predictions, examples, strict=True) if e.values]
    if not pairs:
        raise EvaluationError(
            f"{NAME}: none of the {len(examples)} examples has values to look for; "
            "leave this metric out for this task, or let the task fill Example.values"
        )
    found = np.array([sum(value in prediction for value in values) for prediction, values in pairs])
    asked = np.array([len(values) for _, values in pairs])
    return corpus_score(
        NAME,
        np.stack([found, asked], axis=1),
        lambda sums: float(sums[0] / sums[1]),
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature="verbatim|case:mixed|micro",
        seed=seed,
        examples=examples,
    )
