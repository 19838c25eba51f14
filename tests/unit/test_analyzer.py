"""Several models behind one interface: what it tells, measures and compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from peftlab import universal_adapter
from peftlab.analyzer import MultiModelAnalyzer
from peftlab.errors import ConfigError, DataError, ModelError, UnknownNameError
from peftlab.loading import switch_checkpointing
from peftlab.mapping import map_model
from peftlab.memory.checkpointing import MemoryOptimization, measure_checkpointing

TEXTS = ["the cat sits on the red mat", "dog runs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models, by architecture."""
    root = tmp_path_factory.mktemp("models")
    return {name: str(tiny_models.save_model(root / name, name)) for name in ("gpt2", "bert", "t5")}


def test_models_are_loaded_once_and_when_they_are_needed(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    adapter = analyzer.load_model(folders["gpt2"], device="cpu")
    assert analyzer.load_model(folders["gpt2"]) is adapter
    found = analyzer.extract_activations(folders["gpt2"], TEXTS, [0, 1], pooling="mean")
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(
        ("layer_0", "layer_1"), (2, 16)
    )
    assert list(analyzer.extract_activations(folders["bert"], TEXTS, [1])) == ["layer_1"]
    patterns = analyzer.get_attention_patterns(folders["t5"], TEXTS, [1], kind="cross", decoder_texts=TEXTS)
    assert patterns.kind == "cross"


def test_model_info(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    told = analyzer.get_model_info(folders["bert"])
    assert told["loaded"] is False
    assert (told["family"], told["families"], told["num_layers"]) == ("bert", ["bert"], 2)
    assert told["layer_mapping"]["transformer_layers"] == "bert.encoder.layer"
    assert not told["uses_rms_norm"]
    analyzer.load_model(folders["bert"], device="cpu")
    told = analyzer.get_model_info(folders["bert"])
    assert (told["loaded"], told["device"], told["dtype"]) == (True, "cpu", "torch.float32")
    assert 0 < told["word_alignment"] <= 1
    json.dumps(told)


def test_memory_usage_has_the_documents_keys_and_honest_numbers(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    before = analyzer.get_memory_usage()
    assert {
        "system_memory_gb",
        "system_memory_percent",
        "gpu_memory_gb",
        "gpu_memory_percent",
    } <= before.keys()
    assert 0 < before["process_memory_gb"] < before["system_memory_total_gb"]
    assert 0 < before["system_memory_gb"] < before["system_memory_total_gb"]
    if not torch.cuda.is_available():
        assert before["gpu_memory_gb"] == before["gpu_memory_total_gb"] == 0
    assert before["models_gb"] == 0
    model = analyzer.load_model(folders["gpt2"], device="cpu").model
    held = sum(p.numel() * p.element_size() for p in model.parameters())  # the tied head once
    assert analyzer.get_memory_usage()["models_gb"] == pytest.approx(held / 2**30)


def test_comparison(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    analyzer.load_model(folders["gpt2"], device="cpu")
    table = analyzer.compare_models([folders["gpt2"], folders["bert"]], TEXTS)
    first, second = table.rows
    assert (first["family"], second["family"]) == ("gpt", "bert")
    assert first["looked_at"] == [0, 1]
    assert first["load_seconds"] is None  # it was there
    assert second["load_seconds"] > 0
    assert first["activation_values"] == second["activation_values"] == 2 * 11 * 16
    assert first["activation_seconds"] > 0
    assert first["weights_gb"] > 0
    lines = str(table).splitlines()
    assert len(lines) == 3
    assert "activation_seconds" in lines[0]
    with pytest.raises(DataError, match="no models to compare"):
        analyzer.compare_models([], TEXTS)


def test_supported_models_are_the_registrys() -> None:
    analyzer = MultiModelAnalyzer()
    analyzer.registry.register("mine", "someone/mine")
    assert {"gpt2", "flan-t5-base", "mine"} <= set(analyzer.list_supported_models())
    with pytest.raises(ModelError, match=r"no model 'mine' \(someone/mine on the hub\)"):
        analyzer.load_model("mine")


def test_unloading_is_proved(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    adapter = analyzer.load_model(folders["gpt2"], device="cpu")
    report = analyzer.unload_model(folders["gpt2"])
    assert report.died, report
    assert adapter.model is None
    assert analyzer.get_memory_usage()["models_gb"] == 0
    assert analyzer.get_model_info(folders["gpt2"])["loaded"] is False
    with pytest.raises(ModelError, match="is not loaded: call load_model first"):
        adapter.extract_activations(TEXTS, [0])
    with pytest.raises(UnknownNameError, match="unknown loaded model"):
        analyzer.unload_model(folders["gpt2"])
    assert analyzer.load_model(folders["gpt2"]) is adapter  # and back again
    assert list(adapter.extract_activations(TEXTS, [0])) == ["layer_0"]
    kept_model = adapter.model
    report = analyzer.unload_model(folders["gpt2"])
    assert not report.died
    assert "kept_model" in " ".join(report.holders)
    del kept_model


def test_the_least_recently_used_model_leaves(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer(limit_models=2)
    for name in ("gpt2", "bert"):
        analyzer.load_model(folders[name], device="cpu")
    analyzer.extract_activations(folders["gpt2"], TEXTS, [0])
    analyzer.load_model(folders["t5"], device="cpu")
    assert list(analyzer.cache) == [folders["gpt2"], folders["t5"]]
    assert [report.died for report in analyzer.cache.evicted] == [True]
    assert list(analyzer.extract_activations(folders["bert"], TEXTS, [0])) == ["layer_0"]  # loaded again
    assert folders["gpt2"] not in analyzer.cache
    with pytest.raises(ModelError, match="raise its limit"):
        MultiModelAnalyzer(limit_gb=1e-6).load_model(folders["gpt2"])


def test_another_dtype_loads_anew(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    adapter = analyzer.load_model(folders["gpt2"], device="cpu")
    assert analyzer.load_model(folders["gpt2"], device="cpu", dtype="bfloat16") is adapter
    assert adapter.model.dtype == torch.bfloat16
    assert analyzer.load_model(folders["gpt2"]).model.dtype == torch.bfloat16
    assert len(analyzer.cache) == 1


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"device": "tpu"}])
def test_what_is_not_there_is_refused_also_of_a_loaded_model(
    folders: dict[str, str], wrong: dict[str, str]
) -> None:
    analyzer = MultiModelAnalyzer()
    for _ in range(2):
        with pytest.raises(ConfigError, match=next(iter(wrong.values()))):
            analyzer.load_model(folders["gpt2"], **wrong)
        analyzer.load_model(folders["gpt2"], device="cpu")
    assert len(analyzer.cache) == 1


def test_long_texts_are_refused_or_cut_everywhere(folders: dict[str, str]) -> None:
    analyzer, texts = MultiModelAnalyzer(), ["the " * 64]
    name = folders["gpt2"]
    for look in (
        lambda **cut: analyzer.extract_activations(name, iter(texts), [0], **cut),
        lambda **cut: analyzer.get_attention_patterns(name, iter(texts), [0], **cut),
        lambda **cut: analyzer.optimize_memory(name, iter(texts), **cut),
        lambda **cut: analyzer.compare_models([name, name], iter(texts), **cut),
        lambda **cut: analyzer.load_model(name).norm_statistics(iter(texts), **cut),
    ):
        with pytest.raises(DataError, match=r"text 0 has 65 tokens, the model reads 64: give max_length=64"):
            look()
        assert look(max_length=64)
    with pytest.raises(DataError, match=r"texts\[0\] is 'None'"):
        analyzer.optimize_memory(name, [None])


def test_a_comparison_goes_on_with_what_is_not_proved_only_by_name(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    adapter = analyzer.load_model(folders["gpt2"])
    adapter._family = replace(adapter.family, proofs={})
    with pytest.raises(ModelError, match="not proved to be its hidden states: no certificate"):
        analyzer.compare_models([folders["gpt2"]], TEXTS)
    assert analyzer.compare_models([folders["gpt2"]], TEXTS, unproven=True).rows


def test_a_model_comes_back_as_it_was_asked_for(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer(limit_models=1)
    analyzer.load_model(folders["gpt2"], device="cpu", dtype="float64")
    analyzer.load_model(folders["t5"])
    assert folders["gpt2"] not in analyzer.cache
    found = analyzer.extract_activations(folders["gpt2"], TEXTS, [0])
    assert analyzer.get_model_info(folders["gpt2"])["dtype"] == "torch.float64"
    assert found["layer_0"].dtype == torch.float64


def test_one_model_under_two_names_is_loaded_once(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    other = (
        f"{Path(folders['gpt2']).parent}/../{Path(folders['gpt2']).parent.name}/{Path(folders['gpt2']).name}"
    )
    assert analyzer.load_model(folders["gpt2"]) is analyzer.load_model(other)
    assert len(analyzer.cache) == 1
    assert analyzer.unload_model(other).died


def test_a_limit_that_leaves_room_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit_models is 0"):
        MultiModelAnalyzer(limit_models=0)


def test_weights_without_room_are_refused(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(universal_adapter, "find_room", lambda offload="none": {"cpu": 100})
    with pytest.raises(
        ModelError, match=r"take 34,560 bytes in float32 .* room: host 100; .* load them in bfloat16"
    ):
        MultiModelAnalyzer().load_model(folders["gpt2"])


def test_checkpointing_is_measured_not_claimed(folders: dict[str, str]) -> None:
    analyzer = MultiModelAnalyzer()
    asked = analyzer.optimize_memory(folders["gpt2"])
    assert asked == MemoryOptimization(gradient_checkpointing=True)
    assert "was not measured" in str(asked)
    model = analyzer.load_model(folders["gpt2"]).model
    assert model.is_gradient_checkpointing
    measured = analyzer.optimize_memory(folders["t5"], TEXTS)
    assert measured.training_saved is not None
    assert measured.inference_saved == 0
    assert "2 given texts, cpu, float32" in str(measured)


def test_what_checkpointing_saves_is_what_a_training_step_takes_less() -> None:
    model = tiny_models.build("llama", 6)
    inputs = tiny_models.inputs("llama", batch=4, length=32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    measured = measure_checkpointing(model, map_model(model), inputs, words="random tokens")
    assert measured.inference_bytes == measured.inference_bytes_checkpointed
    assert measured.training_bytes is not None
    assert measured.training_bytes_checkpointed is not None
    assert measured.training_saved is not None
    assert 0.3 < measured.training_saved < 0.9
    # six blocks keep their activations, or only what goes in: the difference grows with the depth
    deeper = tiny_models.build("llama", 12)
    more = measure_checkpointing(deeper, map_model(deeper), inputs, words="random tokens")
    assert more.training_bytes is not None
    assert more.training_bytes > 1.6 * measured.training_bytes
    assert more.training_saved is not None
    assert more.training_saved > measured.training_saved
    for name, parameter in model.named_parameters():  # nothing is left behind
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_measuring_leaves_statistics_streams_and_the_switch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_models.build("llama")
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Flatten(0, 1), torch.nn.BatchNorm1d(16))
    model.model.norm.append(torch.nn.Unflatten(0, (2, 8)))
    model.eval()
    family = map_model(tiny_models.build("llama"))
    inputs = tiny_models.inputs("llama")
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    measure_checkpointing(model, family, inputs, words="random tokens")
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), stream)
    switch_checkpointing(model, False)
    monkeypatch.setattr(torch.autograd, "backward", lambda *_: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        measure_checkpointing(model, family, inputs, words="random tokens")
    assert not model.is_gradient_checkpointing


def test_a_model_without_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_models.build("llama")
    monkeypatch.setattr(model, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="has no gradient checkpointing"):
        switch_checkpointing(model, True)
