"""What peft makes of the settings of its types: another value than was set is an error, told or not."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest

import tiny_models
from peftlab.catalog import METHODS
from peftlab.errors import ConfigError
from peftlab.mapping import map_model


def attach(model: Any, config: dict[str, Any]) -> Any:
    leaf = METHODS.load("peft")
    settings = leaf.Settings(type="loha", config=config)
    return leaf.attach(model, map_model(model), settings, head="causal", seed=1)


def test_a_setting_that_peft_changes_without_a_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = peft.LoHaConfig.__post_init__

    def careless(self: Any) -> None:
        made(self)
        self.r = 4

    monkeypatch.setattr(peft.LoHaConfig, "__post_init__", careless)
    model = tiny_models.build("llama")
    with pytest.raises(
        ConfigError, match=r"config.r of peft's type 'loha' is set to 5, and peft makes 4 of it"
    ):
        attach(model, {"r": 5})
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_models.build("llama").modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_warning_of_another_kind_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = peft.LoHaConfig.__post_init__

    def talkative(self: Any) -> None:
        made(self)
        warnings.warn("the rank is high", UserWarning, stacklevel=1)

    monkeypatch.setattr(peft.LoHaConfig, "__post_init__", talkative)
    with pytest.warns(UserWarning, match="the rank is high"):
        attach(tiny_models.build("llama"), {})
