"""DeviceManager: the best device, or the wanted one; a fall-back that says so; dtype, seeds, memory."""

import json
import random

import numpy as np
import pytest
import torch
from extension_models import FACES, config, create, logits, state_of, train, unchanged

import tiny_models
from peftlab import devices
from peftlab.errors import ConfigError
from peftlab.extensions import device_manager
from peftlab.extensions.device_manager import DeviceManager


@pytest.fixture
def with_cuda(monkeypatch):
    """A machine that says it has two CUDA devices that compute in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def without_any(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_cuda_then_mps_then_cpu(monkeypatch, with_cuda):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert DeviceManager().device == torch.device("cuda:0")
    assert (
        DeviceManager().torch_dtype == torch.bfloat16
    )  # the document says float16, which overflows in training
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert DeviceManager().device == torch.device("mps")
    assert DeviceManager().torch_dtype == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert DeviceManager().device == torch.device("cpu")
    assert DeviceManager("auto").torch_dtype == torch.float32


def test_a_wanted_device_is_taken(with_cuda):
    for name in ("cuda", "cuda:1", "cpu", torch.device("cpu")):
        made = DeviceManager(name)
        assert made.device == torch.device(name)
        assert made.reason == f"preferred_device={name} was asked for"


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_one_that_is_not_there_is_replaced_aloud(without_any, name):
    with pytest.warns(UserWarning, match=rf"preferred_device '{name}' is not there .*: cpu is used instead"):
        made = DeviceManager(name)
    assert made.device == torch.device("cpu")
    assert "is not there" in made.get_device_info()["reason"]
    assert made.preferred_device == name


def test_a_number_that_is_not_there_is_replaced_aloud(with_cuda):
    with pytest.warns(
        UserWarning, match=r"'cuda:7' is not there \(there are 2 CUDA devices\): cuda:0 is used"
    ):
        assert DeviceManager("cuda:7").device == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["tpu", "meta", "", "cuda:x", "xpu"])
def test_a_name_of_no_device_is_an_error(name):
    if not name:
        assert DeviceManager(name).device.type in ("cuda", "mps", "cpu")
        return
    with pytest.raises(ConfigError, match=rf"preferred_device '{name}' is not a device"):
        DeviceManager(name)


def test_information_is_what_the_house_decides_and_is_plain(without_any):
    found = DeviceManager().get_device_info()
    assert found["device"] == str(devices.choose_device("auto"))
    assert found["torch_dtype"] == str(devices.choose_dtype("auto", torch.device("cpu")))
    assert found["reason"] == devices.explain_device("auto").reason
    assert found["memory"]["process_bytes"] > 1_000_000
    assert json.loads(json.dumps(found)) == found


def test_a_model_is_moved_in_the_devices_dtype(without_any):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
    made = DeviceManager()
    assert not made.fits(model)
    assert made.optimize_for_device(model) is model
    assert made.fits(model)
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_no_room_on_the_device_means_the_cpu_aloud(with_cuda):
    class Large(torch.nn.Linear):
        def to(self, *, device, dtype):
            if device.type == "cuda":
                raise torch.OutOfMemoryError("no more memory\nand more")
            return super().to(device=device, dtype=dtype)

    made = DeviceManager()
    made.clear_cache = lambda: None
    with pytest.warns(UserWarning, match="no room on cuda:0, so it is on the CPU: no more memory$"):
        made.optimize_for_device(Large(2, 2))
    assert (made.device, made.reason) == (torch.device("cpu"), "the model had no room on cuda:0")


def test_seeds_of_all_three_libraries():
    made, found = DeviceManager("cpu"), []
    for _ in range(2):
        made.set_seed(7)
        found.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert found[0] == found[1]
    for seed in (-1, 2**32, 1.5, True):
        with pytest.raises(ConfigError, match="seed must be"):
            made.set_seed(seed)


def test_caches_of_what_is_there_are_cleared(monkeypatch, without_any):
    cleared = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: cleared.append("mps"))
    monkeypatch.setattr(device_manager.gc, "collect", lambda: cleared.append("python"))
    DeviceManager().clear_cache()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    DeviceManager("cpu").clear_cache()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    DeviceManager("cpu").clear_cache()
    assert cleared == ["python", "python", "mps", "python", "cuda"]


@pytest.mark.parametrize("kind", FACES)
def test_an_extension_moves_one_copy_for_all_tasks_and_not_the_base(kind, tmp_path):
    """A float64 base: the CPU's dtype is float32, so the extension keeps one copy that the models share."""
    base = tiny_models.build("gpt2").double()
    before, manager = state_of(base), DeviceManager("cpu")
    made = FACES[kind].extension(base, config(kind, tmp_path), manager)
    models = [create(kind, made, task) for task in ("python", "sql")]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    shared = [{p.data_ptr() for p in model.parameters() if not p.requires_grad} for model in models]
    assert shared[0] == shared[1]
    assert not shared[0] & {p.data_ptr() for p in base.parameters()}
    train(models[0], "gpt2")
    assert unchanged(before, base)
    getattr(made, FACES[kind].save)(models[0], "python")
    loaded = getattr(FACES[kind].extension(base, config(kind, tmp_path), manager), FACES[kind].load)("python")
    assert torch.equal(logits(loaded, "gpt2"), logits(models[0], "gpt2"))


def test_a_base_that_fits_is_shared_itself():
    base = tiny_models.build("gpt2")
    model = create("lora", FACES["lora"].extension(base, config("lora"), DeviceManager("cpu")))
    assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in model.parameters()}


def test_the_current_cuda_device_is_the_one_with_its_number(with_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert device_manager._placed(torch.device("cuda")) == ("cuda", 1)
    assert device_manager._placed(torch.device("cuda:0")) == ("cuda", 0)
