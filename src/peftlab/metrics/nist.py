r"""NIST: n-grams shared with all references, rare ones worth more, over the whole test set.

$NIST = BP \cdot \sum_{n=1}^{5} \frac{\sum_{matched} Info(w_1 ... w_n)}{number of n-grams}$ in bits, with
$Info = \log_2 (count(w_1 ... w_{n-1}) / count(w_1 ... w_n))$ over all references and a penalty where the answers are
shorter than the references' mean length. This is the E2E challenge's Python script; the challenge's Perl script gives
slightly other numbers for some systems. Values depend on the test set: compare only within one.

Source: Doddington 2002; tuetschek/e2e-metrics, metrics/pymteval.py, a port of mteval-v13a.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.ngram_scores import NistReferences, nist_from_statistics
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references
from peftlab.word_splitting import split_like_mteval

NAME = "nist"
UNIT = "bits"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Corpus NIST; the interval keeps the weights of n-grams and resamples examples.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score in bits with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a cheap pub.", "A cheap pub is Aromi."))]
        >>> print(score(["Aromi is a nice pub."], examples, seed=42))
        nist 2.75 (bits, n=1)
    """
    require_references(NAME, predictions, examples)
    references = [[split_like_mteval(reference) for reference in example.references] for example in examples]
    statistics = NistReferences(references).statistics([split_like_mteval(one) for one in predictions])
    return corpus_score(
        NAME,
        statistics,
        nist_from_statistics,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature="e2e-metrics|tok:13a|case:lc|order:5|length:mean of refs",
        seed=seed,
        examples=examples,
    )
