"""The page of an inspected model: one file, drawn from the folder without torch, and honest about what is not there."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import tiny_models
from pages import check_page
from peftlab.commands.inspecting import InspectRequest
from peftlab.errors import DataError, RunError
from peftlab.figures import canvas
from peftlab.inspection.survey import inspect_models
from peftlab.report.block_drawing import show_layers
from peftlab.report.certificate_claims import claims_of
from peftlab.report.inspection_folder import InspectionFolder, is_inspection
from peftlab.report.inspection_page import write_inspection_page
from peftlab.report.model_drawing import draw_model
from peftlab.report.reading_sections import chosen_heads

TEXT = "the cat sits on a mat"
COARSE = 40
"""Dots per inch of the charts here: what is in them is looked at by people."""


def check(path: Path) -> str:
    page = check_page(path)
    for drawing in re.findall(r"<svg class=\"map\".*?</svg>", page, re.S):
        in_bounds(drawing)
    return page


def in_bounds(drawing: str) -> None:
    """The drawing is well-formed, and nothing lies outside it."""
    root = ElementTree.fromstring(drawing)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes = list(root.iter("rect"))
    assert boxes
    for box in boxes:
        x, y, right, bottom = bounds(box)
        assert min(x, y) >= 0
        assert right <= width + 0.1
        assert bottom <= height + 0.1
    frames = [bounds(box) for box in boxes if box.attrib.get("class") == "frame"]
    for x, y, right, bottom in (bounds(box) for box in boxes if "chip" in box.attrib.get("class", "")):
        assert any(f[0] <= x and f[1] <= y and right <= f[2] and bottom <= f[3] for f in frames)
    for text in root.iter("text"):
        size = 10.5 if "s" in text.attrib.get("class", "").split() else 12
        reach = 0.55 * size * len(text.text or "")
        start = (
            float(text.attrib["x"])
            - {"start": 0, "middle": reach / 2, "end": reach}[text.attrib["text-anchor"]]
        )
        assert start >= 0
        assert start + reach <= width + 20


def bounds(box: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a rectangle."""
    x, y, width, height = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral, looked into with a text."""
    place = tmp_path_factory.mktemp("inspected")
    model = tiny_models.save_model(place / "<b>mixtral", "mixtral")
    request = InspectRequest((str(model),), (TEXT,), layers=(1,), output=place / "out", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", COARSE)
        return inspect_models(request).parent


@pytest.fixture(scope="module")
def document(inspected: Path) -> dict[str, Any]:
    return json.loads((inspected / "inspection.json").read_text())


def test_a_page_has_every_section_and_its_charts(inspected: Path) -> None:
    page = check(inspected / "inspection.html")
    assert headings(page) == [
        "At a glance", "Map and facts", "Certificate", "Parameters and memory", "Words", "Attention", "Activations",
    ]  # fmt: skip
    assert {path.name for path in (inspected / "plots").iterdir()} == {
        "shares.png", "profile.png", "norms.layers.text_0.png", "attention.layers.self.png",
        "attention.layers.self.layer_1.text_0.png",
    }  # fmt: skip
    assert page.count("<img") == 5
    assert "&lt;b&gt;mixtral" in page
    for expected in (
        "experts",
        "RMSNorm",
        "MixtralForCausalLM",
        "looks back",
        "equal to the head&#x27;s output",
    ):
        assert expected in page
    assert "Predicted for lora, targets attention, 8 rows of 64 tokens" in page
    assert "unproven" not in page.split("</style>")[-1]


def test_the_page_is_drawn_again_from_the_folder_without_torch(inspected: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(inspected, again)
    (again / "inspection.html").unlink()
    shutil.rmtree(again / "plots")
    code = (
        "import sys; from peftlab.figures import canvas; from peftlab.report.inspection_page import *;"
        f" canvas.DPI = {COARSE}; write_inspection_page(sys.argv[1]);"
        " print([m for m in ('torch', 'transformers', 'peft', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(again)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert (again / "inspection.html").read_text() == (inspected / "inspection.html").read_text()
    assert is_inspection(again)
    assert not is_inspection(tmp_path)


def test_what_is_damaged_or_missing_is_named(inspected: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no inspection\.json"):
        write_inspection_page(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(inspected, broken)
    (broken / "arrays" / "layers.norms.npy").write_bytes(b"no")
    with pytest.raises(RunError, match=r"layers\.norms\.npy"):
        InspectionFolder(broken).array("layers.norms")
    (broken / "inspection.json").write_text('{"format": ')
    with pytest.raises(RunError, match=r"inspection\.json is damaged"):
        write_inspection_page(broken)


def test_without_texts_the_page_says_what_is_not_there(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = document | {"loaded": False, "readings": [], "words": None}
    (tmp_path / "inspection.json").write_text(json.dumps(bare))
    monkeypatch.setattr(canvas, "DPI", COARSE)
    page = check(write_inspection_page(tmp_path))
    assert page.count("Not there yet") == 2
    assert "no weights were read" in page
    notes = ["activations of x: it folds <its> input"]
    other = {"readings": [], "notes": notes, "words": None, "training_memory": {"note": "it <cannot> be"}}
    noted = document | other
    (tmp_path / "inspection.json").write_text(json.dumps(noted))
    page = check(write_inspection_page(tmp_path))
    assert "Not there yet" not in page
    assert "it folds &lt;its&gt; input" in page
    assert "is not predicted: it &lt;cannot&gt; be." in page


# -- the drawing --------------------------------------------------------------------------------------------------


def changed(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A copy of a document, and the only stack in its map."""
    other = copy.deepcopy(document)
    return other, other["map"]["stacks"][0]


def test_layers_that_are_alike_are_drawn_once(document: dict[str, Any]) -> None:
    other, stack = changed(document)
    first = stack["kinds"][0]
    second = copy.deepcopy(first)
    second["parts"][1]["layers"][0]["adapted"] = "lora, rank 8"
    first["layers"], second["layers"] = [0, 2, 4], [1, 3, 5, 6, 7, 8, 9, 10, 11]
    stack["kinds"].append(second)
    drawing = draw_model(other)
    in_bounds(drawing)
    assert "A block × 3" in drawing
    assert "layers 0, 2, 4" in drawing
    assert "layers 1, 3, 5, 6, 7, 8 … 11" in drawing
    assert drawing.count("lora, rank 8") == 1
    assert drawing.count("<title>layer ") == 12


def test_parts_side_by_side_are_drawn_beside_each_other(document: dict[str, Any]) -> None:
    other, stack = changed(document)
    before = float(ElementTree.fromstring(draw_model(other)).attrib["width"])
    parts = stack["kinds"][0]["parts"]
    parts[3]["side_by_side"] = True
    drawing = draw_model(other)
    in_bounds(drawing)
    assert float(ElementTree.fromstring(drawing).attrib["width"]) > 1.8 * before


def test_a_residual_that_is_not_proved_is_not_drawn(document: dict[str, Any]) -> None:
    other, stack = changed(document)
    assert draw_model(other).count("<circle") == 2
    stack["kinds"][0]["parts"][1]["residual"] = "unresolved"
    drawing = draw_model(other)
    assert drawing.count("<circle") == 1
    assert "residual not proved" in drawing


def test_a_shared_block_tells_which_layers_share_it(document: dict[str, Any]) -> None:
    other, stack = changed(document)
    stack["num_layers"], stack["num_blocks"], stack["order"] = 12, 1, [0] * 12
    stack["kinds"][0]["layers"] = [0]
    drawn = draw_model(other)
    assert "block, 12 layers share 1" in drawn
    assert "layers 0 to 11" in drawn


def test_layers_as_people_write_them() -> None:
    assert show_layers([3]) == "layer 3"
    assert show_layers([0, 1, 2]) == "layers 0 to 2"
    assert show_layers([0, 2]) == "layers 0, 2"


# -- claims and heads ---------------------------------------------------------------------------------------------


def test_every_claim_of_a_certificate_is_told_with_its_reason(document: dict[str, Any]) -> None:
    certificates = copy.deepcopy(document["certificates"])
    assert all(claim.proved for claim in claims_of(certificates, {}))
    kind = certificates[0]["stacks"][0]["kinds"][0]
    kind["residual"] = {"self_attn": "branch", "mlp": "unresolved"}
    del kind["roles"]["self_attn.v_proj"]
    certificates[0]["stacks"][0]["outputs"] = "output of layer 1 is another tensor"
    certificates[0]["head"] = "other"
    unproven = {"model.layers.0.x": "it did not run"}
    found = {claim.text: claim.how for claim in claims_of(certificates, unproven) if not claim.proved}
    assert found == {
        "block outputs are the model's hidden states": "output of layer 1 is another tensor",
        "which layers make query, key, value and output": "no layer was found to be attention value",
        "how each part's output joins the stream": "not for mlp",
        "what the logits are": "another tensor than the head's output",
        "every linear layer of the blocks has a role": "1 have not, such as model.layers.0.x: it did not run",
    }


def test_a_certificate_with_a_problem_claims_nothing(document: dict[str, Any]) -> None:
    certificate = document["certificates"][0] | {"problem": "no tiny twin of it runs (X)"}
    (claim,) = claims_of([certificate], {"a": "no tiny twin of it runs (X)"})
    assert (claim.proved, claim.how) == (False, "no tiny twin of it runs (X)")


def test_a_fused_projection_stands_for_its_parts(document: dict[str, Any]) -> None:
    certificates = copy.deepcopy(document["certificates"])
    certificates[0]["stacks"][0]["kinds"][0]["roles"] = {"a": "attention.qkv", "b": "attention.output"}
    assert all(claim.proved for claim in claims_of(certificates, {}))


def test_heads_are_chosen_by_what_they_do_most() -> None:
    layer = {
        "previous_token_mass": [0.1, 0.9, 0.2, 0.0, 0.1, 0.1], "sink_mass": [0.1, 0.0, 0.1, 0.8, 0.1, 0.1],
        "distance": [1.0, 1.0, 9.0, 1.0, 1.0, None], "entropy": [2.0, 1.5, 2.5, 1.8, 1.9, 0.1],
    }  # fmt: skip
    found = chosen_heads(layer, 6)
    assert found == [(1, "previous token"), (2, "farthest"), (3, "first token"), (5, "narrowest")]
    assert chosen_heads({"entropy": [None, None]}, 2) == [(0, ""), (1, "")]
