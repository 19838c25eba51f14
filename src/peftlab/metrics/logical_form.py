"""Logical form: the share of answers that are the data set's WikiSQL query, part by part, in any order of conditions.

The rule of today's official evaluator: column, aggregation and the set of conditions must agree; values are compared as
lower-cased text. The June 2018 rule behind many published numbers is stricter: `logical_form_2018`.

Answers are read leniently (`wikisql_queries.read_query`); what cannot be read as a query is wrong, and the signature
counts it. Columns are compared by name.

Source: github.com/salesforce/WikiSQL, evaluate.py and lib/query.py; Zhong, Xiong and Socher 2017 (arXiv:1709.00103).
"""

from __future__ import annotations

from collections.abc import Sequence

from peftlab.metric import Score
from peftlab.query_scores import logical_form_score
from peftlab.task import Example

NAME = "logical_form"
UNIT = "rate"
HIGHER_IS_BETTER = True


def score(predictions: Sequence[str], examples: Sequence[Example], *, seed: int) -> Score:
    r"""Logical form accuracy by today's rule.

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
        >>> score(["select player from t where team = 'leeds' and no. = 42"], [asked], seed=42).value
        1.0
    """
    return logical_form_score(NAME, predictions, examples, rule="today", seed=seed)
