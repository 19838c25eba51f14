"""What several text metrics share: reference checks, corpus BLEU with its interval, and means with theirs.

Leaves of `metrics/` never import each other; this is the floor below them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.metrics import BLEU

from peftlab.errors import EvaluationError
from peftlab.metric import Score, bootstrap_interval, digest_examples, require_pairs
from peftlab.task import Example


def require_references(name: str, predictions: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuse lists that cannot be scored against references.

    Args:
        name: The metric's name, for the message.
        predictions: The model's answers.
        examples: The examples they answer.

    Raises:
        EvaluationError: Counts differ or are zero, or an example has no reference.
    """
    require_pairs(name, predictions, examples)
    missing = [example.id for example in examples if not example.references]
    if missing:
        raise EvaluationError(
            f"{name}: example '{missing[0]}' has no reference ({len(missing)} of {len(examples)} examples have none); "
            "every example needs at least one, or choose a metric that needs none"
        )


def mean_score(
    name: str,
    values: Sequence[float],
    *,
    unit: str,
    higher_is_better: bool,
    signature: str,
    seed: int,
    examples: Sequence[Example] = (),
) -> Score:
    """The mean of one value per example, with its bootstrap interval.

    Args:
        name: The metric's name.
        values: One value per example, shape (batch,), in `unit`.
        unit: "0-100" or "rate".
        higher_is_better: The direction.
        signature: What exactly was computed.
        seed: Seeds the bootstrap.
        examples: What was answered, so that the score is compared with others of the same alone.

    Returns:
        The score.

    Example:
        >>> mean_score("m", [0.0, 1.0], unit="rate", higher_is_better=True, signature="", seed=1).value
        0.5
    """
    array = np.asarray(values, dtype=np.float64)
    interval = bootstrap_interval(len(array), lambda chosen: float(array[chosen].mean()), seed=seed)
    value, asked = float(array.mean()), digest_examples(examples) if examples else ""
    return Score(name, value, unit, higher_is_better, len(array), interval, signature, array, asked=asked)


def corpus_score(
    name: str,
    statistics: np.ndarray,
    value_of: Callable[[np.ndarray], float],
    *,
    unit: str,
    higher_is_better: bool,
    signature: str,
    seed: int,
    examples: Sequence[Example] = (),
) -> Score:
    """A score that is a function of sums over examples, with its bootstrap interval.

    Args:
        name: The metric's name.
        statistics: What is summed, shape (batch, width).
        value_of: The score in `unit`, given sums of shape (width,).
        unit: "0-100", "rate" or what the metric is measured in.
        higher_is_better: The direction.
        signature: What exactly was computed.
        seed: Seeds the bootstrap.
        examples: What was answered, so that the score is compared with others of the same alone.

    Returns:
        The score; the interval resamples examples.

    Example:
        >>> made = np.array([[1, 2], [3, 4]])
        >>> kept = {"unit": "rate", "higher_is_better": True, "signature": "", "seed": 1}
        >>> round(corpus_score("m", made, lambda sums: float(sums[0] / sums[1]), **kept).value, 4)
        0.6667
    """
    interval = bootstrap_interval(
        len(statistics), lambda chosen: value_of(statistics[chosen].sum(axis=0)), seed=seed
    )
    value, asked = value_of(statistics.sum(axis=0)), digest_examples(examples) if examples else ""
    count = len(statistics)
    return Score(name, value, unit, higher_is_better, count, interval, signature, statistics, value_of, asked)


def bleu_score(
    name: str,
    predictions: Sequence[str],
    examples: Sequence[Example],
    *,
    lowercase: bool,
    seed: int,
    max_order: int = 4,
) -> Score:
    r"""Corpus BLEU by sacrebleu, with its bootstrap interval.

    $BLEU = BP \cdot \exp(\sum_{n=1}^{N} \frac{1}{N} \log p_n)$, with the closest reference length in BP and counts
    clipped by the largest count in any reference.

    Corpus BLEU is a function of sums over sentences, so the texts are read once and the interval resamples the
    sentences' statistics. Examples may differ in their number of references: each is scored against its own, as
    sacrebleu does where a reference stream holds None (a "" would be a reference of length 0 and could change BP).

    Args:
        name: The metric's name.
        predictions: The model's answers.
        examples: The examples they answer, with any number of references each.
        lowercase: Whether case is ignored.
        seed: Seeds the bootstrap.
        max_order: N, the longest n-gram; BLEU-N, cumulative. 1 to 4.

    Returns:
        The score on 0-100, equal to `sacrebleu.corpus_bleu`, with sacrebleu's signature.

    Raises:
        EvaluationError: Counts differ or are zero, or an example has no reference.

    Example:
        >>> same = Example("test-0", "s", ("A pub near the old river.", "A riverside pub."))
        >>> round(bleu_score("bleu", ["a pub near the old river."], [same], lowercase=True, seed=1).value, 6)
        100.0

    Source: Papineni et al. 2002, section 2.3; Post 2018 and sacrebleu/metrics/bleu.py for tokenizer and signature.
    """
    require_references(name, predictions, examples)
    statistics = sentence_statistics(predictions, examples, lowercase=lowercase)
    scorer = BLEU(lowercase=lowercase, force=True)
    counts = {len(example.references) for example in examples}
    scorer.num_refs = counts.pop() if len(counts) == 1 else -1  # -1 is sacrebleu's "var"
    return corpus_score(
        name,
        statistics,
        lambda sums: bleu_from_statistics(sums, max_order=max_order),
        unit="0-100",
        higher_is_better=True,
        signature=str(scorer.get_signature()) + (f"|order:{max_order}" if max_order != 4 else ""),
        seed=seed,
        examples=examples,
    )


def sentence_statistics(
    predictions: Sequence[str], examples: Sequence[Example], *, lowercase: bool
) -> np.ndarray:
    """What BLEU needs to know of each sentence, counted by sacrebleu.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, each with at least one reference.
        lowercase: Whether case is ignored.

    Returns:
        Per sentence its length, the closest reference length, matched n-grams of order 1-4, all n-grams of order 1-4;
        shape (batch, 10).

    Example:
        >>> sentence_statistics(["a b"], [Example("x", "s", ("a c d", "c b"))], lowercase=True).tolist()
        [[2, 2, 2, 0, 0, 0, 2, 1, 0, 0]]
    """
    # effective_order changes a sentence's score, never its counts; without it sacrebleu warns at every sentence.
    sentence = BLEU(lowercase=lowercase, force=True, effective_order=True)
    rows = []
    for prediction, example in zip(predictions, examples, strict=True):
        found = sentence.sentence_score(prediction, list(example.references))
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return np.asarray(rows, dtype=np.int64)


def bleu_from_statistics(statistics: np.ndarray, *, max_order: int = 4) -> float:
    """BLEU of summed sentence statistics.

    Args:
        statistics: Length, closest reference length, four matched and four total n-gram counts, shape (10,).
        max_order: The longest n-gram that counts.

    Returns:
        The score on 0-100, smoothed as sacrebleu does by default ("exp").

    Example:
        >>> round(bleu_from_statistics(np.array([4, 4, 4, 3, 2, 1, 4, 3, 2, 1])), 6)
        100.0
    """
    sys_len, ref_len, *counts = statistics.tolist()
    made = BLEU.compute_bleu(
        counts[:max_order],
        counts[4 : 4 + max_order],
        sys_len,
        ref_len,
        smooth_method="exp",
        max_ngram_order=max_order,
    )
    return float(made.score)
