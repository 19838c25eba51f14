"""Each metric against hand-computed values and against the library it stands on."""

from __future__ import annotations

import doctest
import importlib
import random
import subprocess
import sys
import time
from types import ModuleType

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import _score_lcs

from peftlab import text_scores
from peftlab.catalog import METRICS
from peftlab.errors import EvaluationError, NotComputedError
from peftlab.metric import Metric, bootstrap_interval
from peftlab.metrics import accuracy, bleu, bleu_cased, exact_match, rouge_l, rouge_l_e2e, value_coverage
from peftlab.task import Example

WITH_REFERENCES = [bleu, bleu_cased, rouge_l, rouge_l_e2e, exact_match]
ALL = [*WITH_REFERENCES, value_coverage, accuracy]
WORDS = [
    "the",
    "The",
    "a",
    "pub",
    "near",
    "river",
    "Aromi",
    "cheap",
    "food",
    ",",
    "and",
    "family-friendly",
    "£20",
]


def name_of(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[-1]


def corpus(count: int, *, seed: int = 1, max_references: int = 4) -> tuple[list[str], list[Example]]:
    """Random texts with a varying number of references."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, 14))) + "."

    references = [tuple(text() for _ in range(rng.randint(1, max_references))) for _ in range(count)]
    predictions = [rng.choice(r) if rng.random() < 0.3 else text() for r in references]
    return predictions, [Example(f"test-{i}", "s", r) for i, r in enumerate(references)]


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_a_leaf_is_a_metric_under_its_file_name(module: ModuleType) -> None:
    assert isinstance(module, Metric)
    assert name_of(module) == module.NAME
    assert module.NAME in METRICS.names()
    assert module.UNIT in ("0-100", "rate")
    assert METRICS.describe(module.NAME).endswith(".")


@pytest.mark.parametrize("module", [*ALL, text_scores], ids=name_of)
def test_the_examples_in_the_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_unequal_and_empty_lists_are_refused(module: ModuleType) -> None:
    example = Example("test-0", "s", ("a b c d",), values=("a",), label=0)
    with pytest.raises(EvaluationError, match="2 predictions for 1 examples"):
        module.score(["a", "b"], [example], seed=1)
    with pytest.raises(EvaluationError, match="nothing to score"):
        module.score([], [], seed=1)


@pytest.mark.parametrize("module", WITH_REFERENCES, ids=name_of)
def test_an_example_without_references_is_named(module: ModuleType) -> None:
    examples = [Example("test-0", "s", ("a b c d",)), Example("test-1", "s")]
    with pytest.raises(EvaluationError, match=r"'test-1' has no reference \(1 of 2"):
        module.score(["a", "b"], examples, seed=1)


@pytest.mark.parametrize("module", ALL, ids=name_of)
def test_the_interval_is_seeded_and_holds_the_value(module: ModuleType) -> None:
    predictions, examples = corpus(40)
    if module is accuracy:
        examples = [Example(e.id, "s", label=i % 3) for i, e in enumerate(examples)]
        predictions = [str(i % 2) for i in range(40)]
    elif module is value_coverage:
        examples = [Example(e.id, "s", values=("Aromi", "pub")) for e in examples]
    first, again, other = (module.score(predictions, examples, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    if module.UNIT == "0-100":  # rates of 40 examples lie on a coarse grid
        assert first.interval != other.interval
    assert first.interval is not None
    assert first.interval[0] <= first.value <= first.interval[1]
    assert first.count == 40
    assert first.signature


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_bleu_equals_sacrebleu_with_any_number_of_references(seed: int, lowercase: bool) -> None:
    predictions, examples = corpus(30, seed=seed)
    longest = max(len(e.references) for e in examples)
    streams = [[(*e.references, *[None] * longest)[k] for e in examples] for k in range(longest)]
    reference = sacrebleu.BLEU(lowercase=lowercase)
    expected = reference.corpus_score(predictions, streams).score
    score = (bleu if lowercase else bleu_cased).score(predictions, examples, seed=1)
    assert score.value == expected
    assert score.value == sacrebleu.corpus_bleu(predictions, streams, lowercase=lowercase).score
    assert score.signature == str(reference.get_signature())
    assert "nrefs:var" in score.signature


def test_bleu_with_one_reference_each_has_sacrebleus_signature() -> None:
    predictions, examples = corpus(10, max_references=1)
    assert bleu.score(predictions, examples, seed=1).signature.startswith(
        "nrefs:1|case:lc|eff:no|tok:13a|smooth:exp"
    )


def test_an_empty_string_would_be_a_reference_to_sacrebleu_and_none_is_not() -> None:
    """Why missing references are never written as ""."""
    prediction, reference = ["a pub near the"], "a pub near the old river and the new bridge"
    right = sacrebleu.corpus_bleu(prediction, [[reference], [None]]).score
    wrong = sacrebleu.corpus_bleu(prediction, [[reference], [""]]).score
    assert right != wrong
    assert bleu.score(prediction, [Example("x", "s", (reference,))], seed=1).value == right


def test_bleus_interval_is_the_bootstrap_of_sacrebleus_own_corpus_scores() -> None:
    predictions, examples = corpus(12, max_references=1)

    def slowly(chosen: np.ndarray) -> float:
        lines = [predictions[i] for i in chosen], [[examples[i].references[0] for i in chosen]]
        return float(sacrebleu.corpus_bleu(*lines, lowercase=True).score)

    expected = bootstrap_interval(12, slowly, seed=3)
    assert bleu.score(predictions, examples, seed=3).interval == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_of_bleu_is_fast() -> None:
    statistics = np.random.default_rng(1).integers(1, 30, size=(630, 10))
    start = time.perf_counter()
    bootstrap_interval(630, lambda c: text_scores.bleu_from_statistics(statistics[c].sum(axis=0)), seed=1)
    assert time.perf_counter() - start < 1.0  # 0.1 s on an idle core


def test_bleu_ignores_case_and_bleu_cased_does_not() -> None:
    examples = [Example("x", "s", ("The Aromi is a Thai pub.",))]
    assert bleu.score(["the aromi is a thai pub."], examples, seed=1).value == pytest.approx(100)
    assert bleu_cased.score(["the aromi is a thai pub."], examples, seed=1).value < 50


def test_rouge_l_takes_the_best_reference_and_the_mean() -> None:
    examples = [Example("a", "s", ("x y z w", "a b c")), Example("b", "s", ("p q",))]
    score = rouge_l.score(["a b d", "r"], examples, seed=1)
    assert score.value == pytest.approx(100 * (2 / 3 + 0) / 2)


def test_rouge_l_does_not_stem() -> None:
    assert rouge_l.score(["restaurants"], [Example("a", "s", ("restaurant",))], seed=1).value == 0


def test_rouge_l_refuses_a_script_that_it_cannot_read() -> None:
    with pytest.raises(NotComputedError, match=r"the first is 'test-0'.*bleu and chrf read every language"):
        rouge_l.score(["レストラン"], [Example("test-0", "s", ("レストラン",))], seed=1)


def test_rouge_l_e2e_takes_precision_and_recall_from_different_references() -> None:
    # precision 3/3 from the long reference, recall 1/1 from the short one
    assert rouge_l_e2e.segment_score("a cheap pub", ["a very cheap old pub", "pub"]) == pytest.approx(1.0)
    assert rouge_l_e2e.segment_score("", ["pub"]) == 0


def test_rouge_l_e2e_refuses_references_without_words() -> None:
    with pytest.raises(EvaluationError, match="'test-0' has a word"):
        rouge_l_e2e.score(["a"], [Example("test-0", "s", ("...",))], seed=1)


def test_the_bit_parallel_lcs_equals_the_table_of_rouge_score() -> None:
    rng = random.Random(1)
    for _ in range(300):
        first, second = (rng.choices("abcde", k=rng.randint(1, 70)) for _ in range(2))
        expected = round(_score_lcs(first, second).precision * len(second))
        assert rouge_l_e2e.lcs_length(first, second) == expected


def test_value_coverage_counts_values_not_examples() -> None:
    examples = [
        Example("a", "s", values=("Aromi", "Café Rouge", "riverside")),
        Example("b", "s"),
        Example("c", "s", values=("Zizzi",)),
    ]
    score = value_coverage.score(["Aromi near cafe rouge", "anything", "Zizzi"], examples, seed=1)
    assert score.value == 2 / 4
    assert score.count == 2
    with pytest.raises(EvaluationError, match="none of the 1 examples has values"):
        value_coverage.score(["a"], [Example("a", "s")], seed=1)


@pytest.mark.parametrize(
    ("prediction", "value"),
    [("SELECT  a\n", 1), ("\tSELECT b", 1), ("select a", 0), ("SELECT a.", 0), ("", 0)],
)
def test_exact_match(prediction: str, value: float) -> None:
    assert (
        exact_match.score([prediction], [Example("a", "s", ("SELECT a", " SELECT b"))], seed=1).value == value
    )


def test_accuracy_compares_strings() -> None:
    examples = [Example(str(i), "s", label=1) for i in range(4)]
    assert accuracy.score(["1", "1 ", "01", "0"], examples, seed=1).value == 0.25
    with pytest.raises(EvaluationError, match="'x' has no label"):
        accuracy.score(["1", "1"], [examples[0], Example("x", "s")], seed=1)


def test_one_example_has_no_interval() -> None:
    assert bleu.score(["a b c d"], [Example("a", "s", ("a b c d",))], seed=1).interval is None


def test_metrics_and_tasks_do_not_load_torch() -> None:
    names = [f"peftlab.metrics.{name_of(m)}" for m in ALL] + ["peftlab.tasks.e2e_nlg", "peftlab.tasks.rows"]
    code = f"import sys, {', '.join(names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(importlib.util.find_spec(n) for n in names)
