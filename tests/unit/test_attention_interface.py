"""Seeing what attention computes: nothing changes, everything is restored, and rows equal a dense reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn
from transformers.modeling_utils import AttentionInterface

from peftlab.attention_interface import (
    AttentionCall,
    attention_configs,
    attention_output,
    attention_rows,
    eager_attention,
    observed_attention,
)
from peftlab.errors import ModelError
from tiny_models import build, inputs, randomise


def _padded(name: str) -> dict[str, torch.Tensor]:
    made = inputs(name)
    made["attention_mask"][1, -3:] = 0
    return made


def _calls(model: nn.Module, given: dict[str, torch.Tensor]) -> list[AttentionCall]:
    seen: list[AttentionCall] = []
    with torch.no_grad(), observed_attention(model, seen.append):
        model(**given)
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_a_watched_model_gives_the_same_bits(name: str, implementation: str) -> None:
    model, given = build(name), _padded(name)
    model.set_attn_implementation(implementation)
    before = model(**given).logits
    seen: list[AttentionCall] = []
    with observed_attention(model, seen.append):
        assert torch.equal(model(**given).logits, before)
    assert len(seen) == (6 if name == "t5" else 2)
    assert {call.implementation for call in seen} == {implementation}
    assert all((call.weights is None) == (implementation == "sdpa") for call in seen)
    assert model.config._attn_implementation == implementation


def test_a_call_holds_what_went_in_and_out() -> None:
    model = build("llama")
    first, second = _calls(model, _padded("llama"))
    assert first.module is model.model.layers[0].self_attn
    assert (first.query.shape, first.key.shape) == ((2, 4, 8, 4), (2, 2, 8, 4))
    assert first.scaling == 0.5
    assert "scaling" not in first.options
    assert first.mask is not None
    assert first.mask.dtype == torch.bool
    projected = second.module.o_proj(second.output.reshape(2, 8, -1))
    torch.testing.assert_close(
        projected, second.module.o_proj(attention_output(second, attention_rows(second)[0]).reshape(2, 8, -1))
    )


def test_observers_nest_and_see_their_own_model_only() -> None:
    llama, gpt2 = build("llama"), build("gpt2")
    outer: list[nn.Module] = []
    inner: list[nn.Module] = []
    with observed_attention(llama, lambda call: outer.append(call.module)):
        with observed_attention(llama.model.layers[1], lambda call: inner.append(call.module)):
            llama(**inputs("llama"))
            gpt2(**inputs("gpt2"))
        llama(**inputs("llama"))
    assert inner == [llama.model.layers[1].self_attn]
    assert outer == [layer.self_attn for layer in llama.model.layers] * 2


def test_everything_is_restored_whatever_happens() -> None:
    model, answer = build("llama"), AttentionInterface.get_interface

    def refuse(call: AttentionCall) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), observed_attention(model, refuse):
        model(**inputs("llama"))
    assert AttentionInterface.get_interface is answer
    with pytest.raises(RuntimeError, match="eager"), eager_attention(model):
        raise RuntimeError(model.config._attn_implementation)
    assert model.config._attn_implementation == "sdpa"


def _clip() -> Any:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.CLIPConfig(
        text_config=tower | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    return randomise(T.CLIPModel(config)).eval()


def test_towers_keep_their_own_implementation() -> None:
    model = _clip()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    before = model(**given).logits_per_image
    seen: list[AttentionCall] = []
    with observed_attention(model, seen.append):
        assert torch.equal(model(**given).logits_per_image, before)
    used = {call.implementation: isinstance(call.module.config, T.CLIPVisionConfig) for call in seen}
    assert used == {"eager": False, "sdpa": True}
    assert len(attention_configs(model)) == 3
    with eager_attention(model):
        assert {config._attn_implementation for config in attention_configs(model)} == {"eager"}
    assert [c._attn_implementation for c in (model.config.text_config, model.config.vision_config)] == [
        "eager",
        "sdpa",
    ]


def test_adapted_projections_are_seen_through_peft() -> None:
    model = build("llama")
    plain = _calls(model, inputs("llama"))[0]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapted = _calls(wrapped, inputs("llama"))[0]
    assert adapted.module is plain.module
    assert not torch.equal(adapted.query, plain.query)
    assert torch.equal(adapted.key, plain.key)


def test_a_model_that_asks_for_the_implementation_by_name_is_told_the_truth() -> None:
    """GLM's sparse index masks attention only where the config names eager or sdpa: another name would change the model."""
    config = T.GlmMoeDsaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=2, num_experts_per_tok=1, n_shared_experts=1,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, index_head_dim=8,
        index_n_heads=2, index_topk=3, first_k_dense_replace=1, n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    model = randomise(T.GlmMoeDsaForCausalLM(config)).eval()
    given = inputs("llama")
    before = model(**given).logits
    calls = _calls(model, given)
    with observed_attention(model, lambda call: None):
        assert torch.equal(model(**given).logits, before)
    rows, _ = attention_rows(calls[1])
    assert (rows[0, 0] > 0).sum(dim=-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def _call(
    *,
    implementation: str,
    mask: torch.Tensor | None = None,
    num_keys: int = 7,
    causal: bool = True,
    **options: Any,
) -> AttentionCall:
    """A call with four query heads, two key heads and five queries."""
    source = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=source)
        for heads, length in ((4, 5), (2, num_keys), (2, num_keys))
    )
    module = nn.Module()
    module.is_causal = causal
    return AttentionCall(module, query, key, value, mask, 0.3, options, implementation)


def _dense(call: AttentionCall, seen: torch.Tensor | None, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Probabilities the long way, key heads repeated, (batch, 4, 5, keys)."""
    key = call.key.repeat_interleave(2, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, key) * 0.3 + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1)


BEHIND = torch.arange(5)[:, None] - torch.arange(7)
"""How far each of seven keys lies behind each of five queries, both counted from the first."""
PADS = torch.tensor([[1] * 7, [0, 0] + [1] * 5]).bool()


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (_call(implementation="sdpa"), BEHIND >= 0),
        (_call(implementation="sdpa", causal=False), None),
        (_call(implementation="sdpa", is_causal=False), None),
        (_call(implementation="eager"), None),
        (_call(implementation="flash_attention_2"), BEHIND + 2 >= 0),
        (_call(implementation="flash_attention_2", sliding_window=3), (BEHIND + 2 >= 0) & (BEHIND + 2 < 3)),
        (_call(implementation="flash_attention_2", causal=False, sliding_window=3), (BEHIND + 2).abs() < 3),
        (_call(implementation="flash_attention_2", mask=PADS.long(), causal=False), PADS[:, None, None]),
        (_call(implementation="flash_attention_2", mask=PADS), PADS[:, None, None] & (BEHIND + 2 >= 0)),
        (_call(implementation="sdpa", mask=PADS[:, None, None]), PADS[:, None, None]),
        (_call(implementation="sdpa", mask=(BEHIND >= -2)[None, None]), BEHIND >= -2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("heads", [None, (3, 1)])
def test_rows_under_every_kind_of_mask(
    call: AttentionCall, seen: torch.Tensor | None, heads: Sequence[int] | None
) -> None:
    expected = _dense(call, seen)
    expected = expected if heads is None else expected[:, list(heads)]
    rows, sinks = attention_rows(call, heads=heads)
    assert sinks is None
    torch.testing.assert_close(rows, expected)
    parts = [attention_rows(call, heads=heads, start=start, stop=min(start + 2, 5))[0] for start in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts, dim=2), expected)


def test_rows_with_bias_additive_mask_cap_and_sinks() -> None:
    source = torch.Generator().manual_seed(1)
    bias, mask = torch.randn(1, 4, 5, 7, generator=source), torch.randn(2, 1, 5, 7, generator=source)
    call = _call(implementation="eager", mask=mask, position_bias=bias)
    torch.testing.assert_close(attention_rows(call)[0], _dense(call, None, bias + mask))
    call = _call(implementation="eager", mask=mask, softcap=0.5)
    raw = torch.einsum("bhqd,bhkd->bhqk", call.query, call.key.repeat_interleave(2, dim=1)) * 0.3
    torch.testing.assert_close(attention_rows(call)[0], (torch.tanh(raw / 0.5) * 0.5 + mask).softmax(dim=-1))
    sink = torch.tensor([0.0, 1.0, 2.0, 3.0])
    call = _call(implementation="eager", mask=mask, s_aux=sink)
    total = (raw + mask).exp().sum(dim=-1) + sink.exp()[:, None]
    rows, mass = attention_rows(call, heads=[2], start=1, stop=3)
    torch.testing.assert_close(rows, ((raw + mask).exp() / total[..., None])[:, 2:3, 1:3])
    torch.testing.assert_close(mass, (sink.exp()[:, None] / total)[:, 2:3, 1:3])


def test_a_query_that_sees_nothing_has_zeros() -> None:
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[1, :, 0] = False
    rows, _ = attention_rows(_call(implementation="sdpa", mask=mask))
    assert rows[1, :, 0].abs().max() == 0
    torch.testing.assert_close(rows.sum(dim=-1)[0], torch.ones(4, 5))


def test_what_cannot_be_read_is_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, q, k: q >= k, None, None, 5, 7, device="cpu")
    with pytest.raises(ModelError, match="BlockMask"):
        attention_rows(_call(implementation="flex_attention", mask=block))
    call = _call(implementation="sdpa")
    folded = AttentionCall(call.module, call.query[0], call.key[0], call.value[0], None, None)
    with pytest.raises(ModelError, match="expected \\(batch, heads, seq, head\\)"):
        attention_rows(folded)
