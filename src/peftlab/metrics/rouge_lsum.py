"""ROUGE-Lsum: common subsequences line by line with the best reference, mean over examples.

A summary of several sentences is compared sentence by sentence where each stands on a line of its own (rouge_score
takes the union of the common subsequences of all pairs of lines); texts of one line give ROUGE-L. Words are compared
as they stand; `rouge_lsum_stemmed` compares stems, as most papers on summaries do. The two must not be compared.

Source: Lin 2004; rouge_score/rouge_scorer.py, `score_multi`.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.rouge_scores import rouge_score
from peftlab.task import Example

NAME = "rouge_lsum"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """ROUGE-Lsum F-measure, the best over an example's references, mean over examples.

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
        rouge_lsum 50.00 (0-100, n=1)
    """
    return rouge_score(NAME, "rougeLsum", predictions, examples, stemmer=False, seed=seed)
