"""Execution accuracy: the share of answers whose WikiSQL query finds in the database what the data set's query finds.

Two queries may differ and find the same. It needs the `.db` file of the split; without one it is not computed. What
cannot be read as a query, or not be executed, is wrong. Results are compared in the database's order, values exactly.

Source: github.com/salesforce/WikiSQL, evaluate.py and lib/dbengine.py; Zhong, Xiong and Socher 2017 (arXiv:1709.00103).
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.query_scores import execution_score
from peftlab.task import Example

NAME = "execution_accuracy"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    """Execution accuracy in the examples' own databases.

    Args:
        predictions: The model's answers.
        examples: The examples they answer; `Example.facts` holds "database", "table" and "columns"
            (`query_scores.FACTS`).
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The examples tell of no database, or a reference is no query or cannot be executed.
        DataError: A database is missing, damaged or of other tables.
    """
    return execution_score(NAME, predictions, examples, seed=seed)
