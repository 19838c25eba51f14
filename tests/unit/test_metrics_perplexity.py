"""Perplexity over labelled tokens: by formula, whatever the padding and the batches, with adapters and both heads."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import log_softmax

import tiny_models
from peftlab.errors import EvaluationError
from peftlab.perplexity import perplexity


def rows(name: str, count: int = 4) -> dict[str, torch.Tensor]:
    made = tiny_models.training_inputs(name, batch=count, length=8, seed=1)
    made["labels"] = made["labels"].clone()
    made["labels"][:, :3] = -100
    made["labels"][0, 5:] = -100
    return made


def by_formula(model: Any, made: dict[str, torch.Tensor], *, shift: bool) -> float:
    with torch.no_grad():
        shares = log_softmax(model(**made).logits.double(), dim=-1)
    total, number = 0.0, 0
    for row, labels in enumerate(made["labels"].tolist()):
        for place, label in enumerate(labels):
            if label != -100 and (place or not shift):
                total -= shares[row, place - shift, label].item()
                number += 1
    return math.exp(total / number)


@pytest.mark.parametrize(("name", "shift"), [("llama", True), ("gpt2", True), ("t5", False), ("bart", False)])
def test_it_is_the_formula_over_labelled_tokens_alone(name: str, shift: bool) -> None:
    model, made = tiny_models.build(name).double().eval(), rows(name)
    found = perplexity(model, [made], seed=1)
    assert found.value == pytest.approx(by_formula(model, made, shift=shift), rel=1e-12)
    assert f"tokens:{int((made['labels'][:, int(shift) :] != -100).sum())}|" in found.signature
    assert (found.unit, found.higher_is_better, found.count) == ("perplexity", False, 4)
    assert found.interval is not None
    assert found.interval[0] <= found.value <= found.interval[1]


def test_it_does_not_depend_on_the_batches() -> None:
    model, made = tiny_models.build("llama").double().eval(), rows("llama")
    whole = perplexity(model, [made], seed=1)
    alone = perplexity(model, [{k: v[i : i + 1] for k, v in made.items()} for i in range(4)], seed=1)
    assert alone.value == pytest.approx(whole.value, rel=1e-12)
    assert alone.interval == pytest.approx(whole.interval, rel=1e-12)


def test_padding_does_not_count() -> None:
    model, made = tiny_models.build("llama").double().eval(), rows("llama")
    padded = {
        "input_ids": torch.nn.functional.pad(made["input_ids"], (0, 5)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(made["input_ids"]), (0, 5)),
        "labels": torch.nn.functional.pad(made["labels"], (0, 5), value=-100),
    }
    expected = perplexity(model, [made], seed=1).value
    assert perplexity(model, [padded], seed=1).value == pytest.approx(expected, rel=1e-12)


def test_a_model_that_knows_nothing_wavers_between_all_tokens() -> None:
    model = tiny_models.build("gpt2").double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = perplexity(model, [rows("gpt2")], seed=1)
    assert found.value == pytest.approx(tiny_models.VOCABULARY, rel=1e-12)


def test_virtual_tokens_of_an_adapter_are_passed_over() -> None:
    made = rows("llama")
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_models.build("llama").double(), config).double().eval()
    with torch.no_grad():
        shares = log_softmax(model(**made).logits, dim=-1)[:, 3:]
    labels = made["labels"][:, 1:]
    kept = labels != -100
    expected = math.exp(-shares[:, :-1][kept].gather(1, labels[kept].unsqueeze(1)).mean().item())
    assert perplexity(model, [made], seed=1).value == pytest.approx(expected, rel=1e-12)


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    for is_training in (True, False):
        model = tiny_models.build("llama").train(is_training)
        perplexity(model, [rows("llama")], seed=1)
        assert model.training is is_training


def test_what_cannot_be_scored_is_refused() -> None:
    model, made = tiny_models.build("llama"), rows("llama")
    with pytest.raises(EvaluationError, match=r"a batch has no labels; there is: "):
        perplexity(model, [{k: v for k, v in made.items() if k != "labels"}], seed=1)
    with pytest.raises(EvaluationError, match=r"none of 4 rows has a token to score"):
        perplexity(model, [made | {"labels": torch.full_like(made["labels"], -100)}], seed=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"logits are not finite"):
        perplexity(model, [made], seed=1)
