"""BLEU against the official E2E scorer and sacrebleu on 15 system outputs, ROUGE-L against rouge_score.

The official scores are those of tuetschek/e2e-metrics, given to four places of 0-1: 0.005 on 0-100 is all the rounding
there is, and all the difference that is allowed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from peftlab.metrics import bleu, bleu_cased, rouge_l, value_coverage
from peftlab.task import Example
from peftlab.tasks import e2e_nlg
from peftlab.text_scores import bleu_from_statistics, sentence_statistics

OUTPUTS = [f"tgen-{system}.run{run}" for system in ("minus", "std", "plus") for run in range(5)]
ROUNDING = 0.005 + 1e-9


@pytest.fixture(scope="module")
def examples(shared_data: Path) -> tuple[Example, ...]:
    return tuple(e2e_nlg.load(shared_data / "e2e", seed=1).test)


@pytest.fixture(scope="module")
def official(shared_data: Path) -> Any:
    return json.loads((shared_data / "metrics/e2e_tgen/official_scores.json").read_text())["scores"]


def output(shared_data: Path, name: str) -> list[str]:
    return (shared_data / f"metrics/e2e_tgen/outputs/{name}.txt").read_text(encoding="utf-8").splitlines()


def perturbed(predictions: list[str]) -> list[str]:
    """One word in a hundred changed."""
    rng = random.Random(1)
    return [" ".join("perturbed" if rng.random() < 0.01 else w for w in p.split()) for p in predictions]


def value_of(predictions: list[str], examples: tuple[Example, ...], *, lowercase: bool = True) -> float:
    """The point value alone, without the interval's thousand resamples."""
    return bleu_from_statistics(sentence_statistics(predictions, examples, lowercase=lowercase).sum(axis=0))


@pytest.mark.parametrize("name", OUTPUTS)
def test_bleu_is_the_official_score(
    name: str, shared_data: Path, examples: tuple[Example, ...], official: Any
) -> None:
    expected = 100 * official[f"{name}.txt"]["BLEU"]
    score = bleu.score(output(shared_data, name), examples, seed=1)
    assert score.count == 630
    assert abs(score.value - expected) <= ROUNDING
    assert score.interval is not None
    assert score.interval[0] < expected < score.interval[1]
    assert abs(1.01 * score.value - expected) > 100 * ROUNDING


def test_one_changed_word_in_a_hundred_is_seen(
    shared_data: Path, examples: tuple[Example, ...], official: Any
) -> None:
    for name in ("tgen-minus.run0", "tgen-std.run0", "tgen-plus.run0"):
        value = value_of(perturbed(output(shared_data, name)), examples)
        assert abs(value - 100 * official[f"{name}.txt"]["BLEU"]) > 50 * ROUNDING


@pytest.mark.parametrize("system", ["minus", "std", "plus"])
def test_bleu_is_sacrebleus_stored_score(
    system: str, shared_data: Path, examples: tuple[Example, ...], official: Any
) -> None:
    """And the official score ignores case, which is why `bleu` does: cased BLEU is four points lower."""
    stored = json.loads((shared_data / "metrics/e2e_tgen/sacrebleu_run0.json").read_text())[system]
    predictions = output(shared_data, f"tgen-{system}.run0")
    cased = bleu_cased.score(predictions, examples, seed=1).value
    assert value_of(predictions, examples) == stored["bleu_lc"]
    assert cased == stored["bleu"]
    assert 1.01 * cased != pytest.approx(stored["bleu"], abs=0.1)
    assert 3 < 100 * official[f"tgen-{system}.run0.txt"]["BLEU"] - cased < 5


@pytest.mark.parametrize("module", [bleu, bleu_cased], ids=lambda m: m.NAME)
def test_bleu_is_sacrebleu_run_now(
    module: ModuleType, shared_data: Path, examples: tuple[Example, ...]
) -> None:
    predictions = output(shared_data, "tgen-std.run0")
    longest = max(len(e.references) for e in examples)
    streams = [[(*e.references, *[None] * longest)[k] for e in examples] for k in range(longest)]
    live = sacrebleu.BLEU(lowercase=module is bleu)
    expected = live.corpus_score(predictions, streams).score
    found = module.score(predictions, examples, seed=1)
    assert found.value == expected
    assert found.signature == str(live.get_signature())
    changed = value_of(perturbed(predictions), examples, lowercase=module is bleu)
    assert abs(changed - expected) > 0.1


def test_bleu_on_the_scorers_own_example(shared_data: Path) -> None:
    folder = shared_data / "metrics/e2e_metrics_example"
    groups = (folder / "devel-conc.txt").read_text(encoding="utf-8").strip().split("\n\n")
    examples = [Example(str(i), "s", tuple(g.splitlines())) for i, g in enumerate(groups)]
    predictions = (folder / "baseline-output.txt").read_text(encoding="utf-8").splitlines()
    expected = 100 * json.loads((folder / "official_scores.json").read_text())["BLEU"]
    assert abs(bleu.score(predictions, examples, seed=1).value - expected) <= ROUNDING


def test_rouge_l_is_rouge_scores_best_reference(shared_data: Path, examples: tuple[Example, ...]) -> None:
    predictions = output(shared_data, "tgen-std.run0")[:100]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)

    def expected(lines: list[str]) -> float:
        best: list[float] = [
            max(scorer.score(r, p)["rougeL"].fmeasure for r in e.references)
            for p, e in zip(lines, examples, strict=False)
        ]
        return 100 * sum(best) / len(best)

    value = rouge_l.score(predictions, examples[:100], seed=1).value
    assert value == pytest.approx(expected(predictions), abs=1e-9)
    assert abs(rouge_l.score(perturbed(predictions), examples[:100], seed=1).value - value) > 0.1


def test_systems_that_leave_nothing_out_cover_the_values(
    shared_data: Path, examples: tuple[Example, ...]
) -> None:
    predictions = output(shared_data, "tgen-plus.run0")
    value = value_coverage.score(predictions, examples, seed=1).value
    assert 0.97 < value <= 1
    assert value_coverage.score(perturbed(predictions), examples, seed=1).value < value
