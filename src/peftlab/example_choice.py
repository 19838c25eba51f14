"""Which examples are scored, and which of them a person is shown: the best, the worst, and some drawn at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peftlab.errors import DataError, UnknownNameError
from peftlab.metric import Score
from peftlab.streams import permutation
from peftlab.task import Example, Splits, choose

SPLITS = ("train", "validation", "test")
NUM_SHOWN = 3
"""Examples shown of each kind."""


def check_split(split: str) -> str:
    """Refuse the name of a split that no task has.

    Args:
        split: "train", "validation" or "test".

    Returns:
        The name.

    Raises:
        UnknownNameError: There is no such split.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    return split


def choose_examples(splits: Splits, split: str, limit: int | None, seed: int) -> list[Example]:
    """A split, or a seeded choice of it.

    Args:
        splits: A task's data.
        split: "train", "validation" or "test".
        limit: How many examples; None takes all.
        seed: Seeds the choice.

    Returns:
        The examples.

    Raises:
        UnknownNameError: There is no such split.
        DataError: There is nothing in it.
    """
    examples: Sequence[Example] = getattr(splits, check_split(split))
    if not examples:
        raise DataError(
            f"the split '{split}' is empty; choose another one of {', '.join(SPLITS)}, or check the data"
        )
    return choose(examples, limit, seed=seed)


def values_of_examples(score: Score) -> list[float] | None:
    """What a metric gives each example alone.

    Args:
        score: A score with its rows.

    Returns:
        One value for each row, in the score's unit; None where the metric keeps no rows, or one of them alone has no
        value. A corpus score (BLEU, NIST) is not the mean of these.
    """
    if score.rows is None:
        return None
    if score.value_of is None:
        values = [float(row) for row in score.rows]
    else:
        values = [float(score.value_of(row)) for row in score.rows]
    return values if all(map(math.isfinite, values)) else None


def pick_examples(
    score: Score,
    ids: Sequence[str],
    *,
    seed: int,
    probabilities: Sequence[float] | None = None,
    count: int = NUM_SHOWN,
) -> dict[str, Any]:
    """The examples that a metric scores best and worst, and some drawn at random from all.

    Args:
        score: The headline's score.
        ids: The examples, in the order of its rows.
        seed: Seeds the draw.
        probabilities: What the model gave its own answers, in 0-1: of right answers the surest are the best, of wrong
            ones the surest the worst. None where that is not known.
        count: How many of each.

    Returns:
        JSON-ready: the metric with unit and direction; under "best", "worst" and "random" the examples' ids, scores and
        probabilities; under "note" what a person should know. An example that scores no more than any other is not
        among the best, and none that scores no less among the worst.

    Example:
        >>> from peftlab.text_scores import mean_score
        >>> hits = mean_score("hits", [1, 0, 1], unit="rate", higher_is_better=True, signature="", seed=1)
        >>> found = pick_examples(hits, ["a", "b", "c"], seed=1, probabilities=[0.6, 0.9, 0.8])
        >>> [entry["id"] for entry in found["best"]], [entry["id"] for entry in found["worst"]]
        (['c', 'a'], ['b'])
    """
    told: dict[str, Any] = {
        "metric": score.metric,
        "unit": score.unit,
        "higher_is_better": score.higher_is_better,
        "best": [],
        "worst": [],
    }
    values = values_of_examples(score)
    if values is not None and len(values) != len(ids):
        values = None

    def entry(i: int) -> dict[str, Any]:
        """One example, without its texts."""
        sure = {} if probabilities is None else {"probability": probabilities[i]}
        return {"id": ids[i], "score": None if values is None else values[i]} | sure

    told["random"] = [entry(i) for i in permutation(len(ids), seed, "shown")[:count]]
    if values is None:
        note = f"{score.metric} has no value for a single example here, so none can be called best or worst"
    elif min(values) == max(values):
        note = f"{score.metric} is {values[0]:.4g} for every example, so none is best or worst"
    else:
        goods = [value if score.higher_is_better else -value for value in values]
        sure = [0.0] * len(ids) if probabilities is None else list(probabilities)
        sides = [p if good == max(goods) else -p for good, p in zip(goods, sure, strict=True)]
        order = sorted(range(len(ids)), key=lambda i: (-goods[i], -sides[i], i))
        told["best"] = [entry(i) for i in order if goods[i] > min(goods)][:count]
        order = sorted(range(len(ids)), key=lambda i: (goods[i], sides[i], i))
        told["worst"] = [entry(i) for i in order if goods[i] < max(goods)][:count]
        note = f"{score.metric} of each example alone" + (
            "; the score of all is not their mean" if score.value_of is not None else ""
        )
    return told | {"note": note}
