r"""AST similarity: what the syntax trees of answer and best reference are made of, compared; mean over examples.

$2 |A \cap B| / (|A| + |B|)$ over the trees' shapes, a shape being a node's kind with its children's kinds; names, values
and comments do not count, and neither does where in the tree a shape stands. The trees are tree-sitter's, which has one
for wrong code too: such an answer is compared as far as it was read, and the signature counts it.

Source: Dice 1945 for the coefficient; Baxter et al. 1998 for its use on syntax trees.
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.code_parsing import language_of, read_answer, read_code, shapes
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references

NAME = "ast_similarity"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Mean similarity of syntax trees.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, their references code of one language.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; the signature names the language and counts the answers that
        are not valid.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The references are code of none of the languages, or tree-sitter or a grammar is not installed.

    Example:
        >>> score(["return x + y"], [Example("test-0", "s", ("return a + b",))], seed=42).value
        1.0
    """
    require_references(NAME, predictions, examples)
    language = language_of(examples)
    values, invalid = [], 0
    for prediction, example in zip(predictions, examples, strict=True):
        answer = read_answer(prediction, language)
        invalid += not answer.is_valid
        own = shapes(answer)
        others = [shapes(read_code(reference, language)) for reference in example.references]
        values.append(max(2 * (own & o).total() / max(1, own.total() + o.total()) for o in others))
    signature = f"{language}|tree-sitter|dice of shapes|refs:max|not valid:{invalid}|mean"
    return mean_score(
        NAME,
        values,
        unit=UNIT,
        higher_is_better=HIGHER_IS_BETTER,
        signature=signature,
        seed=seed,
        examples=examples,
    )
