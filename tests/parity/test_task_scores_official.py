"""WikiSQL's logical form, ROUGE of SAMSum's first three turns and MultiNLI's accuracy, against published scores."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.metrics import accuracy, chrf, logical_form, logical_form_2018, macro_f1
from peftlab.rouge_scores import rouge_values
from peftlab.task import Example
from peftlab.wikisql_queries import numbered_columns, write_query
from peftlab.wikisql_scores import same_logical_form

README = 0.35375846099038116  # the official repository's own lf_accuracy of its example


def rows(path: Path) -> list[Any]:
    raw = path.read_bytes()
    text = (bz2.decompress(raw) if path.suffix == ".bz2" else raw).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def wikisql(shared_data: Path) -> Path:
    return shared_data / "metrics/wikisql_logical_form"


@pytest.fixture(scope="module")
def golds(wikisql: Path) -> list[Any]:
    return [row["sql"] for row in rows(wikisql / "dev.jsonl.bz2")]


@pytest.fixture(scope="module")
def example_queries(wikisql: Path) -> list[Any]:
    """The official example's queries, None where it could not make one."""
    found = rows(wikisql / "example.pred.dev.jsonl.bz2")
    return [None if row["error"] else row["query"] for row in found]


def share(queries: list[Any], golds: list[Any], rule: Any) -> float:
    pairs = zip(queries, golds, strict=True)
    return sum(q is not None and same_logical_form(q, g, rule) for q, g in pairs) / len(golds)


def test_the_official_examples_logical_form_under_each_rule(
    wikisql: Path, golds: list[Any], example_queries: list[Any]
) -> None:
    published = json.loads((wikisql / "published_scores.json").read_text())
    assert published["readme_lf_accuracy"] == README
    assert share(example_queries, golds, "2018") == README
    assert share(example_queries, golds, "today") == 0.45208407552547203
    assert share(example_queries, golds, "ordered") == 0.44115900724379525


def test_sqlovas_logical_form(wikisql: Path, golds: list[Any]) -> None:
    queries = [row["query"] for row in rows(wikisql / "sqlova.results_dev.jsonl.bz2")]
    expected = json.loads((wikisql / "sqlova_score.json").read_text())["lf_accuracy_unordered"]
    assert share(queries, golds, "today") == expected == pytest.approx(0.7708, abs=5e-5)


def test_the_leaves_read_both_sides_from_text_and_give_the_same(
    golds: list[Any], example_queries: list[Any]
) -> None:
    columns = numbered_columns(60)
    part = slice(0, 1500)
    kept = [(q, g) for q, g in zip(example_queries[part], golds[part], strict=True)]
    examples = [Example(str(i), "s", (write_query(g, columns),)) for i, (_, g) in enumerate(kept)]
    predictions = ["no query" if q is None else write_query(q, columns) for q, _ in kept]
    for module, rule in ((logical_form, "today"), (logical_form_2018, "2018")):
        found = module.score(predictions, examples, seed=1)
        assert found.value == pytest.approx(
            share([q for q, _ in kept], [g for _, g in kept], rule), abs=1e-12
        )
        assert f"no query:{sum(q is None for q, _ in kept)}|" in found.signature


@pytest.mark.parametrize("stemmer", [False, True])
@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_of_every_row_of_samsum(kind: str, stemmer: bool, shared_data: Path) -> None:
    folder = shared_data / "metrics/samsum_lead3"
    name = "per_row_stemmer.jsonl" if stemmer else "per_row_no_stemmer.jsonl"
    predictions, references = (
        (folder / file).read_text(encoding="utf-8").split("\n")[:300] for file in ("pred.txt", "ref.txt")
    )
    values = rouge_values(kind, predictions, [[reference] for reference in references], stemmer=stemmer)
    expected = [row[kind] for row in rows(folder / name)]
    assert values == pytest.approx(expected, abs=5e-9)
    stored = json.loads((folder / "reference_scores.json").read_text())
    mean = stored["stemmer" if stemmer else "no_stemmer"][kind]["fmeasure"]
    assert sum(values) / 300 == pytest.approx(mean, abs=1e-12)


def test_chrf_of_samsum(shared_data: Path) -> None:
    folder = shared_data / "metrics/samsum_lead3"
    predictions, references = (
        (folder / file).read_text(encoding="utf-8").split("\n")[:300] for file in ("pred.txt", "ref.txt")
    )
    examples = [Example(str(i), "s", (reference,)) for i, reference in enumerate(references)]
    stored = json.loads((folder / "reference_scores.json").read_text())["sacrebleu"]["chrf2"]
    assert chrf.score(predictions, examples, seed=1).value == pytest.approx(stored, abs=1e-9)


def test_multi_nlis_accuracy_from_the_logits(shared_data: Path) -> None:
    folder = shared_data / "metrics/mnli_logits"
    found = rows(folder / "MNLI_dev_roberta-base_0.1500.jsonl")
    predictions = [str(max(range(3), key=row["logits"].__getitem__)) for row in found]
    examples = [Example(row["uid"], "s", label=row["true"]) for row in found]
    expected = json.loads((folder / "scores.json").read_text())["accuracy"]
    made = accuracy.score(predictions, examples, seed=1)
    assert (made.value, made.count) == (expected, 1500)
    assert made.interval is not None
    assert made.interval[0] < expected < made.interval[1]
    assert macro_f1.score(predictions, examples, seed=1).value == pytest.approx(expected, abs=0.02)
