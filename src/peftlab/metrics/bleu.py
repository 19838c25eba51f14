"""BLEU, case ignored: n-gram overlap with all references, over the whole test set.

Lower-cased, because the official scorer of the E2E challenge ignores case: on its test set this metric and the
official one agree to 0.01 on 0-100 (`tests/parity/test_bleu_official.py`), while cased BLEU is some four points lower.
The signature says `case:lc`. Use `bleu_cased` where case counts.

Source: Papineni et al. 2002; sacrebleu (Post 2018); the official script is tuetschek/e2e-metrics, measure_scores.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import bleu_score

NAME = "bleu"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Lower-cased corpus BLEU, equal to `sacrebleu.corpus_bleu(..., lowercase=True)`.

    As in sacrebleu, a corpus whose predictions all have fewer than four tokens scores 0.

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
        >>> print(score(["aromi is a cheap pub."], examples, seed=42))
        bleu 100.00 (0-100, n=1)
    """
    return bleu_score(NAME, predictions, examples, lowercase=True, seed=seed)
