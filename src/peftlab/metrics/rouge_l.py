r"""ROUGE-L: the longest common subsequence of words with the best reference, mean over examples.

$F = 2 P R / (P + R)$, with $P = LCS / |prediction|$ and $R = LCS / |reference|$ in words. This is `rougeL` of
rouge_score, as most papers report it: lower-cased, only a-z and 0-9 kept ("Café" is read as "caf"), no stemmer, the
reference with the largest F taken.

The E2E challenge's official ROUGE-L is another quantity (beta = 1.2, largest P and largest R taken separately,
Stanford tokenizer); its numbers must not be compared with these.

Source: Lin 2004, section 3.1; rouge_score/rouge_scorer.py, `score_multi`.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.rouge_scores import rouge_score
from peftlab.task import Example

NAME = "rouge_l"
UNIT = "0-100"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """ROUGE-L F-measure, the best over an example's references, mean over examples.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, an example has no reference, or none that rouge_score
            can read (it knows only a-z and 0-9 and would give 0 to a perfect answer).

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.", "A cheap pub is Aromi."))]
        >>> print(score(["aromi, a cheap pub"], examples, seed=42))
        rouge_l 88.89 (0-100, n=1)
    """
    return rouge_score(NAME, "rougeL", predictions, examples, stemmer=False, seed=seed)
