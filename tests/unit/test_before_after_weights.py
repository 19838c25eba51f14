"""How far weights have moved: from A and B against the dense product, by peft against merging, and intruders by SVD."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from before_after_cases import attached
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_bundles
import tiny_models
from peftlab.inspection.before_after import weight_change
from peftlab.inspection.before_after.sides import Sides
from peftlab.inspection.before_after.weight_change import (
    intruder_dimensions,
    low_rank_singular_values,
    spread,
    weight_changes,
)
from peftlab.mapping import map_model


def factors(rank: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=source, dtype=torch.float64)
    return a, torch.randn(outputs, rank, generator=source, dtype=torch.float64)


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(4, 24, 40), (1, 7, 5), (12, 6, 9), (8, 8, 30)])
def test_singular_values_of_the_product_without_the_product(rank: int, inputs: int, outputs: int) -> None:
    a, b = factors(rank, inputs, outputs)
    dense = torch.linalg.svdvals(0.5 * b @ a)
    found = low_rank_singular_values(a, b, 0.5)
    count = min(rank, inputs, outputs)
    torch.testing.assert_close(found[:count], dense[:count], rtol=1e-12, atol=1e-12)
    assert dense[count:].abs().sum() < 1e-10


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_the_product_is_never_built() -> None:
    rank, inputs, outputs = 4, 600, 500
    a, b = factors(rank, inputs, outputs)
    with Largest() as seen:
        low_rank_singular_values(a, b, 2.0)
    assert seen.elements <= rank * max(inputs, outputs)
    with Largest() as dense:
        b @ a
    assert dense.elements == inputs * outputs


def test_ranks_are_those_of_the_papers() -> None:
    values = np.array([3.0, 2.0, 1.0, 0.0])
    found = spread(torch.from_numpy(values))
    assert found["norm"] == pytest.approx(np.sqrt(14))
    assert found["spectral_norm"] == 3.0
    assert found["stable_rank"] == pytest.approx(14 / 9)
    p = values[:3] / 6
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert spread(torch.zeros(3)) == {
        "norm": 0.0, "spectral_norm": 0.0, "stable_rank": None, "effective_rank": None,
    }  # fmt: skip
    assert spread(torch.ones(5))["effective_rank"] == pytest.approx(5.0)


CASES = {
    "lora": ("llama", "lora", {"rank": 4, "targets": "both", "use_rslora": True}, "low rank"),
    "patterns": ("bert", "lora", {"rank": 4, "targets": "both", "rank_pattern": {"attention.query": 2}}, "low rank"),
    "transposed": ("gpt2", "lora", {"rank": 2, "targets": "attention"}, "low rank"),
    "dora": ("llama", "lora", {"rank": 2, "use_dora": True}, "merged"),
    "adalora": ("llama", "adalora", {"initial_rank": 4, "target_rank": 2, "interval_steps": 2}, "merged"),
    "ia3": ("llama", "ia3", {}, "merged"),
    "hira": ("llama", "peft", {"type": "hira", "config": {"r": 2}}, "merged"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_changes_are_those_that_merging_makes(name: str) -> None:
    model, method, settings, kind = CASES[name]
    attachment = attached(model, method, num_layers=2, **settings)
    before = tiny_bundles.state_of(attachment.model)
    found = weight_changes(attachment, map_model(attachment.model))
    assert tiny_bundles.differences(before, tiny_bundles.state_of(attachment.model)) == []
    base = tiny_models.build(model, 2).double()
    merged = copy.deepcopy(attachment.model).merge_and_unload()
    seen = [change for change in found if change.kind == kind]
    assert len(seen) >= len(attachment.selection.adapted) > 0
    for change in seen:
        path = change.path.removeprefix("base_model.model.")
        one, other = (side.get_submodule(path).weight.detach() for side in (base, merged))
        dense = spread(torch.linalg.svdvals(other - one))
        for measure in ("norm", "spectral_norm", "stable_rank", "effective_rank"):
            assert getattr(change, measure) == pytest.approx(dense[measure], rel=1e-5), (path, measure)
        assert change.ratio == pytest.approx(dense["norm"] / float(one.norm()), rel=1e-6)
        sides = (one.T, other.T) if name == "transposed" else (one, other)
        assert (change.intruders, change.closest) == pytest.approx(by_svd(*sides), abs=1e-5)


def by_svd(one: torch.Tensor, other: torch.Tensor) -> tuple[int, float]:
    """Intruders as peft counts them, in float64."""
    before = torch.linalg.svd(one, full_matrices=False).U
    after = torch.linalg.svd(other, full_matrices=False).U
    nearest = (after.T @ before).abs().max(dim=1).values[:10]
    return int((nearest < 0.5).sum()), float(nearest.min())


def test_modules_trained_whole_and_embeddings_of_low_rank() -> None:
    attachment = attached("llama", rank=2, targets=["self_attn.q_proj"], modules_to_save=["lm_head"])
    found = {
        change.path.rpartition(".")[2]: change for change in weight_changes(attachment, attachment.family)
    }
    wrapper = attachment.model.base_model.model.lm_head
    expected = (wrapper.modules_to_save["default"].weight - wrapper.original_module.weight).detach()
    assert found["lm_head"].kind == "trained whole"
    assert found["lm_head"].norm == pytest.approx(float(expected.norm()), rel=1e-9)

    class Held:
        rewritten = ()

    held: Any = Held()
    held.model = peft.get_peft_model(
        tiny_models.build("llama").double(),
        peft.LoraConfig(r=3, target_modules=["embed_tokens"], init_lora_weights=False),
    ).double()
    (change,) = weight_changes(held, map_model(held.model))
    layer = held.model.base_model.model.model.embed_tokens
    dense = torch.linalg.svdvals(layer.get_delta_weight("default").detach())
    assert (change.kind, change.rank, change.shape) == ("low rank", 3, (64, 16))
    assert change.norm == pytest.approx(float(dense.norm()), rel=1e-9)
    weight = layer.base_layer.weight.detach()
    moved = weight + layer.get_delta_weight("default").detach()
    assert (change.intruders, change.closest) == pytest.approx(by_svd(weight.T, moved.T), abs=1e-6)


def test_tensors_of_the_base_that_train_are_held_against_their_originals() -> None:
    attachment = attached("llama", "full", num_layers=2, double=False)
    base = dict(tiny_models.build("llama").named_parameters())
    found = weight_changes(attachment, attachment.family)
    assert {change.kind for change in found} == {"trained"}
    own = dict(attachment.model.named_parameters())
    for change in found:
        name = change.path if change.path in own else f"{change.path}.weight"
        assert change.norm == pytest.approx(float((own[name] - base[name]).detach().norm()), rel=1e-4)
        assert (change.stable_rank is not None) == (len(change.shape) == 2)
    assert len(found) == len(own)


def test_blocks_that_the_base_does_not_have_have_not_moved_from_anywhere() -> None:
    attachment = attached("llama", "hybrid", rank=2, position=1)
    found = weight_changes(attachment, attachment.family, added={"layers": (1,)})
    assert {change.layer for change in found} == {0, 2, 3}


def test_a_vector_of_its_own_is_an_intruder_and_a_stretched_one_is_none() -> None:
    source = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(30, 30, generator=source, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(40, 30, generator=source, dtype=torch.float64)).Q
    weight = left @ torch.diag(torch.linspace(2, 1, 30, dtype=torch.float64)) @ right.T
    assert intruder_dimensions(weight, weight) == (0, pytest.approx(1.0))
    stretched = weight + 5 * left[:, :1] @ right[:, :1].T
    assert intruder_dimensions(weight, stretched)[0] == 0
    everywhere = left.sum(dim=1, keepdim=True) / np.sqrt(30)  # as far from every vector as can be
    new = weight + 50 * everywhere @ right[:, :1].T
    count, closest = intruder_dimensions(weight, new)
    assert (count >= 1, closest < 0.3) == (True, True)
    assert (count, closest) == pytest.approx(by_svd(weight, new), abs=1e-8)


def test_what_is_too_large_is_said_and_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_change, "MOST_WORK", 16 * 16 * 16)
    attachment = attached("llama", rank=2, targets="both")
    found = weight_changes(attachment, attachment.family)
    up = next(change for change in found if change.path.endswith("up_proj"))
    assert up.intruders is None
    assert "24 x 16 is above the bound" in up.notes[0]
    assert up.stable_rank is not None  # from A and B
    query = next(change for change in found if change.path.endswith("q_proj"))
    assert query.intruders is not None
    monkeypatch.setattr(weight_change, "_MOST_WORK_IN_ALL", 16 * 16 * 16)
    found = weight_changes(attachment, attachment.family)
    assert sum(change.intruders is not None for change in found) == 1
    assert any("took all of the work" in note for change in found for note in change.notes)


def test_experts_held_as_one_tensor_are_named() -> None:
    attachment = attached("mixtral", num_layers=1, double=False, rank=2, targets="mlp", dropout=0.0)
    found = weight_changes(attachment, attachment.family)
    assert [change.norm for change in found] == [None] * len(found)
    assert "ParamWrapper of peft stands on a parameter that is no module's weight" in found[0].notes[0]
    sides = Sides(attachment)
    assert "ParamWrapper" in sides.note


def test_what_peft_does_not_merge_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attachment = attached("llama", "peft", num_layers=2, type="hira", config={"r": 2})
    kind = type(next(m for m in attachment.model.modules() if getattr(m, "hira_A", None)))

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not for this weight")

    monkeypatch.setattr(kind, "merge", refuse)
    found = weight_changes(attachment, attachment.family)
    assert all(change.norm is None for change in found)
    assert "peft does not merge its" in found[0].notes[0]
    assert "not for this weight" in found[0].notes[0]
