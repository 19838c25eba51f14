"""The scores of n-grams that no kept library computes as the published scripts do: NIST, CIDEr, the challenges' BLEUs.

Each function counts per example, so that an interval can resample the counts. All work on words; how these were split is
the caller's (`word_splitting`).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
_Vector = tuple[dict[tuple[str, ...], float], list[float], int]

NIST_ORDER = 5
CIDER_ORDER = 4
CIDER_SIGMA = 6.0
_NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2  # two thirds of the references' length cost half the score
_TINY, _SMALL = 1e-15, 1e-9  # stand for no match and no n-gram in the E2E challenge's script


def ngrams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram of one order occurs.

    Args:
        words: A text's words.
        order: n.

    Returns:
        Counts by n-gram.

    Example:
        >>> ngrams("a b a b".split(), 2)[("a", "b")]
        2
    """
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_statistics(prediction: Words, references: Sequence[Words], *, length: str = "closest") -> list[int]:
    """What BLEU needs to know of one example.

    Args:
        prediction: The answer's words.
        references: The accepted answers' words, at least one.
        length: "closest" (ties: the shorter) or "shortest": the reference length that the brevity penalty reads.

    Returns:
        Length, reference length, matched n-grams of order 1-4, all n-grams of order 1-4; 10 numbers.

    Example:
        >>> bleu_statistics("a b".split(), ["a c d".split(), "c b".split()])
        [2, 2, 2, 0, 0, 0, 2, 1, 0, 0]
    """
    size = len(prediction)
    lengths = [len(reference) for reference in references]
    chosen = min(lengths) if length == "shortest" else min(lengths, key=lambda n: (abs(n - size), n))
    matched = []
    for order in range(1, 5):
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            allowed |= ngrams(reference, order)
        matched.append((ngrams(prediction, order) & allowed).total())
    return [size, chosen, *matched, *(max(0, size - order + 1) for order in range(1, 5))]


def challenge_bleu(statistics: np.ndarray, *, smoothing: float = 0.0) -> float:
    """BLEU as the E2E challenge's script computes it: an order without a match is 1e-15, not smoothed away.

    Args:
        statistics: As of `bleu_statistics`, summed over examples, shape (10,).
        smoothing: Added to matches and n-grams of every order; 1 gives the script's sentence BLEU.

    Returns:
        The score in 0-1.

    Source: tuetschek/e2e-metrics, metrics/pymteval.py, `BLEUScore`.
    """
    size, reference, *counts = statistics.tolist()
    penalty = math.exp(1 - reference / (size or 1e-5)) if size <= reference else 1.0
    logs = [
        math.log(max(matched + smoothing, _TINY) / max(every + smoothing, _SMALL))
        for matched, every in zip(counts[:4], counts[4:], strict=True)
    ]
    return penalty * math.exp(sum(logs) / 4)


def added_bleu(statistics: np.ndarray) -> float:
    """BLEU with one added to matches and n-grams of every order, as CodeXGLUE's translation scorer has it.

    Args:
        statistics: As of `bleu_statistics` with length "shortest", summed over examples, shape (10,).

    Returns:
        The score in 0-1.

    Source: Lin and Och 2004; microsoft/CodeXGLUE, Code-Code/code-to-code-trans/evaluator/bleu.py, `compute_bleu`.
    """
    size, reference, *counts = statistics.tolist()
    if not size:
        return 0.0
    logs = [math.log((m + 1) / (n + 1)) for m, n in zip(counts[:4], counts[4:], strict=True)]
    penalty = 1.0 if size > reference else math.exp(1 - reference / size)
    return penalty * math.exp(sum(logs) / 4)


def sentence_bleu(statistics: Sequence[int]) -> float:
    """BLEU of one sentence, one added to orders 2-4 and to both lengths, as CodeXGLUE scores summaries of code.

    Args:
        statistics: As of `bleu_statistics` with length "shortest".

    Returns:
        The score in 0-1.

    Source: microsoft/CodeXGLUE, Code-Text/code-to-text/evaluator/evaluator.py, `score_cooked`; Lin and Och 2004.
    """
    size, reference, *counts = statistics
    least = sys.float_info.min
    logs = [
        math.log(matched + (order > 0) + least) - math.log(every + (order > 0) + least)
        for order, (matched, every) in enumerate(zip(counts[:4], counts[4:], strict=True))
    ]
    return math.exp(sum(logs) / 4 + min(0.0, 1 - (reference + 1) / (size + 1)))


class NistReferences:
    r"""The references of a test set as NIST reads them: rare n-grams carry more information.

    $Info(w_1 ... w_n) = \log_2 (count(w_1 ... w_{n-1}) / count(w_1 ... w_n))$ over all references.

    Args:
        references: The accepted answers' words per example.

    Source: Doddington 2002; mteval-v13a as ported in tuetschek/e2e-metrics, metrics/pymteval.py, `NISTScore`.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        seen: Counter[tuple[str, ...]] = Counter()
        self._allowed: list[Counter[tuple[str, ...]]] = []
        for group in references:
            allowed: Counter[tuple[str, ...]] = Counter()
            for reference in group:
                counts: Counter[tuple[str, ...]] = Counter()
                for order in range(1, NIST_ORDER + 1):
                    counts.update(ngrams(reference, order))
                seen.update(counts)
                seen[()] += len(reference)
                allowed |= counts
            self._allowed.append(allowed)
        self._information = {
            gram: math.log2(seen[gram[:-1]] / number) for gram, number in seen.items() if gram
        }
        self._lengths = [sum(map(len, group)) / len(group) for group in references]

    def statistics(self, predictions: Sequence[Words]) -> np.ndarray:
        """What NIST needs to know of each example.

        Args:
            predictions: The answers' words, in the order of the references.

        Returns:
            Information matched in order 1-5, n-grams of order 1-5, mean reference length; shape (batch, 11).
        """
        rows = []
        for words, allowed, length in zip(predictions, self._allowed, self._lengths, strict=True):
            matched = [ngrams(words, order) & allowed for order in range(1, NIST_ORDER + 1)]
            information = [sum(n * self._information[gram] for gram, n in one.items()) for one in matched]
            every = [max(0, len(words) - order) for order in range(NIST_ORDER)]
            rows.append([*information, *every, length])
        return np.asarray(rows, dtype=np.float64)


def nist_from_statistics(statistics: np.ndarray) -> float:
    """NIST of summed statistics.

    Args:
        statistics: As of `NistReferences.statistics`, summed over examples, shape (11,).

    Returns:
        The score in bits; 0 where there is no word.
    """
    information, every, length = statistics[:NIST_ORDER], statistics[NIST_ORDER:-1], float(statistics[-1])
    if not every[0] or not length:
        return 0.0
    ratio = min(1.0, float(every[0]) / length)
    gained = float((information[every > 0] / every[every > 0]).sum())
    return gained * math.exp(-_NIST_BETA * math.log(ratio) ** 2)


class CiderReferences:
    """The references of a test set as CIDEr reads them: n-grams weigh more the fewer examples use them.

    The clipped form with a penalty on length (CIDEr-D), as the script computes it: the penalty reads the numbers of
    pairs of words, and a value is 10 times the mean over references and orders.

    Args:
        references: The accepted answers' words per example.

    Source: Vedantam et al. 2015, sections 4 and 5; pycocoevalcap/cider/cider_scorer.py, as the E2E challenge uses it.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        groups = [[_term_counts(one) for one in group] for group in references]
        used: Counter[tuple[str, ...]] = Counter()
        for counted in groups:
            used.update({gram for one in counted for gram in one})
        self._unseen = math.log(len(groups))
        self._rarity = {gram: self._unseen - math.log(number) for gram, number in used.items()}
        self._vectors = [[self._weighted(one) for one in counted] for counted in groups]

    def values(self, predictions: Sequence[Words]) -> list[float]:
        """CIDEr of each example.

        Args:
            predictions: The answers' words, in the order of the references.

        Returns:
            One value in 0-10 per example.
        """
        values = []
        for words, vectors in zip(predictions, self._vectors, strict=True):
            own = self._weighted(_term_counts(words))
            values.append(10 * sum(_likeness(own, vector) for vector in vectors) / len(vectors))
        return values

    def _weighted(self, counts: Counter[tuple[str, ...]]) -> _Vector:
        """Weights by n-gram, their norm per order, and the number of pairs of words."""
        weights = {gram: count * self._rarity.get(gram, self._unseen) for gram, count in counts.items()}
        squares = [0.0] * CIDER_ORDER
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        pairs = sum(count for gram, count in counts.items() if len(gram) == 2)
        return weights, [math.sqrt(square) for square in squares], pairs


def _term_counts(words: Words) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for order in range(1, CIDER_ORDER + 1):
        counts.update(ngrams(words, order))
    return counts


def _likeness(own: _Vector, other: _Vector) -> float:
    """Clipped cosine, the mean over orders, less where the lengths differ."""
    products = [0.0] * CIDER_ORDER
    for gram, weight in own[0].items():
        theirs = other[0].get(gram, 0.0)
        products[len(gram) - 1] += min(weight, theirs) * theirs
    shares = [p / (a * b) if a and b else p for p, a, b in zip(products, own[1], other[1], strict=True)]
    return sum(shares) / CIDER_ORDER * math.exp(-((own[2] - other[2]) ** 2) / (2 * CIDER_SIGMA**2))
