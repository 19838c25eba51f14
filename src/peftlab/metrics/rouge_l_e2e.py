r"""ROUGE-L as the E2E NLG challenge's official scorer computes it.

$F = (1 + \beta^2) R P / (R + \beta^2 P)$ with $\beta = 1.2$, where $P$ is the largest $LCS / |prediction|$ over the
references and $R$ the largest $LCS / |reference|$, maybe of another reference; mean over examples. Use it to compare
with published E2E numbers, and `rouge_l` for everything else.

The official scorer splits words with Stanford's PTB tokenizer in Java. `split_like_stanford` follows its rules as far
as texts about restaurants need them: on all 15 outputs of TGen the mean equals the official one to its four places, and on
three of them every one of the 630 segments does (`tests/parity/test_rouge_l_e2e_official.py`). For other texts
(abbreviations, addresses of web pages, fractions) that is not shown.

Source: pycocoevalcap/rouge/rouge.py as used by tuetschek/e2e-metrics; Lin 2004, section 3.1; Hyyrö 2004 for the
bit-parallel LCS.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.errors import EvaluationError
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references
from peftlab.word_splitting import split_like_stanford

NAME = "rouge_l_e2e"
UNIT = "0-100"
HIGHER_IS_BETTER = True

BETA = 1.2  # pycocoevalcap/rouge/rouge.py


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine operation per word instead of one per pair of words.

    Args:
        first: Words.
        second: Words.

    Returns:
        The length.

    Example:
        >>> lcs_length("a b c d".split(), "b x d".split())
        2
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(first)) - 1
    unmatched = every
    for word in second:
        common = unmatched & places.get(word, 0)
        unmatched = ((unmatched + common) | (unmatched - common)) & every
    return len(first) - unmatched.bit_count()


def segment_score(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one prediction.

    Args:
        prediction: The model's answer.
        references: Accepted answers; those without any word are passed over.

    Returns:
        The score in 0-1.

    Example:
        >>> round(segment_score("a cheap pub", ["A cheap, small pub."]), 4)
        0.8356
    """
    words = split_like_stanford(prediction)
    lengths = [
        (lcs_length(words, other), len(other)) for other in map(split_like_stanford, references) if other
    ]
    precision = max((common / len(words) for common, _ in lengths), default=0.0) if words else 0.0
    recall = max((common / length for common, length in lengths), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """ROUGE-L by the E2E challenge's definition, mean over examples.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; any number of references each.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, an example has no reference, or none with a word.

    Example:
        >>> examples = [Example("test-0", "s", ("Aromi is a pub.", "A cheap pub is Aromi."))]
        >>> print(score(["Aromi is a cheap pub."], examples, seed=42))
        rouge_l_e2e 90.71 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    for example in examples:
        if not any(map(split_like_stanford, example.references)):
            raise EvaluationError(
                f"{NAME}: no reference of example '{example.id}' has a word, only punctuation; check the task's data"
            )
    values = [100 * segment_score(p, e.references) for p, e in zip(predictions, examples, strict=True)]
    signature = "coco|beta:1.2|tok:ptb-e2e|case:lc|precision,recall:max over refs|mean"
    return mean_score(
        NAME, values, unit=UNIT, higher_is_better=True, signature=signature, seed=seed, examples=examples
    )
