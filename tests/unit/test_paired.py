"""Base and tuned model in one pass against two separate ones."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import tiny_models
from peftlab.errors import ConfigError, ModelError
from peftlab.inspection.paired import paired_outputs


def adapted(name: str = "llama", *, num_layers: int = 2, **changes: Any) -> Any:
    """A tiny model with a LoRA that is not zero."""
    linear = {"llama": ["q_proj", "down_proj"], "t5": ["q", "wo"]}[name]
    config = peft.LoraConfig(**{"r": 2, "target_modules": linear, "lora_dropout": 0.5} | changes)
    model = peft.get_peft_model(tiny_models.build(name, num_layers), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def separately(
    model: Any, inputs: dict[str, torch.Tensor], *, decoder: bool = False
) -> list[list[torch.Tensor]]:
    """Hidden states of both, by two passes; those before the final norm."""
    found = []
    for adapter in (False, True):
        with torch.no_grad():
            if adapter:
                output = model(**inputs, output_hidden_states=True)
            else:
                with model.disable_adapter():
                    output = model(**inputs, output_hidden_states=True)
        found.append(list((output.decoder_hidden_states if decoder else output.hidden_states)[1:-1]))
    return found


def number_of_hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def same(seen: Any, expected: list[list[torch.Tensor]]) -> None:
    for outputs, states in zip((seen.base, seen.tuned), expected, strict=True):
        for layer, state in enumerate(states):
            torch.testing.assert_close(outputs[layer], state, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(seen.base[1], seen.tuned[1], atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_one_pass_gives_what_two_give(changes: dict[str, Any]) -> None:
    model = adapted(num_layers=3, **changes)
    inputs = tiny_models.inputs("llama", batch=3)
    inputs["attention_mask"][1, 5:] = 0
    expected = separately(model, inputs)
    next(p for name, p in model.named_parameters() if "lora_B" in name).requires_grad_(False)  # as in a phase
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    hooks = number_of_hooks(model)
    seen = paired_outputs(model, inputs, [0, 1])
    same(seen, expected)
    assert (seen.num_passes, bool(seen.note)) == ((2, True) if changes else (1, False))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    assert number_of_hooks(model) == hooks


def test_both_stacks_of_an_encoder_decoder_in_one_pass() -> None:
    model = adapted("t5", num_layers=3)
    inputs = tiny_models.inputs("t5")
    seen = paired_outputs(model, inputs, [0, 1], stack="decoder")
    assert seen.num_passes == 1
    same(seen, separately(model, inputs, decoder=True))


def test_a_method_that_cannot_mix_takes_two_passes() -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny_models.build("llama", 3), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.add_(0.5)
    model.eval()
    inputs = tiny_models.inputs("llama")
    seen = paired_outputs(model, inputs, [0, 1])
    assert seen.num_passes == 2
    assert "ia3" in seen.note
    same(seen, separately(model, inputs))


def test_dropout_of_a_training_model_is_off_and_it_stays_a_training_model() -> None:
    model = adapted(num_layers=3)
    inputs = tiny_models.inputs("llama")
    expected = separately(model, inputs)
    model.train()
    same(paired_outputs(model, inputs, [0, 1]), expected)
    assert all(module.training for module in model.modules())


def test_there_must_be_a_base_beside_the_tuned_model() -> None:
    inputs = tiny_models.inputs("llama")
    with pytest.raises(ModelError, match="not wrapped by peft"):
        paired_outputs(tiny_models.build("llama"), inputs, [0])
    model = adapted()
    with pytest.raises(ConfigError, match="layers"):
        paired_outputs(model, inputs, [7])
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        paired_outputs(model, inputs, [0])
