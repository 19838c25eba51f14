"""Which methods work on which models, held to the table that this version ships: a sample is tried anew."""

from __future__ import annotations

import json
from collections import Counter

import peft
import pytest
import torch

from peftlab import capabilities
from peftlab.capabilities import MODELS, try_method
from peftlab.catalog import METHODS
from peftlab.commands.methods import MEASURED, markdown, render

TABLE = json.loads(MEASURED.read_text(encoding="utf-8"))
CELLS = {(cell["method"], cell["model_type"], cell["head"]): cell for cell in TABLE["cells"]}
LEAST = {
    "lora": 10, "adalora": 9, "ia3": 10, "full": 10, "new_layer": 10, "hybrid": 9, "peft": 9, "bitfit": 6, "p_tuning": 9,
    "prompt_tuning": 9, "prefix_tuning": 9,
}  # fmt: skip
SAMPLE = [
    pytest.param(method, *model, id=f"{method}-{model[0]}-{model[1]}")
    for place, method in enumerate(METHODS.names())
    for model in (MODELS[3 * place % len(MODELS)], MODELS[(3 * place + 5) % len(MODELS)])
]
same_library = pytest.mark.skipif(
    peft.__version__ != TABLE["versions"]["peft"], reason="the table was measured on another release of peft"
)


@same_library
@pytest.mark.parametrize(("method", "model_type", "head", "class_name"), SAMPLE)
def test_a_sample_does_what_the_table_says(method, model_type, head, class_name):
    found = try_method(method, model_type, head=head, class_name=class_name).to_json()
    assert found == CELLS[method, model_type, head]


def test_every_method_and_model_is_in_the_table_and_nothing_fails():
    assert set(CELLS) == {(method, name, head) for name, head, _ in MODELS for method in METHODS.names()}
    assert {cell["verdict"] for cell in TABLE["cells"]} == {"works", "refused"}
    works = Counter(cell["method"] for cell in TABLE["cells"] if cell["verdict"] == "works")
    assert {method: works[method] for method in LEAST} == LEAST
    assert all(cell["reason"] for cell in TABLE["cells"] if cell["verdict"] == "refused")


def test_what_begins_as_the_base():
    for (method, *_), cell in CELLS.items():
        if cell["verdict"] == "works":
            assert cell["identity"] == (method not in ("p_tuning", "prompt_tuning", "prefix_tuning")), cell


def test_the_page_in_the_docs_is_this_table():
    page = MEASURED.parents[3] / "docs" / "methods.md"
    if page.exists():  # not beside an installed package
        assert page.read_text(encoding="utf-8") == markdown(TABLE)
    assert "METHODS ON TINY MODELS" in render(TABLE)


def test_companion_a_base_that_moves_is_noticed(monkeypatch):
    lora = METHODS.load("lora")
    attach = lora.attach

    def careless(model, *given, **more):
        attached = attach(model, *given, **more)
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).add_(1e-3)
        return attached

    monkeypatch.setattr(lora, "attach", careless)
    found = try_method("lora", "llama", head="causal", class_name="LlamaForCausalLM")
    assert found.verdict == capabilities.FAILED
    assert "base" in found.reason
