"""The metrics beside the first seven: what every leaf must do, and each against its library or a value by hand."""

from __future__ import annotations

import doctest
import importlib
import random
import shutil
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import nltk
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.nist_score import corpus_nist
from rouge_score.rouge_scorer import RougeScorer

from peftlab import meteor_jar, ngram_scores, query_scores, rouge_scores, text_scores, word_splitting
from peftlab.catalog import METRICS
from peftlab.errors import EvaluationError, NotComputedError
from peftlab.evaluation import Evaluator
from peftlab.metric import Metric
from peftlab.metrics import edit_distance, macro_f1, meteor, meteor_wordnet
from peftlab.task import Example

TEXTS = [
    "bleu_1", "bleu_2", "bleu_3", "bleu_4", "bleu_codexglue", "bleu_e2e", "chrf", "cider", "edit_distance",
    "exact_match_stripped", "nist", "rouge_1", "rouge_1_stemmed", "rouge_2", "rouge_2_stemmed", "rouge_l_stemmed",
    "rouge_lsum", "rouge_lsum_stemmed", "smoothed_bleu_4",
]  # fmt: skip
CODE = ["ast_similarity", "code_bleu_no_dataflow", "complexity_difference", "syntax_valid"]
QUERIES = ["execution_accuracy", "logical_form", "logical_form_2018"]
JAVA_OR_WORDNET = ["meteor", "meteor_wordnet"]
NEW = [*TEXTS, *CODE, *QUERIES, *JAVA_OR_WORDNET, "macro_f1"]
UNITS = {"cider": "0-10", "nist": "bits", "complexity_difference": "decisions"}
WORDS = [
    "the",
    "The",
    "a",
    "pub",
    "near",
    "river",
    "Aromi",
    "cheap",
    "pubs",
    "food",
    ",",
    "and",
    "family-friendly",
    "£20",
]


def leaf(name: str) -> ModuleType:
    return METRICS.load(name)


def corpus(count: int, *, seed: int = 1, most: int = 4) -> tuple[list[str], list[Example]]:
    """Random texts with a varying number of references."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(5, 14))) + "."

    references = [tuple(text() for _ in range(rng.randint(1, most))) for _ in range(count)]
    predictions = [rng.choice(group) if rng.random() < 0.3 else text() for group in references]
    return predictions, [Example(f"test-{i}", "s", group) for i, group in enumerate(references)]


# -- every leaf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_a_leaf_is_a_metric_under_its_file_name(name: str) -> None:
    module = leaf(name)
    assert isinstance(module, Metric)
    assert name == module.NAME
    assert module.UNIT in ({UNITS[name]} if name in UNITS else {"0-100", "rate"})
    assert METRICS.describe(name).endswith(".")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "module",
    [ngram_scores, query_scores, rouge_scores, text_scores, word_splitting, meteor_jar],
    ids=lambda m: m.__name__,
)
def test_the_examples_in_the_docstrings_run(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", NEW)
def test_unequal_and_empty_lists_are_refused(name: str) -> None:
    example = Example("test-0", "s", ("a b c d",), label=0)
    with pytest.raises(EvaluationError, match="2 predictions for 1 examples"):
        leaf(name).score(["a", "b"], [example], seed=1)
    with pytest.raises(EvaluationError, match="nothing to score"):
        leaf(name).score([], [], seed=1)


@pytest.mark.parametrize("name", [*TEXTS, *CODE, *QUERIES, *JAVA_OR_WORDNET])
def test_an_example_without_references_is_named(name: str) -> None:
    examples = [Example("test-0", "s", ("a b c d",)), Example("test-1", "s")]
    with pytest.raises(EvaluationError, match=r"'test-1' has no reference \(1 of 2"):
        leaf(name).score(["a", "b"], examples, seed=1)


@pytest.mark.parametrize("name", TEXTS)
def test_the_interval_is_seeded_and_holds_the_value(name: str) -> None:
    predictions, examples = corpus(30)
    first, again, other = (leaf(name).score(predictions, examples, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value == other.value
    assert first.interval is not None
    assert first.interval[0] <= first.value <= first.interval[1]
    assert (first.count, bool(first.signature)) == (30, True)
    assert set(first.to_dict()) == {
        "metric", "value", "unit", "higher_is_better", "count", "interval", "signature",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in TEXTS if n != "nist"])
def test_a_perfect_answer_has_the_best_score_and_an_alien_one_the_worst(name: str) -> None:
    _, examples = corpus(10)
    module = leaf(name)
    best, worst = {"0-100": (100, 0), "rate": (1, 0), "0-10": (10, 0)}[module.UNIT]
    if not module.HIGHER_IS_BETTER:
        best, worst = worst, best
    single = [Example(e.id, "s", e.references[:1]) for e in examples]
    assert module.score([e.references[0] for e in single], single, seed=1).value == pytest.approx(best)
    alien = module.score(["zzz qqq xxx www vvv"] * 10, single, seed=1).value
    assert alien == pytest.approx(worst, abs=0.15 if name == "edit_distance" else 2 if "codex" in name else 4)


# -- each against its library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_cumulative_bleu_is_sacrebleus(order: int) -> None:
    predictions, examples = corpus(30)
    longest = max(len(e.references) for e in examples)
    streams = [[(*e.references, *[None] * longest)[k] for e in examples] for k in range(longest)]
    live = sacrebleu.BLEU(lowercase=True, max_ngram_order=order).corpus_score(predictions, streams)
    assert leaf(f"bleu_{order}").score(predictions, examples, seed=1).value == live.score
    assert leaf("bleu_2").score(predictions, examples, seed=1).signature.endswith("|order:2")


def test_chrf_is_sacrebleus() -> None:
    predictions, examples = corpus(30, most=1)
    live = sacrebleu.CHRF()
    expected = live.corpus_score(predictions, [[e.references[0] for e in examples]]).score
    found = leaf("chrf").score(predictions, examples, seed=1)
    assert (found.value, found.signature) == (expected, str(live.get_signature()))


@pytest.mark.parametrize("stemmer", [False, True])
@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_rouge_scores_best_reference(kind: str, stemmer: bool) -> None:
    name = kind.replace("rouge", "rouge_").lower() + ("_stemmed" if stemmer else "")
    predictions, examples = corpus(30)
    predictions = [p.replace("near", "near\n") for p in predictions]
    live: Any = RougeScorer([kind], use_stemmer=stemmer)
    best = [
        max(live.score(r, p)[kind].fmeasure for r in e.references)
        for p, e in zip(predictions, examples, strict=True)
    ]
    assert leaf(name).score(predictions, examples, seed=1).value == pytest.approx(100 * sum(best) / 30)


def test_nist_is_nltks_for_one_reference_each() -> None:
    """With several, nltk chooses one by its own rule, which no published script has."""
    predictions, examples = corpus(30, most=1)
    split = word_splitting.split_like_mteval
    expected = corpus_nist([[split(e.references[0])] for e in examples], [split(p) for p in predictions])
    assert leaf("nist").score(predictions, examples, seed=1).value == pytest.approx(expected, rel=1e-9)


def test_cider_is_pycocoevalcaps() -> None:
    scorer = pytest.importorskip(
        "pycocoevalcap.cider.cider_scorer", reason="pip install --no-deps pycocoevalcap==1.2"
    )
    predictions, examples = corpus(30)

    def join(text: str) -> str:
        return " ".join(word_splitting.split_like_stanford(text))

    live = scorer.CiderScorer()
    for prediction, example in zip(predictions, examples, strict=True):
        live += (join(prediction), [join(r) for r in example.references])
    expected, _ = live.compute_score()
    assert leaf("cider").score(predictions, examples, seed=1).value == pytest.approx(
        float(expected), rel=1e-9
    )


def test_cider_by_hand() -> None:
    """Two examples, one word each of its own: every n-gram has weight log 2, so a cosine is a share of n-grams."""
    examples = [Example("a", "s", ("x y",)), Example("b", "s", ("p q",))]
    found = leaf("cider").score(["x y", "p z"], examples, seed=1)
    # order 1: 1 and 1/2; order 2: 1 and 0; orders 3 and 4: no n-gram; lengths agree
    assert found.value == pytest.approx((10 * (1 + 1) / 4 + 10 * 0.5 / 4) / 2)


@given(st.text(alphabet="abc é", max_size=70), st.text(alphabet="abcd", max_size=70))
@settings(max_examples=60, deadline=None)
def test_the_edit_distance_is_nltks(first: str, second: str) -> None:
    assert edit_distance.distance(first, second) == nltk.edit_distance(first, second)
    assert edit_distance.distance(second, first) == nltk.edit_distance(first, second)


def test_macro_f1_by_hand() -> None:
    labels, answers = [0, 0, 0, 1, 2], ["0", "0", "1", "1", "none"]
    examples = [Example(f"e{i}", "s", label=label) for i, label in enumerate(labels)]
    found = macro_f1.score(answers, examples, seed=1)
    assert found.value == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)
    assert found.signature == "classes:3|no class:1|mean of F1"
    huge = macro_f1.score(["0", "0", "0", "1", "98765432109876"], examples, seed=1)
    assert huge.value == pytest.approx((1 + 1 + 0 + 0) / 4)
    with pytest.raises(EvaluationError, match="has no label"):
        macro_f1.score(["0"], [Example("a", "s")], seed=1)


def test_smoothed_bleu_by_hand() -> None:
    """4 words against 6: precisions 3/4, (2+1)/(3+1), (1+1)/(2+1), (0+1)/(1+1), penalty exp(1 - 7/5)."""
    example = Example("a", "s", ("Returns the sum of a list",))
    value = leaf("smoothed_bleu_4").score(["returns the sum now"], [example], seed=1).value
    assert value == pytest.approx(100 * (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * np.exp(1 - 7 / 5))


# -- what is not there ----------------------------------------------------------------------------------------------


def test_without_java_meteor_is_not_computed_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    predictions, examples = corpus(3)
    with pytest.raises(NotComputedError, match=r"needs Java.*apt-get install default-jre-headless"):
        meteor.score(predictions, examples, seed=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotComputedError, match=r"needs Java and pycocoevalcap"):
        meteor.score(predictions, examples, seed=1)


def test_without_wordnet_its_meteor_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, examples = corpus(3)
    absent = SimpleNamespace(ensure_loaded=lambda: nltk.data.find("corpora/of_nobody"))
    monkeypatch.setattr(nltk.corpus, "wordnet", absent)
    with pytest.raises(NotComputedError, match=r"nltk\.downloader wordnet"):
        meteor_wordnet.score(predictions, examples, seed=1)


def test_meteor_by_nltk_with_a_wordnet_of_no_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def synsets(self, word: str) -> list[Any]:
            return []

    monkeypatch.setattr(meteor_wordnet, "open_wordnet", Empty)
    examples = [Example("a", "s", ("the cheap pub", "a pub"))]
    found = meteor_wordnet.score(["the cheap pubs"], examples, seed=1)
    # all words match (one by stem) in one chunk: F = 1, penalty 0.5 (1/3)^3
    assert found.value == pytest.approx(100 * (1 - 0.5 / 27))


def test_a_metric_for_one_example_that_needs_two_is_not_computed() -> None:
    with pytest.raises(NotComputedError, match="at least 2 examples"):
        leaf("cider").score(["a"], [Example("a", "s", ("a",))], seed=1)


@pytest.mark.parametrize("name", CODE)
def test_without_tree_sitter_code_metrics_are_not_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlab import code_parsing

    code_parsing._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    try:
        with pytest.raises(NotComputedError, match=r"pip install 'peftlab\[metrics\]'"):
            leaf(name).score(["x = 1"], [Example("a", "s", ("x = 1",))], seed=1)
    finally:
        code_parsing._parser.cache_clear()


def evaluator(metrics: tuple[str, ...]) -> Evaluator:
    task = ModuleType("task")
    task.METRICS = metrics  # type: ignore[attr-defined]
    examples = [Example("a", "s", ("a b",)), Example("b", "s", ("c d",))]
    return Evaluator(
        task, examples, None, head="causal", max_length=8, max_new_tokens=1, batch_size=1, seed=1
    )


def test_the_evaluation_goes_on_and_says_what_was_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.commands.printing import _metric_lines
    from peftlab.evaluation import Evaluation

    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = evaluator(("meteor", "chrf", "execution_accuracy"))
    scores = made.score(["a b", "c"])
    assert list(scores) == ["chrf"]
    told = made.describe(Evaluation(scores, ["a b", "c"], 0.0), "file")
    assert set(told["metrics"]) == {"chrf"}
    assert set(told["not_computed"]) == {"meteor", "execution_accuracy"}
    assert "default-jre-headless" in told["not_computed"]["meteor"]
    shown = _metric_lines(told)
    assert any(line.startswith("meteor ") and "not computed: METEOR 1.5 needs" in line for line in shown)
    with pytest.raises(EvaluationError, match="no metric can be computed"):
        evaluator(("meteor",)).score(["a b", "c"])
    assert "not_computed" not in (whole := evaluator(("chrf",))).describe(
        Evaluation(whole.score(["a", "b"]), ["a", "b"], 0.0), "file"
    )
