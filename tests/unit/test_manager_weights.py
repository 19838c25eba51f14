"""Adapters in one file: what comes back, and what is refused before anything is loaded."""

import json

import pytest
import torch
from encoder_models import awaken, encoder, ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peftlab
from peftlab.efficient.weights import adapter_tensors
from peftlab.errors import CheckpointError, MethodError, OutputError
from peftlab.manager import EfficientFineTuningManager, LoRALayer

pytestmark = pytest.mark.filterwarnings("ignore:no adapter dropout")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def everything(model=None, *, rank=2, alpha=4.0, tokens=5):
    """Every method on one model."""
    manager = EfficientFineTuningManager(model or encoder(dtype=torch.float32))
    manager.apply_lora(["self_attn.out_proj", "linear1"], rank=rank, alpha=alpha)
    manager.apply_adalora(["linear2"], rank=3)
    manager.apply_ptuning(tokens, hidden_dimension=8)
    manager.apply_prefix_tuning(1, 4, 4, prefix_length=3)
    return manager


def lora(rank=2, alpha=4.0, targets=("linear1",), model=None):
    return peftlab.apply_lora_to_model(model or encoder(), list(targets), rank=rank, alpha=alpha)


def test_what_is_saved_comes_back(tmp_path):
    manager = awaken(everything())
    path = tmp_path / "efficient_weights.pt"
    with pytest.warns(UserWarning, match="no rank was ever taken"):
        manager.save_efficient_weights(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    tensors = load_file(path)
    assert sum(t.numel() for t in tensors.values()) == manager.count_trainable_parameters()
    assert {
        "transformer.linear1.lora_A.weight",
        "transformer.linear2.lora_E",
        "prefix_tuning.prefix_embeddings.0",
    } < set(tensors)
    fresh = everything()
    assert not torch.allclose(fresh.model(ids()), manager.model(ids()))
    fresh.load_efficient_weights(str(path))
    assert torch.equal(fresh.model(ids()), manager.model(ids()))


def test_a_shared_lora_is_saved_once(tmp_path):
    def shared():
        manager = EfficientFineTuningManager(encoder(2))
        manager.apply_shared_lora(["out_proj"], LoRALayer(16, 16, rank=2, dropout_probability=0.0).double())
        return manager

    manager = awaken(shared())
    manager.save_efficient_weights(tmp_path / "shared")
    assert list(load_file(tmp_path / "shared")) == [
        f"transformer.layers.0.self_attn.out_proj.lora_{part}.weight" for part in "AB"
    ]
    fresh = shared()
    fresh.load_efficient_weights(tmp_path / "shared")
    assert torch.equal(fresh.model(ids()), manager.model(ids()))


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    awaken(lora(targets=["linear1", "linear2"])).save_efficient_weights(tmp_path / "two")
    awaken(lora(rank=3)).save_efficient_weights(tmp_path / "wide")
    manager = awaken(lora(targets=["linear1", "output"]), seed=9)
    before = {name: p.clone() for name, p in adapter_tensors(manager.model).items()}
    for file, told in (
        ("two", r"missing \['output\.lora_A\.weight', .*unexpected \['transformer\.linear2\.lora_A\.weight'"),
        ("wide", r"of another shape \['transformer\.linear1\.lora_A\.weight \(3, 16\) for \(2, 16\)'"),
    ):
        with pytest.raises(CheckpointError, match=told):
            manager.load_efficient_weights(tmp_path / file)
    assert all(torch.equal(p, before[name]) for name, p in adapter_tensors(manager.model).items())
    with pytest.raises(
        CheckpointError, match=r"missing \[\], unexpected \['transformer\.linear2\.lora_A\.weight'"
    ):
        lora().load_efficient_weights(tmp_path / "two")


def test_another_scale_or_base_is_refused(tmp_path):
    path = tmp_path / "w"
    manager = awaken(lora())
    manager.save_efficient_weights(path)
    with pytest.raises(CheckpointError, match=r"other scales .*transformer\.linear1 2\.0 for 4\.0"):
        lora(alpha=8.0).load_efficient_weights(path)
    other = encoder()
    with torch.no_grad():
        other.output.bias[3] += 1e-6
    fresh = lora(model=other)
    with pytest.raises(CheckpointError, match="a base with other parameters"):
        fresh.load_efficient_weights(path)
    assert not any(layer.lora_B["default"].weight.any() for layer in fresh.lora_layers.values())
    fresh.load_efficient_weights(path, any_base=True)
    pairs = zip(fresh.get_trainable_parameters(), manager.get_trainable_parameters(), strict=True)
    assert all(torch.equal(own, other) for own, other in pairs)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "w"
    lora().save_efficient_weights(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(CheckpointError, match="damaged: its tensors are not as written"):
        lora().load_efficient_weights(path)
    path.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="is no file of efficient weights"):
        lora().load_efficient_weights(path)
    save_file(load_file_of(whole, tmp_path), path)
    with pytest.raises(CheckpointError, match="is no file of efficient weights"):
        lora().load_efficient_weights(path)
    with pytest.raises(CheckpointError, match="is no file of efficient weights"):
        lora().load_efficient_weights(tmp_path / "nowhere")


def load_file_of(content, folder):
    (folder / "whole").write_bytes(content)
    return load_file(folder / "whole")


def test_files_of_torch_are_read_when_asked_and_never_executed(tmp_path):
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    manager = awaken(lora())
    torch.save({f"{name}": p for name, p in manager.model.state_dict().items() if "lora_" in name}, path)
    fresh = lora()
    with pytest.raises(CheckpointError, match="torch_file=True"):
        fresh.load_efficient_weights(path)
    fresh.load_efficient_weights(path, torch_file=True)
    assert torch.equal(fresh.model(ids()), manager.model(ids()))

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"transformer.linear1.lora_A.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as named tensors"):
        fresh.load_efficient_weights(path, torch_file=True)
    assert not ran.exists()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="something else than named tensors"):
        fresh.load_efficient_weights(path, torch_file=True)


def test_taken_ranks_are_saved_and_stay_taken(tmp_path):
    def managed():
        manager = peftlab.apply_adalora_to_model(
            encoder(), ["linear1", "linear2"], rank=4, dropout_probability=0.0
        )
        manager.begin(8, target_rank=2, warmup_share=0, final_share=0.5, interval_steps=1)
        return manager, torch.optim.SGD(manager.get_trainable_parameters(), lr=0.1)

    def step(manager, optimizer, number):
        optimizer.zero_grad()
        manager.model(ids(seed=number)).square().mean().backward()
        optimizer.step()
        manager.update_and_allocate(number)

    manager, optimizer = managed()
    for number in range(1, 6):
        step(manager, optimizer, number)
    manager.save_efficient_weights(tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        told = json.loads(file.metadata()["peftlab"])
    assert {path: sum(mask) for path, mask in told["kept"].items()} == {
        "transformer.linear1": 2,
        "transformer.linear2": 2,
    }
    fresh, other = managed()
    fresh.load_efficient_weights(tmp_path / "w")
    for number in (6, 7):
        step(manager, optimizer, number)
        step(fresh, other, number)
    assert torch.equal(fresh.model(ids()), manager.model(ids()))
    assert [layer.get_effective_rank() for layer in fresh.adalora_layers.values()] == [2, 2]
    again = peftlab.apply_adalora_to_model(encoder(), ["linear1", "linear2"], rank=4)
    again.load_efficient_weights(tmp_path / "w")
    again.save_efficient_weights(tmp_path / "copy")
    with safe_open(tmp_path / "copy", framework="pt") as file:
        assert json.loads(file.metadata()["peftlab"])["kept"] == told["kept"]


def test_nothing_and_nowhere_are_refused(tmp_path):
    with pytest.raises(MethodError, match="nothing to save"):
        EfficientFineTuningManager(encoder()).save_efficient_weights(tmp_path / "w")
    with pytest.raises(OutputError, match="cannot write"):
        lora().save_efficient_weights(tmp_path / "no" / "such" / "folder")
