"""Activations on disk: the same as in memory, byte-equal when resumed, never more than a part of them in memory."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import tiny_models
from peftlab.errors import OutputError
from peftlab.inspection import activations as product
from peftlab.inspection import model_fingerprint
from peftlab.inspection.activations import extract_activations
from peftlab.inspection.block_outputs import BlockOutputs
from peftlab.inspection.model_fingerprint import fingerprint, hash_tensor
from peftlab.inspection.shards import ActivationStore, open_activations

TEXTS = (
    "the cat sits on the mat",
    "dog",
    "a blue bird and a red bird fly over the big green house , under the tree",
    "small house",
    "price : high = area riverside",
) * 2
BAR = 1e-5


def extract_to(folder: Path, model: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"layers": [0, 1], "batch_tokens": 12, "texts": TEXTS * 4}
    settings |= changes
    tokenizer = tiny_models.tokenizer()
    return extract_activations(model, tokenizer, settings.pop("texts"), output=folder, **settings)


@pytest.mark.parametrize("pooling", ["token", "word", "mean"])
def test_on_disk_is_what_is_in_memory(tmp_path: Path, pooling: Any) -> None:
    model, texts = tiny_models.build("llama"), [*TEXTS, "   ", *TEXTS]
    stored = extract_to(tmp_path / "a", model, pooling=pooling, texts=texts)
    kept = extract_activations(model, tiny_models.tokenizer(), texts, [0, 1], pooling=pooling)
    assert stored.rows.tobytes() == kept.rows.tobytes()
    assert (stored.complete, stored.proof) == (True, "equal")
    for layer in kept:
        assert isinstance(stored[layer], np.memmap)
        assert np.abs(stored[layer] - kept[layer].numpy()).max() < BAR


@pytest.mark.parametrize("passes", [0, 3, 20])
def test_a_resumed_extraction_is_byte_equal_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    model = tiny_models.build("llama")
    calls = 0
    run = BlockOutputs.run

    def counted(self: BlockOutputs, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(BlockOutputs, "run", counted)
    limit = 10**6
    extract_to(tmp_path / "whole", model)
    whole, calls, limit = calls, 0, passes
    with pytest.raises(KeyboardInterrupt):
        extract_to(tmp_path / "cut", model)
    done = open_activations(tmp_path / "cut").num_texts
    assert (done > 0) == (passes == 20)
    calls, limit = 0, 10**6
    found = extract_to(tmp_path / "cut", copy.deepcopy(model))
    assert found.complete
    assert calls < whole if done else calls == whole
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes(), file.name
    calls = 0
    extract_to(tmp_path / "cut", model)
    assert calls == 0  # all is there


def test_another_extraction_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    extract_to(tmp_path / "a", model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    scaled = copy.deepcopy(model)
    scaled.config.rms_norm_eps = 1e-2
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        weight = flipped.model.layers[1].mlp.down_proj.weight
        weight.copy_(weight.flip(0))
    for other in (changed, tuned, scaled, flipped):
        with pytest.raises(OutputError, match=r"something else \(other model\)"):
            extract_to(tmp_path / "a", other)
    for name, change in {
        "texts": {"texts": [*TEXTS * 3, *TEXTS[:-1], "dog"]},
        "layers": {"layers": [1]},
        "pooling": {"pooling": "mean"},
        "max_length": {"max_length": 20},
        "batch_tokens": {"batch_tokens": 13},
        "dtype": {"dtype": torch.float16},
    }.items():
        with pytest.raises(OutputError, match=rf"something else .*{name}"):
            extract_to(tmp_path / "a", model, **change)


def test_no_more_than_a_part_is_ever_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is gone from memory before the next is computed, and its size does not depend on the number of texts."""
    parts: list[int] = []
    alive: list[weakref.ref[Any]] = []
    append, run = ActivationStore.append, BlockOutputs.run

    def appended(self: ActivationStore, values: Any, rows: Any, **done: Any) -> None:
        alive.extend(weakref.ref(value) for value in values.values())
        parts.append(len(rows))
        append(self, values, rows, **done)

    def ran(self: BlockOutputs, *arguments: Any, **options: Any) -> Any:
        assert not any(reference() is not None for reference in alive)
        return run(self, *arguments, **options)

    monkeypatch.setattr(ActivationStore, "append", appended)
    monkeypatch.setattr(BlockOutputs, "run", ran)
    found = extract_to(tmp_path / "a", tiny_models.build("llama"), texts=TEXTS * 20)
    assert len(parts) > 10
    assert sum(parts) == len(found.rows)
    assert max(parts) <= product._BATCHES_AT_ONCE * 12


def test_bfloat16_goes_to_disk_as_float32(tmp_path: Path) -> None:
    model = tiny_models.build("llama").to(torch.bfloat16)
    stored = extract_to(tmp_path / "a", model)
    assert stored["layer_0"].dtype == np.float32
    kept = extract_activations(model, tiny_models.tokenizer(), TEXTS * 4, [0], batch_tokens=12)
    assert np.array_equal(stored["layer_0"][:3], kept["layer_0"][:3].float().numpy())


def test_a_fingerprint_is_of_everything_that_decides() -> None:
    model = tiny_models.build("llama")
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == first
    wrapped = [
        peft.get_peft_model(
            copy.deepcopy(model),
            peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=alpha, init_lora_weights=False),
        )
        for alpha in (8, 16)
    ]
    wrapped[1].load_state_dict(wrapped[0].state_dict())
    turned = copy.deepcopy(model)
    turned.model.rotary_emb.inv_freq *= 1.5  # is in no state dict
    seen = [first, *map(fingerprint, wrapped), fingerprint(turned)]
    with wrapped[0].disable_adapter():
        seen.append(fingerprint(wrapped[0]))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool])
@pytest.mark.parametrize("size", [1, 3, 5000])
def test_a_tensors_hash_sees_every_bit_and_place(dtype: torch.dtype, size: int) -> None:
    source = torch.Generator().manual_seed(size)
    tensor = (2 * torch.randn(size, 2, generator=source)).to(dtype)
    whole = hash_tensor(tensor)
    assert hash_tensor(tensor.clone()) == hash_tensor(tensor.t().contiguous().t()) == whole
    shifted = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].reshape(size, 2)  # begins within a word
    assert hash_tensor(shifted) == whole
    for changed in (tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.t()):
        assert (hash_tensor(changed.contiguous()) == whole) == torch.equal(
            changed.flatten(), tensor.flatten()
        )
    octets = tensor.clone().view(torch.uint8)
    for place in (0, octets.numel() // 2, octets.numel() - 1):
        for bit in range(8):
            octets.flatten()[place] ^= 1 << bit
            assert hash_tensor(octets.view(torch.int8)) != whole
            octets.flatten()[place] ^= 1 << bit


def test_a_tensors_hash_sees_pieces_that_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_fingerprint, "_WORDS", 16)
    tensor = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert hash_tensor(tensor) == hash_tensor(tensor.clone())
    assert hash_tensor(tensor[[1, 0, 2, 3]]) != hash_tensor(tensor)
    assert hash_tensor(torch.zeros(0)) != hash_tensor(torch.zeros(1))
