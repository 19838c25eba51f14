"""NIST, CIDEr and the challenges' BLEUs against published and official scores, each to the places that were given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftlab.metrics import (
    bleu_1,
    bleu_2,
    bleu_3,
    bleu_4,
    bleu_codexglue,
    bleu_e2e,
    cider,
    exact_match_stripped,
    nist,
    rouge_l_e2e,
    smoothed_bleu_4,
)
from peftlab.ngram_scores import (
    CiderReferences,
    NistReferences,
    bleu_statistics,
    challenge_bleu,
    nist_from_statistics,
)
from peftlab.task import Example
from peftlab.tasks import e2e_nlg
from peftlab.word_splitting import split_like_mteval, split_like_stanford

OUTPUTS = [f"tgen-{system}.run{run}" for system in ("minus", "std", "plus") for run in range(5)]
ROUNDING = 0.00005 + 1e-9


@pytest.fixture(scope="module")
def examples(shared_data: Path) -> tuple[Example, ...]:
    return tuple(e2e_nlg.load(shared_data / "e2e", seed=1).test)


@pytest.fixture(scope="module")
def mteval_references(examples: tuple[Example, ...]) -> list[list[list[str]]]:
    return [[split_like_mteval(r) for r in e.references] for e in examples]


@pytest.fixture(scope="module")
def cider_references(examples: tuple[Example, ...]) -> CiderReferences:
    return CiderReferences([[split_like_stanford(r) for r in e.references] for e in examples])


@pytest.fixture(scope="module")
def nist_references(mteval_references: list[list[list[str]]]) -> NistReferences:
    return NistReferences(mteval_references)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def output(shared_data: Path, name: str) -> list[str]:
    return lines(shared_data / f"metrics/e2e_tgen/outputs/{name}.txt")


def test_the_means_of_all_15_outputs_are_the_official_scores(
    shared_data: Path, cider_references: CiderReferences, nist_references: NistReferences
) -> None:
    official = json.loads((shared_data / "metrics/e2e_tgen/official_scores.json").read_text())["scores"]
    for name in OUTPUTS:
        predictions, expected = output(shared_data, name), official[f"{name}.txt"]
        words = [split_like_mteval(p) for p in predictions]
        assert (
            round(nist_from_statistics(nist_references.statistics(words).sum(axis=0)), 4) == expected["NIST"]
        )
        values = cider_references.values([split_like_stanford(p) for p in predictions])
        assert round(sum(values) / len(values), 4) == expected["CIDEr"]


@pytest.mark.parametrize("name", ["tgen-std.run0"])
def test_the_leaves_give_the_official_scores_with_their_interval(
    name: str, shared_data: Path, examples: tuple[Example, ...]
) -> None:
    official = json.loads((shared_data / "metrics/e2e_tgen/official_scores.json").read_text())["scores"]
    expected, predictions = official[f"{name}.txt"], output(shared_data, name)
    for module, key, scale in ((bleu_e2e, "BLEU", 100), (nist, "NIST", 1), (cider, "CIDEr", 1)):
        found = module.score(predictions, examples, seed=1)
        assert round(found.value / scale, 4) == expected[key]
        assert found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]


@pytest.mark.parametrize("name", ["tgen-minus.run0", "tgen-std.run0", "tgen-plus.run0"])
def test_every_segment_is_the_official_score(
    name: str,
    shared_data: Path,
    mteval_references: list[list[list[str]]],
    cider_references: CiderReferences,
) -> None:
    header, *rows = (
        line.split("\t") for line in lines(shared_data / f"metrics/e2e_tgen/segment_scores/{name}.seg.tsv")
    )
    predictions = output(shared_data, name)
    words = [split_like_mteval(p) for p in predictions]
    counted = [np.array(bleu_statistics(p, group)) for p, group in zip(words, mteval_references, strict=True)]

    def alone(prediction: list[str], group: Sequence[list[str]]) -> float:
        return nist_from_statistics(NistReferences([group]).statistics([prediction]).sum(axis=0))

    found: dict[str, list[float]] = {
        "CIDEr": cider_references.values([split_like_stanford(p) for p in predictions]),
        "BLEU": [challenge_bleu(row) for row in counted],
        "sentBLEU": [challenge_bleu(row, smoothing=1) for row in counted],
        "NIST": [alone(p, group) for p, group in zip(words, mteval_references, strict=True)],
    }
    for key, values in found.items():
        column = header.index(key)
        wrong = [abs(v - float(row[column])) > ROUNDING for v, row in zip(values, rows, strict=True)]
        assert sum(wrong) == 0, key


def test_the_scorers_own_example(shared_data: Path) -> None:
    folder = shared_data / "metrics/e2e_metrics_example"
    groups = (folder / "devel-conc.txt").read_text(encoding="utf-8").strip().split("\n\n")
    made = [Example(str(i), "s", tuple(group.splitlines())) for i, group in enumerate(groups)]
    expected = json.loads((folder / "official_scores.json").read_text())
    for module, key, scale in ((bleu_e2e, "BLEU", 100), (nist, "NIST", 1), (cider, "CIDEr", 1)):
        found = module.score(lines(folder / "baseline-output.txt"), made, seed=1)
        assert round(found.value / scale, 4) == expected[key]


def test_nlg_eval_to_five_places(shared_data: Path) -> None:
    folder = shared_data / "metrics/nlg_eval"
    expected: dict[str, Any] = json.loads((folder / "published_scores.json").read_text())
    pairs = zip(lines(folder / "ref1.txt"), lines(folder / "ref2.txt"), strict=True)
    made = [Example(str(i), "s", pair) for i, pair in enumerate(pairs)]
    modules = {"Bleu_1": bleu_1, "Bleu_2": bleu_2, "Bleu_3": bleu_3, "Bleu_4": bleu_4, "ROUGE_L": rouge_l_e2e}
    for key, module in modules.items():
        value = module.score(lines(folder / "hyp.txt"), made, seed=1).value
        assert value / 100 == pytest.approx(expected[key], abs=5e-6), key
    assert cider.score(lines(folder / "hyp.txt"), made, seed=1).value == pytest.approx(
        expected["CIDEr"], abs=5e-6
    )


def test_codexglues_summaries(shared_data: Path) -> None:
    folder = shared_data / "metrics/codexglue_smoothed_bleu4"
    predictions, references = (
        [line.split("\t", 1)[1] for line in lines(folder / name)]
        for name in ("predictions.txt", "reference.txt")
    )
    made = [Example(str(i), "s", (reference,)) for i, reference in enumerate(references)]
    found = smoothed_bleu_4.score(predictions, made, seed=1).value
    assert found == pytest.approx(9.554726113590661, rel=1e-14)


@pytest.mark.parametrize("name", ["java-cs", "cs-java", "refine-small", "example"])
def test_codexglues_bleu_and_exact_match(name: str, shared_data: Path) -> None:
    folder = shared_data / "metrics/codexglue_bleu_em"
    predicted, wanted = (
        ("example.predictions.txt", "example.references.txt")
        if name == "example"
        else (f"{name}.output", f"{name}.ref")
    )
    made = [Example(str(i), "s", (line,)) for i, line in enumerate(lines(folder / wanted))]
    predictions = lines(folder / predicted)
    bleu, matches = json.loads((folder / "published_scores.json").read_text())[name]["rerun"]
    assert round(bleu_codexglue.score(predictions, made, seed=1).value, 2) == bleu
    share = exact_match_stripped.score(predictions, made, seed=1).value
    assert round(100 * share, 1) == matches
