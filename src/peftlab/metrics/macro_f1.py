r"""Macro-F1: the mean of the classes' F1, all classes alike however rare.

$F_1 = 2 TP / (2 TP + FP + FN)$ for each class. Predictions are class indices as strings, as for `accuracy`. The classes
are those that occur as labels or as predictions; a prediction that is no class index is wrong and no class of its own.

Source: sklearn.metrics.f1_score(average="macro", zero_division=0); Opitz and Burst 2019, the mean of F1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftlab.errors import EvaluationError
from peftlab.metric import Score, require_pairs
from peftlab.task import Example
from peftlab.text_scores import corpus_score

NAME = "macro_f1"
UNIT = "rate"
HIGHER_IS_BETTER = True


def macro_f1(counts: np.ndarray) -> float:
    """Mean F1 over the classes that occur.

    Args:
        counts: Per class its labels, its predictions and where both agree, shape (3 * classes,), these three one after
            the other.

    Returns:
        The mean in 0-1.

    Example:
        >>> round(macro_f1(np.array([2, 1, 1, 2, 1, 1])), 4)
        0.6667
    """
    given, made, right = counts.reshape(3, -1)
    present = given + made > 0
    return float((2 * right[present] / (given + made)[present]).mean())


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean F1 over classes.

    Args:
        predictions: Predicted class indices, as strings.
        examples: The examples, each with a label.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no label.

    Example:
        >>> examples = [Example("test-0", "s", label=0), Example("test-1", "t", label=1)]
        >>> round(score(["0", "0"], examples, seed=42).value, 4)
        0.3333
    """
    require_pairs(NAME, predictions, examples)
    labels = []
    for example in examples:
        if example.label is None:
            raise EvaluationError(
                f"{NAME}: example '{example.id}' has no label; this metric is for label tasks, "
                "for texts use bleu, rouge_l or exact_match"
            )
        labels.append(example.label)
    places = {str(label): place for place, label in enumerate(sorted(set(labels)))}
    # an index beyond the labels of this split is a class all the same; anything else is none
    for answer in sorted(set(predictions) - set(places)):
        if answer.isascii() and answer.isdecimal() and (answer == "0" or not answer.startswith("0")):
            places[answer] = len(places)
    rows = np.zeros((len(labels), 3, len(places)), dtype=np.int64)
    for row, label, answer in zip(rows, labels, predictions, strict=True):
        given, made = places[str(label)], places.get(answer)
        row[0, given] = 1
        if made is not None:
            row[1, made] = 1
            row[2, given] = made == given
    unread = sum(answer not in places for answer in predictions)
    return corpus_score(
        NAME,
        rows.reshape(len(labels), -1),
        macro_f1,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=f"classes:{len(places)}|no class:{unread}|mean of F1",
        seed=seed,
        examples=examples,
    )
