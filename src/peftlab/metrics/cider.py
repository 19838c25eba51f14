"""CIDEr: n-grams shared with all references, common ones worth less, mean over examples.

The form of COCO and the E2E challenge (CIDEr-D): cosines of clipped tf-idf weights of order 1 to 4, a penalty where
lengths differ, 10 times the mean over references. What is common is counted in this test set's references, so values
depend on the test set: compare only within one. For a single example every weight is 0, and it is not computed.

Words are split as the challenge's script does for its own texts (`word_splitting.split_like_stanford`).

Source: Vedantam et al. 2015; pycocoevalcap/cider/cider_scorer.py, as used by tuetschek/e2e-metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.errors import NotComputedError
from peftlab.metric import Score
from peftlab.ngram_scores import CiderReferences
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references
from peftlab.word_splitting import split_like_stanford

NAME = "cider"
UNIT = "0-10"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean CIDEr; the interval keeps the weights of n-grams and resamples examples.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-10 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: There is a single example.

    Example:
        >>> examples = [Example("test-0", "s", ("a cheap pub",)), Example("test-1", "s", ("by the old river",))]
        >>> print(score(["a cheap pub", "by the old river"], examples, seed=42))
        cider 8.75 [7.50, 10.00] (0-10, n=2)
    """
    require_references(NAME, predictions, examples)
    if len(examples) < 2:
        raise NotComputedError(
            f"{NAME} weighs words by how few of the examples use them, which one example cannot tell; "
            "give at least 2 examples"
        )
    references = [
        [split_like_stanford(reference) for reference in example.references] for example in examples
    ]
    values = CiderReferences(references).values([split_like_stanford(one) for one in predictions])
    signature = "coco|cider-d|order:4|sigma:6|tok:ptb-e2e|case:lc|idf:these references|refs:mean|mean"
    return mean_score(
        NAME,
        values,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
