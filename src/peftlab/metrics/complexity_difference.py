"""Complexity difference: how far an answer's cyclomatic complexity is from its nearest reference's, mean over examples.

McCabe's number counts the decisions in code (`peftlab.code_parsing.complexity`). By itself it says nothing about quality,
an empty answer has the least; so it is compared with the references', and the signature gives the mean of both.

Source: McCabe 1976.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.code_parsing import complexity, language_of, read_answer, read_code
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "complexity_difference"
UNIT = "decisions"
HIGHER_IS_BETTER = False


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean absolute difference of cyclomatic complexity.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, their references code of one language.
        seed: Seeds the bootstrap.

    Returns:
        The difference in decisions, smaller is better, with a 95 % interval over examples; the signature names the
        language, the mean complexity of answers and of references, and how many answers are not valid code.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The references are code of none of the languages, or tree-sitter or a grammar is not installed.

    Example:
        >>> examples = [Example("test-0", "s", ("return a if b else c",))]
        >>> score(["return a"], examples, seed=42).value
        1.0
    """
    require_references(NAME, predictions, examples)
    language = language_of(examples)
    answers = [read_answer(prediction, language) for prediction in predictions]
    made = [complexity(answer) for answer in answers]
    wanted = [[complexity(read_code(r, language)) for r in example.references] for example in examples]
    values = [float(min(abs(own - w) for w in group)) for own, group in zip(made, wanted, strict=True)]
    every = [number for group in wanted for number in group]
    signature = (
        f"{language}|mccabe|answers:{sum(made) / len(made):.2f}|references:{sum(every) / len(every):.2f}"
        f"|not valid:{sum(not answer.is_valid for answer in answers)}|refs:min|mean"
    )
    return mean_score(
        NAME,
        values,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
