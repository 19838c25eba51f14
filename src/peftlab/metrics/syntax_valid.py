"""Syntax valid: the share of answers that a parser of their language takes whole.

The language (Python, Java or JavaScript) is the one that most references are valid in. Valid is what tree-sitter's
parser reads without a fault, and for Python Python's own parser too; nothing is run, so this is no pass rate of tests.
A fence around the code (```) is taken off. An empty answer is not valid.

Source: tree-sitter with tree_sitter_python, tree_sitter_java and tree_sitter_javascript.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.code_parsing import language_of, read_answer, read_code
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "syntax_valid"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Share of answers that are valid code.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, their references code of one language.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; the signature names the language and how many references are
        valid themselves.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The references are code of none of the languages, or tree-sitter or a grammar is not installed.

    Example:
        >>> score(["return a b"], [Example("test-0", "s", ("return a + b",))], seed=42).value
        0.0
    """
    require_references(NAME, predictions, examples)
    language = language_of(examples)
    hits = [float(read_answer(prediction, language).is_valid) for prediction in predictions]
    references = [reference for example in examples for reference in example.references]
    valid = sum(read_code(reference, language).is_valid for reference in references)
    signature = f"{language}|tree-sitter|references valid:{valid}/{len(references)}"
    return mean_score(
        NAME,
        hits,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
