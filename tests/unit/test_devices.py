"""The machine: devices and dtypes with reasons, memory with labels, containers, and models larger than a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny_models
from peftlab import devices
from peftlab.config import ModelSettings
from peftlab.devices import (
    choose_device,
    choose_dtype,
    explain_device,
    explain_dtype,
    report_memory,
    storage_bytes,
)
from peftlab.errors import ConfigError, ModelError
from peftlab.loading import ModelSource, find_model, load_model, meta_model, read_weights
from peftlab.memory.placement import find_room, place_model

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without accelerators, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


def test_the_cpu_where_there_is_nothing_else(machine: pytest.MonkeyPatch) -> None:
    chosen = explain_device("auto")
    assert chosen.device == CPU
    assert chosen.reason.startswith("there is no CUDA and no MPS device")
    machine.setattr(torch.version, "cuda", None)
    assert explain_device("auto").reason.endswith("this torch is built without CUDA")


def test_cuda_then_mps(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert explain_device("auto").device.type == "mps"
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    machine.setenv("LOCAL_RANK", "1")
    chosen = explain_device("auto")
    assert (chosen.device, chosen.reason) == (torch.device("cuda", 1), "CUDA is there: Card 1")
    assert choose_device("auto") == chosen.device


def test_a_named_device_wins_and_must_be_there(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert explain_device("cpu") == devices.DeviceChoice(CPU, "model.device=cpu was asked for")
    with pytest.raises(ConfigError, match="'cuda:1' is not on this machine; use auto or cpu"):
        explain_device("cuda:1")
    with pytest.raises(ConfigError, match="'gpu' is not a device; use auto, cpu, cuda or mps"):
        choose_device("gpu")


@pytest.mark.parametrize(
    ("fast", "dtype", "reason"),
    [
        (True, torch.bfloat16, "the device computes in bfloat16"),
        (False, torch.float32, "the device only emulates bfloat16"),
    ],
)
def test_dtype_by_what_a_cuda_device_is_fast_at(
    fast: bool, dtype: torch.dtype, reason: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    assert explain_dtype("auto", torch.device("cuda")) == devices.DtypeChoice(dtype, reason)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        (
            {"avx512_bf16": True, "amx_bf16": True},
            "has avx512_bf16 and amx_bf16, so model.dtype=bfloat16 may be",
        ),
        ({"avx512_bf16": False}, "the CPU has no bfloat16 instructions"),
    ],
)
def test_the_cpu_keeps_float32_and_says_what_it_has(
    known: dict[str, bool], reason: str, machine: pytest.MonkeyPatch
) -> None:
    machine.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    chosen = explain_dtype("auto", CPU)
    assert chosen.dtype == torch.float32
    assert reason in chosen.reason
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert "asked for" in explain_dtype("float16", CPU).reason


def test_memory_is_labelled() -> None:
    before = report_memory()
    assert 0 < before.process_bytes < before.host_total_bytes
    assert 0 < before.host_available_bytes <= before.host_total_bytes
    held = torch.ones(50 << 20, dtype=torch.uint8)
    assert report_memory().process_bytes - before.process_bytes == pytest.approx(held.nbytes, rel=0.1)
    if not torch.cuda.is_available():
        assert before.device_name is None
        assert before.device_total_bytes is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_less_than_its_host(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    limit, used, cache = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    (folder / limit).write_text("3000\n")
    (folder / used).write_text("2500\n")
    (folder / "memory.stat").write_text(f"anon 2000\n{cache} 400\n")
    read = devices._container_limits
    assert read(tmp_path) == [(3000, 2100)]
    monkeypatch.setattr(devices, "_container_limits", lambda: read(tmp_path))
    report = report_memory()
    assert (report.host_total_bytes, report.host_available_bytes) == (3000, 900)
    (folder / limit).write_text("max\n")
    assert read(tmp_path) == []


def test_storages_are_counted_once() -> None:
    whole = torch.zeros(100)
    assert storage_bytes([whole, whole[:50], whole.view(10, 10), torch.zeros(1)]) == 404


# -- a model larger than a device ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSettings, ModelSource]:
    folder = tiny_models.save_model(tmp_path_factory.mktemp("model"), "llama")
    settings = ModelSettings(name=str(folder), device="cpu")
    return settings, find_model(settings)


def _place(source: ModelSource, **options: Any) -> Any:
    return place_model(meta_model(source), name=source.name, dtype=torch.float32, **options)


def test_what_fits_stays_whole(saved: tuple[ModelSettings, ModelSource]) -> None:
    settings, source = saved
    whole = storage_bytes(load_model(source, settings).parameters())
    placement = place_model(
        meta_model(source), name=source.name, dtype=torch.float32, room={0: 10 * whole, "cpu": 10 * whole}
    )
    assert placement.device_map == {"": 0}
    assert _place(source).weights_bytes.keys() == find_room().keys()


def test_a_model_over_host_and_disk_answers_as_a_whole_one(
    saved: tuple[ModelSettings, ModelSource], tmp_path: Path
) -> None:
    settings, source = saved
    placement = place_model(
        meta_model(source), name=source.name, dtype=torch.float32, room={"cpu": 16_000}, offload="disk"
    )
    assert placement.weights_bytes.keys() == {"cpu", "disk"}
    inputs = tiny_models.inputs("llama")
    with torch.no_grad():
        options = {
            "device_map": placement.device_map,
            "offload_folder": str(tmp_path),
            "dtype": torch.float32,
        }
        model, _ = read_weights(LlamaForCausalLM, source.config, settings, source.location, **options)
        placed = model.eval()(**inputs).logits
        whole = load_model(source, settings)(**inputs).logits
    assert torch.equal(placed, whole)


@pytest.mark.parametrize(
    ("offload", "advice"),
    [("none", "place_model(offload='host' or 'disk')"), ("host", "place_model(offload='disk')")],
)
def test_what_fits_nowhere_is_refused_with_numbers(
    offload: str, advice: str, saved: tuple[ModelSettings, ModelSource]
) -> None:
    settings, source = saved
    weights = storage_bytes([*(model := load_model(source, settings)).parameters(), *model.buffers()])
    with pytest.raises(ModelError) as refused:
        place_model(
            meta_model(source),
            name=source.name,
            dtype=torch.float32,
            room={0: 8_000, "cpu": 2_000},
            offload=offload,
        )  # type: ignore[arg-type]
    said = str(refused.value)
    assert f"take {weights:,} bytes in float32" in said
    assert "cuda:0 8,000, host 2,000" in said
    assert advice in said
    assert "load them in bfloat16" in said


def test_a_dtype_that_is_not_there_is_refused_and_torchs_own_is_taken() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype(torch.bfloat16, cpu) is torch.bfloat16  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"unknown dtype 'flaot32' .*did you mean 'float32'"):
        choose_dtype("flaot32", cpu)
