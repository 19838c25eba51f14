"""BLEU-1, cumulative: words shared with all references, over the whole test set.

The geometric mean of the precisions of order 1 to 1, times the brevity penalty, by sacrebleu and in lower case.
`bleu` is BLEU-4.

Source: Papineni et al. 2002, section 2.3; sacrebleu (Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import bleu_score

NAME = "bleu_1"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Lower-cased corpus BLEU-1.

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
        >>> print(score(["aromi is a nice pub."], examples, seed=42))
        bleu_1 83.33 (0-100, n=1)
    """
    return bleu_score(NAME, predictions, examples, lowercase=True, seed=seed, max_order=1)
