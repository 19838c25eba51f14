"""What was proved on a twin is looked at once more on the real weights."""

import pytest
import torch

import tiny_models
from peftlab.errors import ModelError
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "mixtral", "opt", "distilbert"])
def test_it_holds_on_models_as_they_are(name):
    model = tiny_models.build(name, 3)
    family = map_model(model)
    found = spot_check(model, family, tiny_models.training_inputs(name))
    assert len([line for line in found if "layers are the hidden states" in line]) == len(family.stacks)
    assert not model._forward_hooks


def _other_states(module, args, output):
    output.hidden_states = tuple(
        2 * state if i == 2 else state for i, state in enumerate(output.hidden_states)
    )


def test_code_changed_after_loading_is_found():
    model = tiny_models.build("llama", 3)
    family = map_model(model)
    model.model.register_forward_hook(_other_states)
    with pytest.raises(ModelError, match=r"output of layer 1 is another tensor \(layers\)"):
        spot_check(model, family, tiny_models.inputs("llama"))


def test_a_changed_head_is_found():
    model = tiny_models.build("gpt2")
    family = map_model(model)
    forward = model.forward

    def softened(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = softened
    with pytest.raises(ModelError, match="the logits are not the head's output"):
        spot_check(model, family, tiny_models.inputs("gpt2"))


def test_half_precision_is_equal_too():
    model = tiny_models.build("llama").to(torch.bfloat16)
    assert len(spot_check(model, map_model(model), tiny_models.inputs("llama"))) == 2
