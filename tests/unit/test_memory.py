"""The memory of a training step: predicted without data, held against the real step under torch's profiler."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from memory_cases import ALLOWED, CONFIGS, Whole, make_config, measure, measure_run

from peftlab.catalog import METHODS
from peftlab.errors import ConfigError, ModelError
from peftlab.memory.fitting import plan_memory
from peftlab.memory.kernels import scratch_bytes
from peftlab.memory.peaks import measured_peak
from peftlab.memory.prediction import predict_memory
from peftlab.memory.steps import BatchShape

pytestmark = pytest.mark.usefixtures("quick_collection")


@pytest.mark.parametrize(
    ("name", "whole", "dtype", "checkpointing", "rows", "length"),
    [
        ("llama", False, "bfloat16", False, 3, 200),
        ("llama", True, "auto", True, 1, 1024),
        ("gpt2", False, "auto", True, 2, 256),
        ("gpt2", True, "bfloat16", False, 2, 96),
        ("bert", False, "bfloat16", True, 3, 128),
        ("deberta", False, "auto", False, 3, 100),
        ("deberta", True, "auto", True, 1, 64),
        ("t5", False, "auto", False, 2, 128),
        ("t5", True, "bfloat16", True, 2, 64),
        ("bart", False, "auto", False, 3, 100),
        ("mixtral", False, "auto", False, 2, 100),
    ],
)
def test_prediction_equals_the_profiler(
    name: str, whole: bool, dtype: str, checkpointing: bool, rows: int, length: int, tmp_path: Path
) -> None:
    config = make_config(tmp_path, name, model={"dtype": dtype, "gradient_checkpointing": checkpointing})
    shape, attach = BatchShape(rows, length, length), Whole if whole else None
    predicted = predict_memory(config, shape=shape, attach=attach)
    measured = measure(config, shape, attach)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=ALLOWED)
    assert predicted.parts["weights"] == measured.weights_bytes
    assert sum(predicted.parts.values()) == predicted.peak_bytes


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_is_predicted(method: str, tmp_path: Path) -> None:
    base, dtype = {"full": ("llama", "auto"), "bitfit": ("gpt2", "auto")}.get(method, ("llama", "bfloat16"))
    config = make_config(tmp_path, base, model={"dtype": dtype}, method={"name": method})
    shape = BatchShape(4, 64, 64)
    predicted = predict_memory(config, shape=shape)
    assert predicted.peak_bytes == pytest.approx(measure(config, shape).peak_bytes, rel=ALLOWED)


@pytest.mark.parametrize(
    ("training", "attach", "length"),
    [
        ({"accumulation_steps": 3}, None, 48),  # little beside weights, gradients, copies and moments
        (
            {"warmup_steps": 2},
            Whole,
            240,
        ),  # the proof's copies stand beside activations, since step 1 moves nothing
        ({"max_steps": 9, "accumulation_steps": 2, "warmup_steps": 4}, None, 48),
    ],
)
def test_a_whole_run_takes_what_its_first_steps_take(
    training: dict[str, Any], attach: Any, length: int, tmp_path: Path
) -> None:
    phases = {"strategy": "attn->mlp->both"} if "max_steps" in training else {}
    values = {"batch_size": 1, "learning_rate": 0.03} | training
    config = make_config(tmp_path, "small", training=values, schedule=phases, method={"targets": "all"})
    shape = BatchShape(1, length, length)
    predicted = predict_memory(config, shape=shape, attach=attach)
    measured = measure_run(config, shape, tmp_path, attach)
    assert predicted.peak_bytes == pytest.approx(measured, rel=ALLOWED)


def test_parts_of_full_fine_tuning(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama")
    short = predict_memory(config, shape=BatchShape(1, 8, 8), attach=Whole)
    weights = sum(p.numel() for p in T.LlamaForCausalLM(CONFIGS["llama"]()).parameters()) * 4
    assert short.moment == "optimizer step"
    assert short.parts["gradients"] == weights
    assert short.parts["copies"] == pytest.approx(weights, rel=1e-3)  # the proof's, and the batch
    assert short.parts["optimizer state"] == pytest.approx(
        2 * weights, rel=1e-3
    )  # and a count for each tensor
    long = predict_memory(config, shape=BatchShape(8, 256, 256), attach=Whole)
    assert long.moment == "backward pass"
    assert long.parts["activations"] > 0.5 * long.peak_bytes


def test_prediction_leaves_random_streams_and_the_trainer_alone(tmp_path: Path) -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    predict_memory(make_config(tmp_path, "bert"))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert [path.name for path in (tmp_path / "bert").iterdir()] == ["config.json"]
    assert torch.ones(2).sum().item() == 2, "tensors have data again"


def test_a_config_that_cannot_be_built(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama")
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values | {"hidden_act": "no such"}))
    with pytest.raises(ModelError, match=r"no model can be built of the config of .* \(llama\).*no such"):
        predict_memory(config)


def test_rows_beyond_the_positions(tmp_path: Path) -> None:
    config = make_config(tmp_path, "gpt2")
    with pytest.raises(
        ConfigError,
        match=r"task.max_length 1025 is longer than the 1024 positions of .*; set --max_length to 1024",
    ):
        predict_memory(config, shape=BatchShape(1, 1025, 1025))


def test_checkpointing_saves_in_training(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", training={"batch_size": 8})
    checkpointed = config.model_copy(
        update={"model": config.model.model_copy(update={"gradient_checkpointing": True})}
    )
    without, with_it = predict_memory(config), predict_memory(checkpointed)
    assert (without.checkpointing, with_it.checkpointing) == (False, True)
    weights = without.parts["weights"]
    assert with_it.parts["weights"] == weights
    assert 0.1 < (with_it.peak_bytes - weights) / (without.peak_bytes - weights) < 0.7


# -- scratch memory of kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True])
def test_scratch_of_mixed_dtypes(in_place: bool) -> None:
    half, single = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(64, 1024)
    func = torch.ops.aten.add_.Tensor if in_place else torch.ops.aten.add.Tensor
    func(half, single)
    with measured_peak(torch.device("cpu")) as found:
        func(half, single)
    result = 0 if in_place else single.nbytes
    assert scratch_bytes(func, (half, single), "cpu") == found[0] - result
    assert scratch_bytes(func, (half, single), "cuda") == 0
    assert scratch_bytes(func, (single, single), "cpu") == 0


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 300), (torch.bfloat16, 800)])
def test_scratch_of_attention(dtype: torch.dtype, length: int) -> None:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    query = torch.randn(1, 2, length, 16, dtype=dtype)
    with measured_peak(torch.device("cpu")) as found:
        output, logsumexp = forward(query, query, query, 0.0, True)
    expected = scratch_bytes(forward, (query, query, query), "cpu")
    assert found[0] == expected + output.nbytes + logsumexp.nbytes
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    with measured_peak(torch.device("cpu")) as found:
        backward(query, query, query, query, output, logsumexp, 0.0, True)
    expected = scratch_bytes(backward, (query, query, query), "cpu")
    assert found[0] - 3 * query.nbytes == pytest.approx(
        expected, rel=0.35
    )  # packed blocks where the CPU has bf16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_can_be_planned_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, "gpt2", model={"device": "cuda"})
    predicted = predict_memory(config)
    assert (predicted.device, predicted.dtype) == ("cuda", "bfloat16")
    here = make_config(tmp_path, "gpt2", model={"dtype": "bfloat16"})
    assert predicted.peak_bytes < predict_memory(here).peak_bytes  # CUDA's attention fuses dropout
    with pytest.raises(ConfigError, match="--memory 24GB"):
        plan_memory(config)
