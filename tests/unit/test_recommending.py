"""What finished runs say beside the document's rule: every method's mean, how many runs, and no winner from few."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folder_fixture import fabricate_run

import peftlab
from peftlab.errors import DataError, UnknownNameError
from peftlab.recommending import recommend, weigh_runs
from peftlab.run import RunFolder


def of_method(directory: Path, name: str, method: str, bleu: float) -> RunFolder:
    run = fabricate_run(directory, name, steps=12, layers=1, bleu=bleu)
    config = run.config | {"adapters": [{"method": method, "settings": {}}]}
    (run.path / RunFolder.CONFIG).write_text(json.dumps(config))
    return run


def test_the_rule_alone_has_no_evidence() -> None:
    assert peftlab.recommend("general").evidence == ()
    with pytest.raises(UnknownNameError):
        recommend("generell")


def test_runs_are_weighed_best_first_and_few_name_no_winner(tmp_path: Path) -> None:
    of_method(tmp_path, "a", "lora", 60.0)
    of_method(tmp_path, "b", "lora", 70.0)
    of_method(tmp_path, "c", "full", 50.0)
    (sentence,) = recommend("general", tmp_path).evidence
    assert sentence.index("lora 65 (of 2)") < sentence.index("full 50 (of 1)")
    assert "efficiency 0.5" in sentence
    assert "with 1 run of a method none is named better" in sentence


def test_three_seeds_point_to_the_test(tmp_path: Path) -> None:
    runs = [of_method(tmp_path, f"{m}{i}", m, 50.0 + i) for m in ("lora", "ia3") for i in range(3)]
    assert "`peftlab experiment methods` tests" in weigh_runs(runs)[0]


def test_what_cannot_be_compared_is_passed_over(tmp_path: Path) -> None:
    of_method(tmp_path, "a", "lora", 60.0)
    fabricate_run(tmp_path, "b", steps=12, layers=1, until="training")
    assert recommend("general", tmp_path).evidence == ()
    with pytest.raises(DataError, match=r"is no folder"):
        recommend("general", tmp_path / "nowhere")
