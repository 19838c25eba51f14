"""Tables, numbers as people read them, the pre-flight, and runs side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folder_fixture import fabricate_run

from peftlab.comparison import compare_runs
from peftlab.tables import (
    render_html,
    render_preflight,
    render_text,
    show_bytes,
    show_count,
    show_groups,
    show_score,
    show_seconds,
)


def test_text_lines_up_numbers_to_the_right_and_wide_letters() -> None:
    text = render_text([["run", "bleu"], ["a", 36.04], ["学習", 7.5], ["short"]])
    assert text.splitlines() == ["run     bleu", "-----  -----", "a      36.04", "学習     7.5", "short"]
    assert render_text([]) == ""


def test_html_is_escaped() -> None:
    html = render_html([["<a>", "n"], ["x & y", 1234], [None, True]], caption="<c>")
    assert "&lt;a&gt;" in html
    assert "x &amp; y" in html
    assert "1,234" in html
    assert "<a>" not in html
    assert "<c>" not in html


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_count(294_912, of=134_515_008), "294,912 (0.219 %)"),
        (show_count(None), "-"),
        (show_bytes(812 << 20), "812 MiB"),
        (show_bytes(1536), "1.5 KiB"),
        (show_bytes(3 << 40), "3 TiB"),
        (show_seconds(0.25), "0.25 s"),
        (show_seconds(59.94), "59.9 s"),
        (show_seconds(247), "4 min 07 s"),
        (show_seconds(7500), "2 h 05 min"),
        (show_score({"value": 0.51234, "unit": "rate", "interval": [0.4, 0.6]}), "0.512 [0.400, 0.600]"),
        (show_score({"value": 36.04, "unit": "0-100", "interval": None}), "36.04"),
        (show_groups({"groups": ["mlp"], "layers": [0, 10]}), "mlp in layers 0 to 10"),
        (show_groups({"groups": ["mlp"], "layers": "early"}), "mlp in early half"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_preflight_shows_rows_phases_and_notes(tmp_path: Path) -> None:
    text = render_preflight(fabricate_run(tmp_path, until="started").preflight)
    for expected in (
        "9 target too long",
        "53.1 %",
        "2.8 epochs",
        "196,608 (5.69 %)",
        "141 to 280",
        "note: lm_head",
    ):
        assert expected in text


ADAPTER = {"scope": "model", "method": "lora", "peft_type": "lora", "tensors": 4, "parameters": 512}


def test_the_preflight_names_base_and_adapters(tmp_path: Path) -> None:
    preflight = fabricate_run(tmp_path, until="started").preflight
    assert "base " not in render_preflight(preflight), "one that an older version wrote"
    preflight["model"] = {"name": "org/base", "class": "T5ForConditionalGeneration", "head": "seq2seq"}
    kinds = {"lora": 716_800, "new_layer": 2_360_320}
    hybrid = ADAPTER | {"method": "hybrid", "parameters": 3_077_120, "kinds": kinds}
    lines = render_preflight(preflight | {"adapters": [hybrid]}).splitlines()
    assert lines[1] == "base org/base (T5ForConditionalGeneration, seq2seq), 3,457,280 parameters"
    assert [line.split() for line in lines[3:8]] == [
        ["adapter", "method", "type", "in", "peft", "trains", "parameters"],
        ["-" * 11, "-" * 6, "-" * 12, "-" * 10, "-" * 10],
        ["whole", "model", "hybrid", "lora", "LoRA", "716,800"],
        ["new", "layers", "2,360,320"],
        ["together", "3,077,120"],
    ]
    towers = [
        ADAPTER | {"scope": scope, "kinds": {"lora": n}} for scope, n in (("vision", 288), ("text", 224))
    ]
    bare = ADAPTER | {"method": "full", "peft_type": None, "kinds": {"full": 9, "whole": 3}, "parameters": 12}
    text = render_preflight(preflight | {"adapters": [*towers, bare]})
    for expected in (
        "0: vision ",
        "1: text ",
        "2: whole model ",
        " 288",
        " 224",
        "heads or embeddings, whole",
    ):
        assert expected in text


def test_what_a_run_does_not_have_is_a_dash_everywhere(tmp_path: Path) -> None:
    import yaml

    runs = [fabricate_run(tmp_path, "a"), fabricate_run(tmp_path, "b")]
    for run, settings, patience in (
        (
            runs[0],
            {"rank": 8, "layers": None, "bias": "none", "modules_to_save": [], "init": "default"},
            None,
        ),
        (runs[1], {"targets": None}, 3),
    ):
        config = run.config
        config["adapters"][0]["settings"] = settings
        config["training"]["early_stopping_patience"] = patience
        (run.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert compare_runs(runs).settings[1:] == [
        ["adapters[0].settings.rank", "8", "-"],
        ["adapters[0].settings.init", "default", "-"],
        ["training.early_stopping_patience", "-", "3"],
    ]
    path = runs[1].path / "config.yaml"
    path.write_text(path.read_text().replace("max_steps: 420", "max_steps: 421"))
    said = " ".join(str(cell) for row in compare_runs(runs).rows for cell in row)
    assert not any(word in said for word in ("(none)", "None", " none"))


def test_runs_side_by_side_show_what_differs_and_what_came_out(tmp_path: Path) -> None:
    runs = [fabricate_run(tmp_path, "a"), fabricate_run(tmp_path, "b", rank=16, until="training")]
    comparison = compare_runs([run.path for run in runs])
    assert comparison.settings == [["", "a", "b"], ["adapters[0].settings.rank", "8", "16"]]
    found = {row[0]: row[1:] for row in comparison.results}
    assert found["bleu after (0-100)"] == ["61.30 [58.90, 63.70]", "-"]
    assert found["bleu before (0-100)"][1] == "3.10 [2.50, 3.70]"
    assert found["status"] == ["finished", "not finished, at step 210"]
    assert found["trainable parameters"] == ["196,608 (5.69 %)", "-"]
    assert found["gradient norm, attention / MLP"][0].startswith("0.5")
    assert any("Not finished: b" in note for note in comparison.notes)
    assert "three seeds" in comparison.notes[-1]
    assert "adapters[0].settings.rank" in render_text(comparison.rows)


def test_what_makes_runs_incomparable_is_said(tmp_path: Path) -> None:
    runs = [fabricate_run(tmp_path, "a", steps=30), fabricate_run(tmp_path, "b", steps=60)]
    path = runs[1].path / "embedded_evaluation.json"
    path.write_text(path.read_text().replace('"max_new_tokens": 48', '"max_new_tokens": 8'))
    notes = " ".join(compare_runs(runs).notes)
    assert "training steps differ: 30 / 60" in notes
    assert "decoding differs" in notes


def test_runs_of_one_name_get_labels_of_their_own(tmp_path: Path) -> None:
    runs = [fabricate_run(tmp_path / where, "a", until="started") for where in ("x", "y")]
    assert compare_runs(runs).labels == ["x/a", "y/a"]
    assert compare_runs([runs[0], runs[0]]).labels == ["x/a (1)", "x/a (2)"]
