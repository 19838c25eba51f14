"""CodeBLEU's first three parts, their mean: tokens, tokens with keywords weighted, syntax. The fourth is left out.

CodeBLEU's fourth part matches the flow of data, which needs hand-written rules for every language; so this score is not
CodeBLEU and must not be compared with published ones. The parts, each over the whole test set:

- BLEU-4 of the parser's tokens (CodeBLEU splits at white space);
- the recall of n-grams of order 1 to 4 with CodeBLEU's weights, single words that are keywords 5 times the others;
- the share of the references' subtrees, kinds alone, that occur in the answer.

An order without a match counts as 0.1 matches. The tree of wrong code is what tree-sitter could read of it.

Source: Ren et al. 2020 (arXiv:2009.10297), section 3; microsoft/CodeXGLUE, Code-Code/code-to-code-trans/evaluator/CodeBLEU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from peftlab.code_parsing import Code, language_of, read_answer, read_code, subtrees, tokens
from peftlab.metric import Score
from peftlab.ngram_scores import bleu_statistics, ngrams
from peftlab.task import Example
from peftlab.text_scores import corpus_score, require_references

NAME = "code_bleu_no_dataflow"
UNIT = "0-100"
HIGHER_IS_BETTER = True

_KEYWORD, _OTHER = 1.0, 0.2  # CodeBLEU/weighted_ngram_match.py
_EPSILON = 0.1  # nltk's smoothing method 1


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean of token match, keyword-weighted match and syntax match.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, their references code of one language.
        seed: Seeds the bootstrap.

    Returns:
        The score on 0-100 with a 95 % interval over examples; the signature gives the three parts.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The references are code of none of the languages, or tree-sitter or a grammar is not installed.

    Example:
        >>> print(score(["return a + b"], [Example("test-0", "s", ("return a + b",))], seed=42))
        code_bleu_no_dataflow 100.00 (0-100, n=1)
    """
    require_references(NAME, predictions, examples)
    language = language_of(examples)
    rows = np.asarray(
        [
            _statistics(
                read_answer(prediction, language), [read_code(r, language) for r in example.references]
            )
            for prediction, example in zip(predictions, examples, strict=True)
        ]
    )
    parts = dict(zip(("tokens", "keywords", "syntax"), _parts(rows.sum(axis=0)), strict=True))
    signature = "|".join(
        [language, "tree-sitter", *(f"{name}:{100 * value:.2f}" for name, value in parts.items())]
    )
    return corpus_score(
        NAME,
        rows,
        lambda sums: 100 * sum(_parts(sums)) / 3,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )


def _statistics(answer: Code, references: Sequence[Code]) -> list[float]:
    """BLEU's ten numbers, weighted matches and n-grams of order 1 to 4, subtrees matched and all."""
    words = [text for text, _ in tokens(answer)]
    read = [tokens(reference) for reference in references]
    matched, every = [0.0] * 4, [0.0] * 4
    for reference in read:
        keywords = {text for text, is_keyword in reference if is_keyword}
        for order in range(1, 5):
            own = ngrams(words, order)
            for gram, count in ngrams([text for text, _ in reference], order).items():
                weight = 1.0 if order > 1 else _KEYWORD if gram[0] in keywords else _OTHER
                every[order - 1] += weight * count
                matched[order - 1] += weight * min(count, own[gram])
    trees = set(subtrees(answer))
    wanted = [tree for reference in references for tree in subtrees(reference)]
    bleu = bleu_statistics(words, [[text for text, _ in reference] for reference in read])
    return [*bleu, *matched, *every, float(sum(tree in trees for tree in wanted)), float(len(wanted))]


def _parts(sums: np.ndarray) -> tuple[float, float, float]:
    """The three parts in 0-1."""
    size, length, *numbers = sums.tolist()
    penalty = 0.0 if not size else 1.0 if size > length else math.exp(1 - length / size)
    exact = penalty * _geometric_mean(numbers[:4], numbers[4:8])
    weighted = penalty * _geometric_mean(numbers[8:12], numbers[12:16])
    return exact, weighted, numbers[16] / numbers[17] if numbers[17] else 0.0


def _geometric_mean(matched: Sequence[float], every: Sequence[float]) -> float:
    """Mean of the orders' shares; orders longer than any text are left out."""
    shares = [(found or _EPSILON) / number for found, number in zip(matched, every, strict=True) if number]
    if not any(matched) or not shares:
        return 0.0
    return math.exp(sum(math.log(share) for share in shares) / len(shares))
