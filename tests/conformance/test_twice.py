"""Every method after every other on one base: the second is refused by name, and the first can still be taken off."""

from __future__ import annotations

from typing import Any

import peft
import pytest

import tiny_models
from peftlab.catalog import METHODS
from peftlab.errors import MethodError
from peftlab.mapping import map_model
from peftlab.proof import fingerprint

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "peft": {"type": "loha"},
    "p_tuning": {"num_virtual_tokens": 2},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
}


def attach(name: str, model: Any) -> Any:
    leaf = METHODS.load(name)
    settings = leaf.Settings(**SETTINGS.get(name, {}))
    return leaf.attach(model, map_model(model), settings, head="causal", seed=0)


@pytest.mark.parametrize("first", METHODS.names())
def test_a_second_method_is_refused(first: str) -> None:
    base = tiny_models.build("llama")
    marks = {name: fingerprint(p) for name, p in base.named_parameters()}
    attached = attach(first, base)
    trained = {name for name, p in attached.model.named_parameters() if p.requires_grad}
    for second in METHODS.names():
        with pytest.raises(MethodError, match=r"has an adapter already .*take it off first"):
            attach(second, base)
    assert {name for name, p in attached.model.named_parameters() if p.requires_grad} == trained
    assert attached.remove() is base
    assert {name: fingerprint(p) for name, p in base.named_parameters()} == marks
    attach("lora", base)  # and now it is free


def test_a_model_with_layers_of_peft_is_refused() -> None:
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MethodError, match=r"layers of peft already \(.*q_proj\).*unload\(\)"):
        attach("bitfit", model)
    with pytest.raises(MethodError, match=r"layers of peft already"):
        attach("lora", model.base_model.model)
