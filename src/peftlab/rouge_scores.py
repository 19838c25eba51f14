"""What the ROUGE metrics share: rouge_score's F-measure per example, with or without its stemmer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

from peftlab.errors import NotComputedError
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

_READABLE = re.compile("[a-z0-9]")


def rouge_values(
    kind: str, predictions: Sequence[str], references: Sequence[Sequence[str]], *, stemmer: bool
) -> list[float]:
    """F-measure of each example, with the reference of the largest one.

    Args:
        kind: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        predictions: The model's answers.
        references: The accepted answers per example.
        stemmer: Whether words are compared by their Porter stem.

    Returns:
        One value in 0-1 per example.

    Example:
        >>> rouge_values("rouge1", ["cheap pubs"], [["a cheap pub"]], stemmer=True)
        [0.8]
    """
    scorer = RougeScorer([kind], use_stemmer=stemmer)
    return [
        float(scorer.score_multi(group, prediction)[kind].fmeasure)
        for prediction, group in zip(predictions, references, strict=True)
    ]


def rouge_score(
    name: str,
    kind: str,
    predictions: Sequence[str],
    examples: Sequence[Example],
    *,
    stemmer: bool,
    seed: int,
) -> Score:
    """Mean F-measure of one kind of ROUGE, the best over an example's references.

    Args:
        name: The metric's name.
        kind: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        stemmer: Whether words are compared by their Porter stem.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: An example has no reference that rouge_score can read: it knows only a-z and 0-9 and would give
            0 to a perfect answer.

    Source: Lin 2004, sections 2 and 3; rouge_score/rouge_scorer.py, `score_multi`.
    """
    require_references(name, predictions, examples)
    unread = [e.id for e in examples if not any(_READABLE.search(r.lower()) for r in e.references)]
    if unread:
        raise NotComputedError(
            f"{name} reads only the letters a-z and digits, and of {len(unread)} of {len(examples)} examples no reference"
            f" has any (the first is '{unread[0]}'); bleu and chrf read every language"
        )
    references = [example.references for example in examples]
    values = [100 * value for value in rouge_values(kind, predictions, references, stemmer=stemmer)]
    signature = f"{kind}|fmeasure|stemmer:{'porter' if stemmer else 'no'}|refs:max|mean|rouge_score:{version('rouge_score')}"
    return mean_score(
        name, values, unit="0-100", higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
