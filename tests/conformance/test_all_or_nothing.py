"""What fails changes nothing: attaching, loading; what has ended says so; new modules have the base's mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import tiny_models
from peftlab import EfficientFineTuningManager
from peftlab.attaching.towers import attach_adapters
from peftlab.catalog import METHODS
from peftlab.config import AdapterSettings
from peftlab.errors import CheckpointError, MethodError
from peftlab.mapping import map_model
from peftlab.mapping.twin import build_twin, twin_config
from peftlab.proof import fingerprint

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "peft": {"type": "loha"},
    "p_tuning": {"num_virtual_tokens": 2},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
}


def attach(method: str, model: Any, head: Any = "causal", **settings: Any) -> Any:
    leaf = METHODS.load(method)
    given = SETTINGS.get(method, {}) | settings
    return leaf.attach(model, map_model(model), leaf.Settings(**given), head=head, seed=0)


def state(model: Any) -> list[Any]:
    tensors = [(name, fingerprint(p), p.requires_grad) for name, p in model.named_parameters()]
    return [*tensors, [(path, id(module), module.training) for path, module in model.named_modules()]]


FAILING: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "biases of a model without": ("t5", "lora", "seq2seq", {"bias": "all"}),
    "biases in half precision": ("gpt2", "lora", "causal", {"bias": "all"}),
    "a target that is not there": ("llama", "lora", "causal", {"targets": "mlp.gat"}),
    "a type without a place": ("gpt2", "peft", "causal", {}),
    "a block without a place": ("bert", "new_layer", "classification", {"stack": "decoder"}),
}


@pytest.mark.parametrize("case", FAILING)
def test_attaching_that_fails_leaves_the_base_as_it_was(case: str) -> None:
    name, method, head, settings = FAILING[case]
    base = tiny_models.build(name)
    base = base.bfloat16() if "half" in case else base
    before = state(base)
    with pytest.raises((MethodError, ValueError)):
        attach(method, base, head, **settings)
    assert state(base) == before
    attach("lora", base, head)  # and it is free


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS.names())
def test_new_modules_have_the_mode_of_the_base(method: str, training: bool) -> None:
    base = tiny_models.build("llama").train(training)
    attached = attach(method, base)
    assert {module.training for module in attached.model.modules()} == {training}


@pytest.mark.parametrize("method", ["lora", "adalora", "bitfit", "full", "ia3", "new_layer"])
def test_what_has_ended_neither_saves_nor_loads(method: str, tmp_path: Path) -> None:
    for end in ("remove", "merge"):
        attached = attach(method, tiny_models.build("llama"))
        tensors = attached.tensors()
        getattr(attached, end)()
        with pytest.raises(MethodError, match=r"has been (merged|removed)"):
            attached.tensors()
        with pytest.raises(MethodError, match=r"has been (merged|removed)"):
            attached.save(tmp_path)
        with pytest.raises(MethodError, match=r"has been (merged|removed)"):
            attached.load(tensors)


def test_tensors_of_another_scale_are_refused(tmp_path: Path) -> None:
    attach("lora", tiny_models.build("llama"), alpha=16).save(tmp_path)
    for settings in ({"alpha": 99}, {"alpha": 16, "use_rslora": True}):
        with pytest.raises(CheckpointError, match=r"was saved with (lora_alpha 16|use_rslora False)"):
            attach("lora", tiny_models.build("llama"), **settings).load_saved(tmp_path)


@pytest.mark.parametrize("method", ["lora", "adalora", "new_layer", "hybrid", "bitfit"])
def test_damaged_files_are_checkpoint_errors(method: str, tmp_path: Path) -> None:
    attach(method, tiny_models.build("llama")).save(tmp_path)
    attached = attach(method, tiny_models.build("llama"))
    before = attached.tensors()
    for file in sorted(tmp_path.glob("*.safetensors")):
        whole = file.read_bytes()
        for damaged in (b"", whole[:20]):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                attached.load_saved(tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError):
            attached.load_saved(tmp_path)
        file.write_bytes(whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in attached.tensors().items())


def test_towers_load_all_or_none() -> None:
    adapters = [
        AdapterSettings(scope=scope, method="lora", settings={"rank": 2}) for scope in ("encoder", "decoder")
    ]
    base = tiny_models.build("t5")
    attached = attach_adapters(base, map_model(base), adapters, head="seq2seq", seed=0)
    before = attached.tensors()
    changed = {name: tensor + 1 for name, tensor in before.items()}
    last = list(changed)[-1]
    changed[last] = changed[last][:1]
    with pytest.raises(CheckpointError, match=r"of another shape"):
        attached.load(changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in attached.tensors().items())


def test_towers_of_a_classifier_train_its_head_once(tmp_path: Path) -> None:
    base = tiny_models.build("bert")
    scopes = ("bert.encoder.layer.0", "bert.encoder.layer.1")
    adapters = [AdapterSettings(scope=scope, method="lora", settings={"rank": 2}) for scope in scopes]
    attached = attach_adapters(base, map_model(base), adapters, head="classification", seed=0)
    names = list(attached.parameters())
    assert sum("classifier" in name for name in names) == 2
    attached.model(**tiny_models.training_inputs("bert")).loss.backward()
    assert all(p.grad is not None for p in attached.parameters().values())
    attached.save(tmp_path)
    fresh = tiny_models.build("bert")
    again = attach_adapters(fresh, map_model(fresh), adapters, head="classification", seed=1)
    again.load_saved(tmp_path)
    assert all(torch.equal(tensor, attached.tensors()[name]) for name, tensor in again.tensors().items())
    assert attached.remove() is base


def test_two_towers_with_experts_are_refused() -> None:
    base = tiny_models.build("mixtral")
    adapters = [
        AdapterSettings(scope=f"model.layers.{i}", method="lora", settings={"targets": "both"})
        for i in range(2)
    ]
    before = state(base)
    with pytest.raises(MethodError, match=r"puts one adapter of a model on experts"):
        attach_adapters(base, map_model(base), adapters, head="causal", seed=0)
    assert state(base) == before


def test_the_manager_and_methods_know_of_each_other() -> None:
    base = tiny_models.build("llama")
    manager = EfficientFineTuningManager(base)
    manager.apply_lora(["q_proj"], rank=2)
    for method in ("full", "lora"):
        with pytest.raises(MethodError, match=r"has an adapter already"):
            attach(method, base)
    with pytest.raises(MethodError, match=r"has an adapter already"):
        EfficientFineTuningManager(base).apply_lora(["v_proj"], rank=2)
    with pytest.raises(MethodError, match=r"has an adapter already"):
        attach("bitfit", base.model)
    manager.remove()
    attached = attach("bitfit", base)
    with pytest.raises(MethodError, match=r"has an adapter already"):
        EfficientFineTuningManager(base).apply_lora(["q_proj"], rank=2)
    attached.remove()
    EfficientFineTuningManager(base).apply_lora(["q_proj"], rank=2)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_head_of_several_layers_is_copied_once(method: str) -> None:
    """RoBERTa's head holds an out_proj that `targets: all` names too."""
    base = build_twin(T.RobertaForSequenceClassification, twin_config(T.RobertaConfig(num_labels=3)))
    before = [(name, id(p), fingerprint(p)) for name, p in base.named_parameters()]
    attached = attach(method, base, "classification", targets="all")
    heads = [name for name in attached.parameters() if "classifier" in name]
    assert len(heads) == 4
    assert attached.remove() is base
    assert [(name, id(p), fingerprint(p)) for name, p in base.named_parameters()] == before
