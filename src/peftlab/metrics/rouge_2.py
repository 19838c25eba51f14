"""ROUGE-2: pairs of words shared with the best reference, mean over examples.

The F-measure of rouge_score's `rouge2`: lower-cased, only a-z and 0-9 kept, the reference with the largest F taken.
Words are compared as they stand; `rouge_2_stemmed` compares stems, as most papers on summaries do. The two must not
be compared.

Source: Lin 2004; rouge_score/rouge_scorer.py, `score_multi`.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.rouge_scores import rouge_score
from peftlab.task import Example

NAME = "rouge_2"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """ROUGE-2 F-measure, the best over an example's references, mean over examples.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, an example has no reference, or none that
            rouge_score can read.

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.", "A cheap pub is Aromi."))]
        >>> print(score(["aromi, cheap pubs"], examples, seed=42))
        rouge_2 0.00 (0-100, n=1)
    """
    return rouge_score(NAME, "rouge2", predictions, examples, stemmer=False, seed=seed)
