"""What auto stands for: half precision where the machine is fast at it and the method may; a run remembers it."""

import json

import pytest
import torch
import transformers as T

from peftlab import precision
from peftlab.config import build_config
from peftlab.precision import bfloat16_gain, settle_dtype

WIDE, NARROW = T.LlamaConfig(hidden_size=1024), T.LlamaConfig(hidden_size=128)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_instructions", lambda: ("avx512_bf16",))
    monkeypatch.setattr(precision, "bfloat16_gain", lambda width: 2.0)


def config(**sections):
    return build_config({"model": {"device": "cpu"} | sections.pop("model", {}), **sections})


def test_a_fast_processor_has_a_bfloat16_base(fast):
    settled, choice = settle_dtype(config(), WIDE)
    assert (settled.model.dtype, settled.model.auto_dtype, choice.dtype) == (
        "auto",
        "bfloat16",
        torch.bfloat16,
    )
    assert "0.50 of the time" in choice.reason
    assert settled.fingerprint() == config().fingerprint(), "the same run, whatever the machine"


def test_what_was_chosen_is_kept_on_another_machine(fast, monkeypatch):
    settled, _ = settle_dtype(config(), WIDE)
    monkeypatch.setattr(precision, "bfloat16_instructions", tuple)
    again, choice = settle_dtype(build_config(settled.model_dump(mode="json")), WIDE)
    assert (again, choice.dtype) == (settled, torch.bfloat16)


@pytest.mark.parametrize(
    ("changes", "model", "reason"),
    [
        ({}, NARROW, "at 128 features"),
        ({"method": {"name": "full"}}, WIDE, "full trains tensors of the base"),
        ({"method": {"name": "bitfit"}}, WIDE, "bitfit trains tensors of the base"),
        ({"method": {"name": "lora", "bias": "all"}}, WIDE, "lora trains tensors of the base"),
        ({"method": {"name": "lora", "init": "pissa"}}, WIDE, "lora trains tensors of the base"),
        ({"model": {"dtype": "float32"}}, WIDE, "asked for"),
    ],
)
def test_float32_where_half_precision_has_no_place(fast, changes, model, reason):
    settled, choice = settle_dtype(config(**changes), model)
    assert (settled.model.weights_dtype, choice.dtype) == ("float32", torch.float32)
    assert reason in choice.reason


def test_a_slow_processor_has_float32(fast, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda width: 1.1)
    assert settle_dtype(config(), WIDE)[1].dtype == torch.float32
    monkeypatch.setattr(precision, "bfloat16_instructions", tuple)
    assert "no bfloat16 instructions" in settle_dtype(config(), WIDE)[1].reason


def test_the_measurement_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path))
    bfloat16_gain.cache_clear()
    (tmp_path / "speed.json").write_text("damaged")
    gain = bfloat16_gain(64)
    assert gain > 0
    (kept,) = json.loads((tmp_path / "speed.json").read_text()).values()
    assert kept == gain
    bfloat16_gain.cache_clear()
    monkeypatch.setattr(precision, "_measure", None)
    assert bfloat16_gain(64) == gain
    bfloat16_gain.cache_clear()
