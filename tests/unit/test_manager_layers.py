"""The layers of the efficient fine-tuning document by themselves, in places of all kinds, and shared."""

import doctest

import pytest
import torch
from encoder_models import awaken, encoder, ids
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import peftlab
import tiny_models
from peftlab import manager as manager_module
from peftlab import method_guide
from peftlab.cli import make_parser
from peftlab.commands.flags import read_flags
from peftlab.commands.listing import list_kind
from peftlab.commands.parsing import given_flags
from peftlab.commands.sources import config_from, read_assignment
from peftlab.efficient import embeddings, layers
from peftlab.efficient.weights import adapter_tensors
from peftlab.errors import MethodError, UnknownNameError
from peftlab.manager import AdaLoRALayer, EfficientFineTuningManager, LoRALayer, LoRALinear


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_layer_by_itself_is_the_update():
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    made = LoRALayer(input_dimension=8, output_dimension=4, rank=2, alpha=3.0, bias=True).double().eval()
    assert made(x).shape == (2, 5, 4)
    assert not made(x).any()
    a, b = made.lora_A["default"].weight, made.lora_B["default"]
    nn.init.normal_(b.weight)
    nn.init.normal_(b.bias)
    torch.testing.assert_close(made(x), 1.5 * (x @ a.T @ b.weight.T + b.bias))
    assert sum(p.numel() for p in made.parameters()) == 2 * (8 + 4) + 4
    made = AdaLoRALayer(input_dimension=8, output_dimension=4, rank=2, alpha=3.0).double().eval()
    assert not made(x).any()
    assert made.get_effective_rank() == 0
    nn.init.normal_(made.lora_E["default"])
    assert made.get_effective_rank() == 2
    p, values, q = (getattr(made, f"lora_{part}")["default"] for part in "BEA")
    torch.testing.assert_close(made(x), 3 / (2 + 1e-5) * (x @ q.T * values.T) @ p.T)
    assert {p.requires_grad for n, p in made.named_parameters() if "ranknum" not in n} == {True}


def test_linear_layers_of_transformers_are_adapted_too():
    layer = tiny_models.randomise(Conv1D(6, 4))
    made = LoRALinear(layer, rank=2, alpha=4.0, dropout_probability=0.0)
    assert made.original_layer is layer
    assert not layer.weight.requires_grad
    nn.init.normal_(made.lora_B["default"].weight)
    x = torch.randn(3, 4)
    update = (made.lora_B["default"].weight @ made.lora_A["default"].weight).T
    torch.testing.assert_close(made(x), x @ (layer.weight + 2 * update) + layer.bias)
    model = tiny_models.build("gpt2")
    before = model(**tiny_models.inputs("gpt2")).logits
    manager = awaken(peftlab.apply_lora_to_model(model, ["c_attn", "mlp.c_proj"]))
    assert list(manager.lora_layers) == [
        f"transformer.h.{i}.{n}" for i in (0, 1) for n in ("attn.c_attn", "mlp.c_proj")
    ]
    adapted_logits = model(**tiny_models.inputs("gpt2")).logits
    manager.merge()
    merged = model(**tiny_models.inputs("gpt2")).logits
    torch.testing.assert_close(merged, adapted_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, before)


def test_adapters_of_a_half_precision_base_train_in_full():
    model = encoder(dtype=torch.bfloat16)
    manager = EfficientFineTuningManager(model)
    manager.apply_lora(["linear1", "out_proj"], dropout_probability=0.0)
    manager.apply_adalora(["linear2"], dropout_probability=0.0)
    assert {p.dtype for p in manager.get_trainable_parameters()} == {torch.float32}
    awaken(manager)
    output = model.train()(ids())
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in manager.get_trainable_parameters())


def test_a_layer_in_two_places_has_one_adapter():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    manager = peftlab.apply_lora_to_model(model, ["0", "2"], rank=2)
    assert model[0] is model[2]
    assert manager.count_trainable_parameters() == 16
    manager.remove()
    assert model[0] is model[2] is shared


def test_one_lora_shared_by_layers_is_counted_once():
    model, base = encoder(2), encoder(2)
    shared = LoRALayer(16, 16, rank=2, alpha=8.0, dropout_probability=0.0).double()
    manager = EfficientFineTuningManager(model)
    manager.apply_shared_lora(["self_attn.out_proj"], shared)
    assert len(manager.lora_layers) == 2
    assert manager.count_trainable_parameters() == 2 * (16 + 16)
    assert [id(p) for p in manager.get_trainable_parameters()] == [id(p) for p in shared.parameters()]
    awaken(manager)
    update = 4 * shared.lora_B["default"].weight @ shared.lora_A["default"].weight
    weights = {f"{path}.weight": base.get_submodule(path).weight + update for path in manager.lora_layers}
    torch.testing.assert_close(model(ids()), functional_call(base, weights, (ids(),)))
    model(ids()).square().mean().backward()
    assert all(p.grad.any() for p in shared.parameters())
    manager.remove()
    with pytest.raises(MethodError, match=r"it has \(16, 16\), this layer \(24, 16\)"):
        manager.apply_shared_lora(["linear2"], shared)
    for layer in model.transformer.layers:  # by hand, as the document has it
        layer.lora_layer = shared
    assert manager.count_trainable_parameters() == 2 * (16 + 16)
    assert list(adapter_tensors(model)) == [
        f"transformer.layers.0.lora_layer.lora_{part}.weight" for part in "AB"
    ]


@pytest.mark.parametrize(
    "module", [layers, embeddings, method_guide, manager_module], ids=lambda m: m.__name__
)
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_the_guide_knows_its_tasks():
    assert peftlab.recommend("generation").settings == {"prefix_length": 20}
    with pytest.raises(UnknownNameError, match="did you mean 'general'"):
        peftlab.recommend("generell")


@pytest.mark.parametrize("task_type", method_guide.TASK_TYPES)
def test_the_guide_is_listed_with_commands_that_run(task_type):
    """Each command is understood, and is the advice that the manager gets."""
    advice = peftlab.recommend(task_type)
    assert advice.command in list_kind("guide")
    words = advice.command.split()
    assert words[:2] == ["peftlab", "run"]
    asked_for = make_parser("run").read(words[2:])
    assignments = [read_assignment(text) for text in asked_for.assignments]
    adapter = config_from(assignments=assignments + read_flags(given_flags(asked_for))).adapters[0]
    asked = {"rank": "rank", "alpha": "alpha", "adaptive_rank": "adaptive_rank"}
    asked |= {"num_virtual_tokens": "num_virtual_tokens", "prefix_length": "num_virtual_tokens"}
    if advice.method == "adalora":
        asked["rank"] = "target_rank"
    assert adapter.method == advice.name
    assert advice.method in ("lora", "ptuning", "adalora", "prefix"), "the document's own spelling"
    assert all(adapter.settings[asked[name]] == value for name, value in advice.settings.items())
