"""The E2E challenge's ROUGE-L against its official scorer: 15 means and 3 x 630 segments, each to its four places."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from peftlab.metrics import rouge_l_e2e
from peftlab.task import Example
from peftlab.tasks import e2e_nlg

OUTPUTS = [f"tgen-{system}.run{run}" for system in ("minus", "std", "plus") for run in range(5)]
ROUNDING = 0.00005 + 1e-9


@pytest.fixture(scope="module")
def examples(shared_data: Path) -> tuple[Example, ...]:
    return tuple(e2e_nlg.load(shared_data / "e2e", seed=1).test)


def output(shared_data: Path, name: str) -> list[str]:
    return (shared_data / f"metrics/e2e_tgen/outputs/{name}.txt").read_text(encoding="utf-8").splitlines()


def perturbed(predictions: list[str]) -> list[str]:
    """One word in a hundred changed."""
    rng = random.Random(1)
    return [" ".join("perturbed" if rng.random() < 0.01 else w for w in p.split()) for p in predictions]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_mean_is_the_official_score(name: str, shared_data: Path, examples: tuple[Example, ...]) -> None:
    scores = json.loads((shared_data / "metrics/e2e_tgen/official_scores.json").read_text())["scores"]
    expected = scores[f"{name}.txt"]["ROUGE_L"]
    predictions = output(shared_data, name)
    assert round(rouge_l_e2e.score(predictions, examples, seed=1).value / 100, 4) == expected
    changed = rouge_l_e2e.score(perturbed(predictions), examples, seed=1).value / 100
    assert abs(changed - expected) > 10 * ROUNDING


@pytest.mark.parametrize("name", ["tgen-minus.run0", "tgen-std.run0", "tgen-plus.run0"])
def test_every_segment_is_the_official_score(
    name: str, shared_data: Path, examples: tuple[Example, ...]
) -> None:
    table = (shared_data / f"metrics/e2e_tgen/segment_scores/{name}.seg.tsv").read_text(encoding="utf-8")
    header, *rows = (line.split("\t") for line in table.splitlines())
    column = header.index("ROUGE_L")
    predictions = output(shared_data, name)
    assert [row[1] for row in rows] == predictions
    pairs = list(zip(predictions, examples, rows, strict=True))
    assert all(
        abs(rouge_l_e2e.segment_score(p, e.references) - float(row[column])) <= ROUNDING
        for p, e, row in pairs
    )
    wrong = sum(
        abs(1.01 * rouge_l_e2e.segment_score(p, e.references) - float(row[column])) > ROUNDING
        for p, e, row in pairs
    )
    assert wrong == 630


def test_the_scorers_own_example(shared_data: Path) -> None:
    """Not among the files that the tokenizer was made on."""
    folder = shared_data / "metrics/e2e_metrics_example"
    groups = (folder / "devel-conc.txt").read_text(encoding="utf-8").strip().split("\n\n")
    examples = [Example(str(i), "s", tuple(g.splitlines())) for i, g in enumerate(groups)]
    predictions = (folder / "baseline-output.txt").read_text(encoding="utf-8").splitlines()
    expected = json.loads((folder / "official_scores.json").read_text())["ROUGE_L"]
    assert round(rouge_l_e2e.score(predictions, examples, seed=1).value / 100, 4) == expected
