"""chrF: n-grams of characters shared with the best reference, over the whole test set.

sacrebleu's default (chrF2): orders 1 to 6, recall counted twice, white space left out, case counted. It needs no
words, so it suits languages and code that other scores split badly.

Source: Popović 2015; sacrebleu (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics import CHRF

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references

NAME = "chrf"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Corpus chrF2, equal to `sacrebleu.corpus_chrf`.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with sacrebleu's signature and a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.", "A cheap pub is Aromi."))]
        >>> print(score(["Aromi is a nice pub."], examples, seed=42))
        chrf 50.14 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    scorer = CHRF()
    # sacrebleu's own steps: it gives a corpus score alone, and the interval needs each example's counts
    rows = [
        scorer._extract_corpus_statistics([prediction], [[reference] for reference in example.references])[0]
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    counts = {len(example.references) for example in examples}
    scorer.num_refs = counts.pop() if len(counts) == 1 else -1  # -1 is sacrebleu's "var"
    return corpus_score(
        NAME,
        np.asarray(rows),
        lambda sums: float(scorer._compute_f_score(sums.tolist())),
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=str(scorer.get_signature()),
        seed=seed,
        examples=examples,
    )
