"""Which methods work on which models, held to the table that this version ships: a sample is tried anew, or all of it.

`PEFTLAB_LONG=1` tries every cell and every property (three minutes). The floor, `methods_floor.json`, says on how many
models each method works at least and keeps each of its promises; `python tests/conformance/test_capabilities.py` raises it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch

from peftlab import capabilities
from peftlab.attaching.attachment import PeftAttachment
from peftlab.attaching.prompting import PromptAttachment
from peftlab.capabilities import BASES, PROPERTIES, counts, prove_methods, trials, try_method, try_property
from peftlab.catalog import METHODS
from peftlab.commands import methods as page
from peftlab.commands.methods import MEASURED, markdown, render
from peftlab.objective import ModelLoss
from peftlab.phases import PhaseSwitch

TABLE = json.loads(MEASURED.read_text(encoding="utf-8"))
CELLS = {(cell["method"], cell["model_type"], cell["head"]): cell for cell in TABLE["cells"]}
FLOOR = Path(__file__).with_name("methods_floor.json")
BY_NAME = {(base.model_type, base.head): base for base in BASES}
PROMPTS = ("p_tuning", "prompt_tuning", "prefix_tuning")


def works_on(method):
    """The models that a method works on, as the table has it."""
    return [base for base in BASES if CELLS[method, base.model_type, base.head]["verdict"] == "works"]


def case(method, base, *more):
    return pytest.param(method, base, *more, id="-".join((method, base.model_type, base.head, *more)))


SAMPLE = [case(m, BASES[(3 * place + 1) % len(BASES)]) for place, m in enumerate(METHODS.names())]
PROMISES = [
    case(method, works_on(method)[(3 * place + 7 * number) % len(works_on(method))], name)
    for place, method in enumerate(METHODS.names())
    for number, name in enumerate(PROPERTIES)
    if (place + number) % 3 == 0
]
same_library = pytest.mark.skipif(
    peft.__version__ != TABLE["versions"]["peft"], reason="the table was measured on another release of peft"
)
LLAMA, OPT = BY_NAME["llama", "causal"], BY_NAME["opt", "causal"]


def working(table):
    """On how many models each method works, and how many keep each of its promises."""
    found = {method: Counter() for method in METHODS.names()}
    for cell in table["cells"]:
        found[cell["method"]]["works"] += cell["verdict"] == "works"
        for name, told in cell["properties"].items():
            found[cell["method"]][name] += told == "works"
    return {method: dict(counted) for method, counted in found.items()}


@same_library
@pytest.mark.parametrize(("method", "base"), SAMPLE)
def test_a_sample_does_what_the_table_says(method, base):
    expected = CELLS[method, base.model_type, base.head]
    assert try_method(method, base).to_json() | {"properties": expected["properties"]} == expected


@same_library
@pytest.mark.parametrize(("method", "base", "name"), PROMISES)
def test_a_sample_of_promises_is_kept(method, base, name):
    expected = CELLS[method, base.model_type, base.head]["properties"][name]
    assert try_property(method, base, name).partition(":")[0] == expected.partition(":")[0]


@same_library
@pytest.mark.skipif(os.environ.get("PEFTLAB_LONG") != "1", reason="PEFTLAB_LONG=1 tries every cell")
def test_everything_does_what_the_table_says():
    again = {(c["method"], c["model_type"], c["head"]): c for c in prove_methods()["cells"]}
    assert again.keys() == CELLS.keys()
    for where, cell in again.items():
        verdicts = [
            {k: v.partition(":")[0] for k, v in c["properties"].items()} for c in (cell, CELLS[where])
        ]
        assert verdicts[0] == verdicts[1], where
        assert cell["verdict"] == CELLS[where]["verdict"], where


def test_every_method_and_model_is_in_the_table_and_nothing_fails():
    assert set(CELLS) == {(method, *where) for where in BY_NAME for method in METHODS.names()}
    assert {cell["verdict"] for cell in TABLE["cells"]} == {"works", "refused"}
    for cell in TABLE["cells"]:
        assert bool(cell["reason"]) == (cell["verdict"] == "refused")
        assert list(cell["properties"]) == (list(PROPERTIES) if cell["verdict"] == "works" else [])
        for told in cell["properties"].values():
            assert told == "works" or told.startswith(("refused: ", "n/a: "))


def test_no_method_falls_below_its_floor():
    floor = json.loads(FLOOR.read_text(encoding="utf-8"))
    found = working(TABLE)
    assert list(floor) == METHODS.names()
    short = [
        (m, n) for m, least in floor.items() for n, number in least.items() if found[m].get(n, 0) < number
    ]
    assert not short


def test_what_begins_as_the_base():
    for (method, *_), cell in CELLS.items():
        if cell["verdict"] == "works":
            assert cell["identity"] == (method not in PROMPTS), cell


def test_what_must_work_works_wherever_the_method_does():
    for cell in TABLE["cells"]:
        if cell["verdict"] == "works":
            assert {cell["properties"][name] for name in ("count", "accumulation", "resume")} == {"works"}


def test_the_page_in_the_docs_is_this_table():
    docs = MEASURED.parents[3] / "docs" / "methods.md"
    if docs.exists():  # not beside an installed package
        assert docs.read_text(encoding="utf-8") == markdown(TABLE)
    assert "METHODS ON TINY MODELS" in render(TABLE)
    assert list(page.PROPERTIES) == list(PROPERTIES)


@same_library
def test_a_head_of_two_layers_is_merged_where_peft_s_ia3_cannot():
    """peft 0.21's IA3 looks for a weight on RoBERTa's head while it unloads."""
    assert try_property("ia3", BY_NAME["roberta", "classification"], "merge") == "works"


# -- companions: each trial notices a product that breaks its promise ----------------------------------------------


def fails(method, base, name):
    told = try_property(method, base, name)
    assert told.startswith(capabilities.FAILED), told
    return told


def test_companion_a_base_that_moves_is_noticed(monkeypatch):
    lora = METHODS.load("lora")
    attach = lora.attach

    def careless(model, *given, **more):
        attached = attach(model, *given, **more)
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).add_(1e-3)
        return attached

    monkeypatch.setattr(lora, "attach", careless)
    found = try_method("lora", LLAMA)
    assert found.verdict == capabilities.FAILED
    assert "base" in found.reason


def test_companion_a_mean_of_means_is_noticed(monkeypatch):
    monkeypatch.setattr(ModelLoss, "count", lambda self, batch: 1)
    assert "2 x 2 rows and 1 x 4" in fails("ia3", OPT, "accumulation")


def test_companion_checkpointing_that_is_not_on_is_noticed(monkeypatch):
    monkeypatch.setattr(trials, "switch_checkpointing", lambda model, on: None)
    assert "ran 1 times" in fails("ia3", OPT, "checkpointing")


def test_companion_a_prefix_that_generation_loses_is_noticed(monkeypatch):
    plain = peft.PeftModelForCausalLM.generate
    monkeypatch.setattr(PromptAttachment, "_generate", lambda self, *a, **k: plain(self.model, *a, **k))
    assert "without a cache" in fails("prefix_tuning", OPT, "generation")


def test_companion_a_resume_without_the_adapter_is_noticed(monkeypatch):
    monkeypatch.setattr(PeftAttachment, "load", lambda self, tensors: None)
    assert "end elsewhere" in fails("ia3", LLAMA, "resume")


def test_companion_phases_that_freeze_nothing_are_noticed(monkeypatch):
    apply = PhaseSwitch.apply

    def careless(self, step, optimizer):
        phase = apply(self, step, optimizer)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        return phase

    monkeypatch.setattr(PhaseSwitch, "apply", careless)
    assert "in the phase of the attention" in fails("ia3", LLAMA, "phases")


def test_companion_a_merge_that_drops_the_adapter_is_noticed(monkeypatch):
    monkeypatch.setattr("peftlab.attaching.merging._fold_layers", lambda *_: None)
    assert "merged, the logits are" in fails("ia3", LLAMA, "merge")


def test_companion_another_count_is_noticed(monkeypatch):
    monkeypatch.setattr(counts, "_rank", lambda *_: 7)
    assert "the formula gives" in fails("lora", LLAMA, "count")


def test_companion_an_answer_from_a_pad_is_noticed(monkeypatch):
    monkeypatch.setattr("peftlab.attaching.prompting.looks_for_pads", lambda model: False)
    assert "padded and alone" in fails("prompt_tuning", BY_NAME["llama", "classification"], "padding")


def test_companion_pads_that_are_read_are_noticed(monkeypatch):
    forward = ModelLoss.total
    monkeypatch.setattr(
        ModelLoss, "total", lambda self, model, batch: forward(self, model, {**batch, "attention_mask": None})
    )
    assert "gradients" in fails("lora", BY_NAME["bert", "classification"], "padding")


def test_companion_steps_that_round_to_nothing_are_noticed(monkeypatch):
    step = torch.optim.AdamW.step

    @torch.no_grad()
    def rounded(self, *given):
        step(self, *given)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.copy_(parameter.bfloat16())

    monkeypatch.setattr(torch.optim.AdamW, "step", rounded)
    assert "with a gradient moved in 20 steps" in fails("lora", LLAMA, "bf16")


def test_every_second_row_is_padded():
    for base in BASES:
        batch = base.batch(base.build())
        if "attention_mask" in batch:
            assert (batch["attention_mask"] == 0).sum(1).tolist() == [0, 3], base


def test_companion_a_loss_that_is_not_finite_is_noticed(monkeypatch):
    total = ModelLoss.total
    monkeypatch.setattr(ModelLoss, "total", lambda *given: total(*given) * float("nan"))
    assert "not finite" in fails("lora", LLAMA, "bf16")


if __name__ == "__main__":
    FLOOR.write_text(json.dumps(working(TABLE), indent=1) + "\n", encoding="utf-8")
