"""BLEU, case counted: n-gram overlap with all references, over the whole test set.

sacrebleu's default, the right one where capitals carry meaning (translation, code). The signature says `case:mixed`.
The E2E challenge ignores case: there, use `bleu`.

Source: Papineni et al. 2002; sacrebleu (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import bleu_score

NAME = "bleu_cased"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Cased corpus BLEU, equal to `sacrebleu.corpus_bleu`.

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
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.",))]
        >>> score(["aromi is a cheap pub."], examples, seed=42).value < 100
        True
    """
    return bleu_score(NAME, predictions, examples, lowercase=False, seed=seed)
