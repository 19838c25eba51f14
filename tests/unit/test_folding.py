"""An adapter in the weights while answers are made: the same answers, and afterwards the base to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models
from peftlab import answer_trials, decode_loop
from peftlab.attaching.folding import folded
from peftlab.catalog import METHODS
from peftlab.decoding import DecodingSettings
from peftlab.generation import generate
from peftlab.mapping import map_model

TOKENIZER = tiny_models.tokenizer()
PROMPTS = [[1, 5 + number, *range(3, 3 + number % 5)] for number in range(20)]
PLENTY = 10**9


def attach(
    method: str = "lora", name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    leaf, model = METHODS.load(method), tiny_models.build(name).to(dtype)
    attached = leaf.attach(
        model, map_model(model), leaf.Settings(**settings), head=tiny_models.HEADS[name], seed=0
    )
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source).to(parameter.dtype))
    return attached.model.eval()


def state(model: Any) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def is_as_before(model: Any, before: dict[str, tuple[int, torch.Tensor]]) -> bool:
    return all(
        p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
        for name, p in model.named_parameters()
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[1, 9, 4, 7]])).logits
    return found


@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {}), ("lora", {"use_dora": True}), ("adalora", {}), ("ia3", {}), ("lora", {"targets": "both"})],
)
def test_the_weights_come_back_to_the_bit(method: str, settings: dict[str, Any]) -> None:
    model = attach(method, **settings)
    before, hot = state(model), logits(model)
    with folded(model, most_bytes=PLENTY) as is_folded:
        assert is_folded
        assert not is_as_before(model, before)
        assert all(layer.merged for layer in model.modules() if hasattr(layer, "merged_adapters"))
        torch.testing.assert_close(logits(model), hot, rtol=1e-4, atol=1e-4)
    assert is_as_before(model, before)
    assert torch.equal(logits(model), hot)


def test_companion_peft_alone_does_not_give_them_back() -> None:
    model = attach()
    before = state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not is_as_before(model, before)


def test_the_weights_come_back_where_answering_fails() -> None:
    model = attach()
    before = state(model)
    with pytest.raises(KeyError), folded(model, most_bytes=PLENTY):
        raise KeyError
    assert is_as_before(model, before)


def test_the_weights_come_back_where_peft_fails_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach()
    before, hot = state(model), logits(model)
    last = [layer for layer in model.modules() if hasattr(layer, "merged_adapters")][-1]

    def fail(**_: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(last, "merge", fail)
    with folded(model, most_bytes=PLENTY) as is_folded:
        assert not is_folded
        assert torch.equal(logits(model), hot)
    assert is_as_before(model, before)


def test_an_adapter_that_is_off_stays_off() -> None:
    model = attach()
    with model.disable_adapter():
        base = logits(model)
        with folded(model, most_bytes=PLENTY) as is_folded:
            assert not is_folded
            assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)


def test_what_is_not_folded() -> None:
    """Half precision, where small updates would be rounded away; tied weights; virtual tokens; what does not fit."""
    tied = attach("peft", "llama_tied", type="trainable_tokens", config={"token_indices": [3, 4]})
    for model in (attach(dtype=torch.bfloat16), tied, attach("prompt_tuning"), tiny_models.build("llama")):
        before = state(model)
        with folded(model, most_bytes=PLENTY) as is_folded:
            assert not is_folded
            assert is_as_before(model, before)
    with folded(attach(), most_bytes=100) as is_folded:
        assert not is_folded


def answers(model: Any) -> list[str]:
    return generate(
        model,
        TOKENIZER,
        PROMPTS,
        head="causal",
        max_new_tokens=8,
        batch_size=None,
        decoding=DecodingSettings(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_answers_are_made_with_the_adapter_in_the_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = attach(dtype=dtype), []
    before, whole = state(model), decode_loop.decode

    def watched(model: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> list[list[int]]:
        if len(ids) == len(PROMPTS):
            seen.append(not is_as_before(model, before))
        return whole(model, ids, *rest, **options)

    monkeypatch.setattr(decode_loop, "decode", watched)
    made = answers(model)
    monkeypatch.setattr(answer_trials, "FEWEST_FOLDED", len(PROMPTS) + 1)
    assert answers(model) == made
    assert seen == [True, False]
    assert is_as_before(model, before)


def test_weights_that_give_other_logits_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the adapter too much is more than rounding; the adapter then stays beside its base."""
    model = attach()
    expected, before = answers(model), state(model)
    whole = model.base_model.merge_adapter

    def too_much(**options: Any) -> None:
        layers = [layer for layer in model.modules() if hasattr(layer, "merged_adapters")]
        for layer in layers:
            layer.scaling["default"] *= 1.01
        whole(**options)
        for layer in layers:
            layer.scaling["default"] /= 1.01

    monkeypatch.setattr(model.base_model, "merge_adapter", too_much)
    seen: list[bool] = []
    decode = decode_loop.decode

    def watched(model: Any, *rest: Any, **options: Any) -> list[list[int]]:
        seen.append(is_as_before(model, before))
        return decode(model, *rest, **options)

    monkeypatch.setattr(decode_loop, "decode", watched)
    assert answers(model) == expected
    assert seen[0] is False, "the trial"
    assert seen[-1] is True


def test_in_half_precision_a_token_is_computed_by_the_models_eager_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = attach(dtype=torch.bfloat16), []
    config = model.get_base_model().config
    whole = decode_loop.decode

    def watched(*given: Any, **options: Any) -> list[list[int]]:
        seen.append(config._attn_implementation)
        return whole(*given, **options)

    monkeypatch.setattr(decode_loop, "decode", watched)
    assert len(set(answers(model))) > 1
    assert set(seen) == {"eager"}
    assert config._attn_implementation == "sdpa"
