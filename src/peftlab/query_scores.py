"""The metrics of WikiSQL from texts: what a model wrote is read as a query and compared with the data set's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peftlab.errors import NotComputedError
from peftlab.metric import Score
from peftlab.task import Example
from peftlab.text_scores import mean_score, require_references
from peftlab.wikisql_queries import Unparsable, read_query
from peftlab.wikisql_scores import Database, Rule, same_logical_form, same_results

FACTS = ("database", "table", "columns")
"""What `Example.facts` must hold for execution: the database's path, the table's id, its column names as a JSON list."""

DOWNLOAD = (
    "the .db files of WikiSQL (data.tar.bz2 of github.com/salesforce/WikiSQL) belong beside its .jsonl files"
)


def logical_form_score(
    name: str, predictions: Sequence[str], examples: Sequence[Example], *, rule: Rule, seed: int
) -> Score:
    """Share of answers that are one of the data set's queries.

    Args:
        name: The metric's name.
        predictions: The model's answers.
        examples: The examples they answer, their references queries.
        rule: As of `wikisql_scores.same_logical_form`.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; the signature counts the answers that are no query.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: A reference is no query.
    """
    require_references(name, predictions, examples)
    hits, unread = [], 0
    known = [dict(example.facts).get("columns") for example in examples]
    for prediction, example, told in zip(predictions, examples, known, strict=True):
        columns = None if told is None else json.loads(told)
        golds = [_gold(name, example, reference, columns) for reference in example.references]
        query = read_query(prediction, columns)
        unread += isinstance(query, Unparsable)
        hits.append(
            float(
                not isinstance(query, Unparsable)
                and any(same_logical_form(query, gold, rule) for gold in golds)
            )
        )
    by = "name" if None in known else "number"
    signature = f"wikisql|rule:{rule}|columns by {by}|no query:{unread}|refs:any"
    return mean_score(
        name, hits, unit="rate", higher_is_better=True, signature=signature, seed=seed, examples=examples
    )


def execution_score(
    name: str, predictions: Sequence[str], examples: Sequence[Example], *, seed: int
) -> Score:
    """Share of answers that find in the database what the data set's query finds.

    Args:
        name: The metric's name.
        predictions: The model's answers.
        examples: The examples they answer, their references queries and their facts those of `FACTS`.
        seed: Seeds the bootstrap.

    Returns:
        A rate in 0-1 with a 95 % interval over examples; the signature counts the answers that are no query.

    Raises:
        EvaluationError: Counts differ, there is nothing to score, or an example has no reference.
        NotComputedError: The examples tell of no database, or a reference is no query or cannot be executed.
        DataError: A database is missing, damaged or of other tables.
    """
    require_references(name, predictions, examples)
    known = [dict(example.facts) for example in examples]
    lacking = [
        example.id for example, facts in zip(examples, known, strict=True) if not facts.keys() >= set(FACTS)
    ]
    if lacking:
        raise NotComputedError(
            f"{name} needs the database of each question; {len(lacking)} of {len(examples)} examples have none "
            f"(the first is '{lacking[0]}'): {DOWNLOAD}"
        )
    hits, unread = [], 0
    with ExitStack() as stack:
        files = sorted({facts["database"] for facts in known})
        opened = {path: stack.enter_context(Database(Path(path))) for path in files}
        for prediction, example, facts in zip(predictions, examples, known, strict=True):
            columns = json.loads(facts["columns"])
            query = read_query(prediction, columns)
            unread += isinstance(query, Unparsable)
            golds = [_gold(name, example, reference, columns) for reference in example.references]
            database = opened[facts["database"]]
            results = [database.execute(facts["table"], gold) for gold in golds]
            if None in results:
                raise NotComputedError(
                    f"{name}: the data set's own query of example '{example.id}' cannot be executed"
                    f" ({example.references[results.index(None)]}): take the database of the same split, or leave it out"
                )
            found = None if isinstance(query, Unparsable) else database.execute(facts["table"], query)
            hits.append(float(any(same_results(found, result) for result in results)))
    signature = f"wikisql|sqlite|same results in order|no query:{unread}|refs:any"
    return mean_score(
        name, hits, unit="rate", higher_is_better=True, signature=signature, seed=seed, examples=examples
    )


def _gold(name: str, example: Example, reference: str, columns: Sequence[str] | None) -> Mapping[str, Any]:
    """The data set's query."""
    query = read_query(reference, columns)
    if isinstance(query, Unparsable):
        raise NotComputedError(
            f"{name}: the reference of example '{example.id}' is no WikiSQL query ({query.reason}): {reference!r}; "
            "this metric is for the task wikisql"
        )
    return query
