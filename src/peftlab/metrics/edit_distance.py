"""Edit distance: characters to insert, delete or replace to turn an answer into its nearest reference, mean over examples.

Levenshtein's distance divided by the length of the longer text: 0 for equal texts, 1 where nothing can be kept. White
space at both ends is left out, case counts. It needs no parser, so it is for code and for any text.

Source: Levenshtein 1966; Myers 1999 and Hyyrö 2003 for the bit-parallel form.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "edit_distance"
UNIT = "rate"
HIGHER_IS_BETTER = False


def distance(first: str, second: str) -> int:
    """Levenshtein's distance, one machine operation per character instead of one per pair of characters.

    Args:
        first: A text.
        second: A text.

    Returns:
        The least number of insertions, deletions and replacements.

    Example:
        >>> distance("kitten", "sitting")
        3
    """
    if not first:
        return len(second)
    places: dict[str, int] = {}
    for index, character in enumerate(first):
        places[character] = places.get(character, 0) | 1 << index
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    up, down, value = every, 0, len(first)  # where the column grows or falls by one, and its last entry
    for character in second:
        equal = places.get(character, 0)
        diagonal = ((((equal & up) + up) ^ up) | equal | down) & every
        right_up = down | ~(diagonal | up) & every
        right_down = up & diagonal
        value += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & every
        right_down = right_down << 1 & every
        up = right_down | ~(diagonal | right_up) & every
        down = right_up & diagonal
    return value


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean normalised edit distance to the nearest reference.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1, smaller is better, with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> score(["return a"], [Example("test-0", "s", ("return b", "a"))], seed=42).value
        0.125
    """
    require_references(NAME, predictions, examples)
    values = [
        min(
            distance(prediction.strip(), reference.strip())
            / max(1, len(prediction.strip()), len(reference.strip()))
            for reference in example.references
        )
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    signature = "levenshtein|characters|length:longer|refs:min|mean"
    return mean_score(
        NAME,
        values,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
