"""What a pre-flight says of adapters: each by name, what it trains counted by kind, ranks that are too high."""

from __future__ import annotations

from typing import Any

import pytest

import tiny_models
from peftlab.attaching.describing import describe_adapters, note_ranks
from peftlab.attaching.towers import attach_adapters
from peftlab.config import AdapterSettings
from peftlab.mapping import map_model

HIDDEN, INNER, LAYERS, LABELS = tiny_models.HIDDEN, 24, 2, tiny_models.LABELS


def attached(base: str, *adapters: AdapterSettings) -> Any:
    model = tiny_models.build(base).to("meta")
    return attach_adapters(model, map_model(model), adapters, head=tiny_models.HEADS[base], seed=1)


def one(method: str, **settings: Any) -> AdapterSettings:
    return AdapterSettings(method=method, settings=settings)


def test_a_hybrids_kinds_are_told_apart() -> None:
    """LoRA of rank 2 on q, k, v, o of each block, the new one among them, beside all of the new block's own weights."""
    adapter = one("hybrid", rank=2, targets="attention", stack="encoder")
    made = attached("t5", adapter)
    (found,) = describe_adapters(made, [adapter])
    lora = 4 * 2 * (HIDDEN + HIDDEN)
    blocks = LAYERS + 1 + 2 * LAYERS  # the encoder's with the new one, the decoder's with its cross-attention
    block = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER + 2 * HIDDEN
    assert found["kinds"] == {"lora": blocks * lora, "new_layer": block}
    assert found["parameters"] == sum(p.numel() for p in made.parameters().values()) == blocks * lora + block
    assert (found["method"], found["peft_type"], found["scope"]) == ("hybrid", "lora", "model")


def test_each_tower_has_its_own_counts() -> None:
    towers = [
        AdapterSettings(scope=scope, settings={"rank": rank, "targets": "attention.query"})
        for scope, rank in (("encoder", 2), ("decoder", 5))
    ]
    found = describe_adapters(attached("t5", *towers), towers)
    assert [(f["scope"], f["parameters"]) for f in found] == [
        ("encoder", LAYERS * 2 * 2 * HIDDEN),
        ("decoder", LAYERS * 5 * 2 * HIDDEN),
    ]
    assert [f["kinds"] for f in found] == [{"lora": f["parameters"]} for f in found]


@pytest.mark.parametrize(
    ("method", "settings", "peft_type"),
    [
        ("lora", {}, "lora"),
        ("ia3", {}, "ia3"),
        ("peft", {"type": "vera", "config": {"r": 4}}, "vera"),
        ("p_tuning", {}, "p_tuning"),
        ("bitfit", {}, None),
        ("full", {}, None),
        ("new_layer", {}, None),
    ],
)
def test_a_head_that_trains_whole_is_counted_apart(
    method: str, settings: dict[str, Any], peft_type: str | None
) -> None:
    adapter = one(method, **settings)
    made = attached("bert", adapter)
    (found,) = describe_adapters(made, [adapter])
    assert found["peft_type"] == peft_type
    assert sum(found["kinds"].values()) == found["parameters"]
    assert found["tensors"] == len(made.parameters())
    if peft_type is not None:
        assert found["kinds"]["whole"] == LABELS * (HIDDEN + 1)
        assert list(found["kinds"]) == [method, "whole"]


@pytest.mark.parametrize(
    ("base", "adapter", "above"),
    [
        ("llama", one("lora", rank=HIDDEN, targets="mlp"), 0),
        ("llama", one("lora", rank=HIDDEN + 1, targets="mlp"), 3 * LAYERS),
        ("llama", one("lora", rank=9, targets="attention"), 2 * LAYERS),  # keys and values are of width 8
        ("llama", one("lora", rank=2, targets="both", rank_pattern={"mlp.down": 40}), LAYERS),
        ("gpt2", one("lora", rank=HIDDEN + 1, targets="attention.output"), LAYERS),
        ("llama", one("adalora", initial_rank=9, target_rank=2, targets="attention"), 2 * LAYERS),
        ("llama", one("hybrid", rank=9, targets="attention"), 2 * (LAYERS + 1)),
        ("mixtral", one("lora", rank=12, dropout=0, targets="mlp"), 0),  # one A for all experts is no rank of 24
        ("llama", one("ia3"), 0),
    ],
)  # fmt: skip
def test_a_rank_that_no_update_can_have_is_noted(base: str, adapter: AdapterSettings, above: int) -> None:
    notes = note_ranks(attached(base, adapter))
    if not above:
        assert notes == []
        return
    (note,) = notes
    assert f"so are the ranks of {above} layers in all" in note
