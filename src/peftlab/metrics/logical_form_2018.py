"""Logical form by the rule of June 2018: conditions in their order, and a number is not its text.

The rule behind the official README's 0.3538 and the numbers published at that time: column, aggregation and the list of
conditions must agree; strings are compared in lower case, numbers as numbers, so that 5 is not '5'. Today's evaluator is
milder: `logical_form`.

Answers are read leniently (`wikisql_queries.read_query`); what cannot be read as a query is wrong, and the signature
counts it. Columns are compared by name.

Source: github.com/salesforce/WikiSQL, evaluate.py and lib/query.py; Zhong, Xiong and Socher 2017 (arXiv:1709.00103).
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.query_scores import logical_form_score
from peftlab.task import Example

NAME = "logical_form_2018"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    r"""Logical form accuracy by the rule of June 2018.

    Args:
        predictions: The model's answers.
        examples: The examples they answer, their references queries as `wikisql_queries.write_query` writes them.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, an example has no reference, or one that is no query.

    Example:
        >>> gold = "SELECT \"Player\" FROM table WHERE \"No.\" = '42' AND \"Team\" = 'Leeds'"
        >>> asked = Example("test-0", "s", (gold,))
        >>> score(["select player from t where no. = '42' and team = 'leeds'"], [asked], seed=42).value
        1.0
        >>> score(["select player from t where no. = 42 and team = 'leeds'"], [asked], seed=42).value
        0.0
    """
    return logical_form_score(NAME, predictions, examples, rule="2018", seed=seed)
