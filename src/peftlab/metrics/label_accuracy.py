"""Label accuracy: the share of answers that name the right class, for models that write the class as a text.

An answer is read leniently: case, white space, punctuation and symbols around it do not count, of any script, nor what
follows its first line. An answer that is none of the labels is wrong; the signature counts such answers apart. A
classifier's classes are scored by `accuracy`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "label_accuracy"
UNIT = "rate"
HIGHER_IS_BETTER = True


def read_label(text: str) -> str:
    r"""The label that a text names.

    Args:
        text: A prediction or a reference.

    Returns:
        The first line in lower case, without white space, punctuation and symbols around it.

    Example:
        >>> read_label(" “Neutral.”\nBecause")
        'neutral'
    """
    first = next(iter(text.strip().splitlines()), "")
    around = "".join({character for character in first if unicodedata.category(character)[0] in "PSZC"})
    return first.strip(around).casefold()


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of predictions that name a reference's label.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; the labels are those that occur as references, and those that
            `Example.facts` tells as "labels", a JSON list.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; the signature counts the answers that are no label.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> examples = [Example("test-0", "s", ("neutral",)), Example("test-1", "t", ("entailment",))]
        >>> found = score(["Neutral.", "I cannot say"], examples, seed=42)
        >>> found.value, found.signature
        (0.5, 'first line|case:lc|labels:2|no label:1')
    """
    require_references(NAME, predictions, examples)
    labels = {read_label(reference) for example in examples for reference in example.references}
    told = {text for example in examples for name, text in example.facts if name == "labels"}
    labels |= {read_label(label) for text in told for label in json.loads(text)}
    answers = [read_label(prediction) for prediction in predictions]
    hits = [
        float(answer in {read_label(reference) for reference in example.references})
        for answer, example in zip(answers, examples, strict=True)
    ]
    unread = sum(answer not in labels for answer in answers)
    signature = f"first line|case:lc|labels:{len(labels)}|no label:{unread}"
    return mean_score(
        NAME, hits, unit=UNIT, higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
