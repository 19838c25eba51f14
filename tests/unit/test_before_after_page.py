"""`peftlab inspect RUN`: the page of base against tuned model, its tables, and what is refused beforehand."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import pytest
from before_after_cases import TEXTS

import tiny_bundles
import tiny_models
from pages import check_page
from peftlab.commands.inspecting import InspectRequest, add_inspect, read_inspect
from peftlab.commands.parsing import Parser
from peftlab.errors import ConfigError, DataError
from peftlab.figures import canvas
from peftlab.files import write_json
from peftlab.inspection.before_after.surveying import survey_before_after
from peftlab.inspection.subject import find_subject
from peftlab.inspection.survey import inspect_models
from peftlab.report import before_after
from peftlab.report.before_after import BEFORE_AFTER, BEFORE_AFTER_PAGE, write_before_after_page
from peftlab.report.before_after_charts import Grid, Line, draw_grids, draw_lines
from peftlab.report.before_after_words import MEASURES

COARSE = 40
"""Dots per inch of the charts here."""
GENERAL = ("the cat sits on a red house", "a small dog flies", "the price of food is high in the area")


def bundle(folder: Path, name: str) -> Path:
    case = tiny_bundles.CASES[name]
    base = tiny_models.save_model(folder / "base", case.model)
    return tiny_bundles.make(case, base, folder / name).path


def general_text(folder: Path) -> Path:
    file = folder / "notes & more.txt"
    file.write_text("\n".join(GENERAL), encoding="utf-8")
    return file


def page_of(folder: Path, name: str, texts: Sequence[str] = ()) -> str:
    """The page of a bundle, without all else that an inspection has."""
    subject = find_subject(str(bundle(folder, name)), runs=folder, device="cpu")
    found = survey_before_after(subject.attach(), subject, texts=texts, general_text=general_text(folder))
    write_json(folder / BEFORE_AFTER, found)
    return check_page(write_before_after_page(folder))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an inspected LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    path, output = bundle(folder, "lora"), folder / "out"
    request = InspectRequest(
        (str(path),), TEXTS[:1], layers=(0,), output=output, device="cpu", general_text=general_text(folder)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", COARSE)
        return inspect_models(request).parent


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"before_after_{name}.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_run_has_a_page_of_what_it_changed(lora: Path) -> None:
    page = check_page(lora / BEFORE_AFTER_PAGE)
    assert f'href="{BEFORE_AFTER_PAGE}"' in (lora / "inspection.html").read_text(encoding="utf-8")
    assert "in one pass of one loaded model" in page
    assert "3 lines of notes &amp; more.txt" in page
    for measure, (reading, trap) in MEASURES.items():
        assert page.count(f"<b>The trap.</b> {escape(trap)}") == 1, measure
        assert f"{escape(reading)} <b>" in page
    for heading in ("Loss on general text", "Weights", "Intruder dimensions", "Hidden states", "Logit lens"):
        assert f"<h2>{heading}</h2>" in page
    assert "tokens, first tokens left out" in page  # the sample size of CKA
    assert "None" not in page
    assert "nan" not in page.lower().replace("financ", "")


def test_its_tables_hold_every_layer_head_and_module(lora: Path) -> None:
    document = json.loads((lora / BEFORE_AFTER).read_text(encoding="utf-8"))
    assert document["passes"] == 1
    assert [p["name"] for p in document["passages"]] == ["given", "general"]
    layers = rows(lora, "layers")
    assert [row["layer"] for row in layers] == ["0", "1", "output"] * 2
    assert float(layers[1]["drift"]) == document["passages"][0]["stacks"][0]["layers"][1]["drift"]
    heads = rows(lora, "heads")
    assert len(heads) == 2 * 2 * 4
    assert float(heads[5]["js"]) == document["passages"][0]["stacks"][0]["attention"][0]["layers"][1]["js"][1]
    modules = rows(lora, "modules")
    assert len(modules) == 4
    assert modules[0]["shape"] == "16 x 16"
    assert document["passages"][1]["loss"]["passages"] == 3


def test_the_page_is_drawn_again_from_the_folder(lora: Path) -> None:
    before = (lora / BEFORE_AFTER_PAGE).read_text(encoding="utf-8")
    (lora / BEFORE_AFTER_PAGE).unlink()
    assert write_before_after_page(lora).read_text(encoding="utf-8") == before
    with pytest.raises(DataError, match=r"holds no before_after.json"):
        write_before_after_page(lora / "plots")


def test_a_classifier_with_a_new_block_says_what_it_does_not_have(tmp_path: Path) -> None:
    page = page_of(tmp_path, "new_layer")
    assert "run twice" in page
    assert "new blocks that the base does not have (layer 2)" in page
    assert "ends in classes" in page
    assert "a classifier says no tokens" in page
    assert "No weight of the base has moved: new_layer adds" in page
    assert "a bundle without its run does not say where the data lie" in page
    assert "Intruder dimensions" not in page


def test_an_encoder_decoder_has_a_chart_for_each_stack(tmp_path: Path) -> None:
    page = page_of(tmp_path, "ia3", TEXTS)
    assert "relative drift |h&#x27; − h| / |h|, encoder" in page
    assert "relative drift |h&#x27; − h| / |h|, decoder" in page
    assert "attention to the encoder" in page
    assert "general text is the answer to nothing" in page


def test_no_verdict_where_chance_gives_as_much() -> None:
    loss = {"difference": 0.02, "interval": [-0.01, 0.05], "p_value": 0.2, "passages": 9}
    assert "Not decided" in before_after._verdict(loss)
    worse = loss | {"interval": [0.01, 0.05], "p_value": 0.01}
    assert "worse" in before_after._verdict(worse)
    assert "Not decided" in before_after._verdict(worse | {"p_value": 0.06})
    better = loss | {"difference": -0.2, "interval": [-0.3, -0.1], "p_value": 0.001}
    assert "better" in before_after._verdict(better)


def test_general_text_says_nothing_of_a_bare_model(tmp_path: Path) -> None:
    request = InspectRequest(
        ("embedded",), output=tmp_path, device="cpu", general_text=general_text(tmp_path)
    )
    with pytest.raises(ConfigError, match=r"no effect on 'embedded': it has no adapter"):
        inspect_models(request)


def test_charts_of_one_layer_and_of_nothing() -> None:
    one = draw_lines([Line("a", [0.5], 0)], [3], name="drift")
    assert one.count("<rect") == 1
    assert "NaN" not in one
    assert "nan" not in one
    assert "absent" in draw_lines([Line("a", [None], 0)], [3], name="drift")
    grid = Grid("t", ["0"], ["q", "k"], [[0.0, None]], "module", "layer")
    drawn = draw_grids([grid])
    assert "module k: not there" in drawn
    assert "absent" in draw_grids([Grid("t", ["0"], ["q"], [[None]], "module", "layer")])


def asked(*words: str) -> Any:
    parser = Parser()
    add_inspect(parser)
    namespace: argparse.Namespace = parser.parse_args(list(words))
    return read_inspect(namespace)


def test_general_text_without_effect_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "general.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    output = ["--output", str(tmp_path)]
    assert asked("last", "--general_text", str(file), *output).general_text == file
    with pytest.raises(ConfigError, match=r"no effect with --no_text"):
        asked("last", "--general_text", str(file), "--no_text", *output)
    with pytest.raises(ConfigError, match=r"where two models are compared"):
        asked("embedded", "last", "--general_text", str(file), *output)
    with pytest.raises(ConfigError, match=r"nothing.txt: there is no such file"):
        asked("last", "--general_text", str(tmp_path / "nothing.txt"), *output)
