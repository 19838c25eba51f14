"""The verdict on how attention can be had from a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from attention_models import padded_inputs

from peftlab.attention_interface import AttentionCall
from peftlab.inspection.attention_verdict import measure_attention
from tiny_models import BUILDERS, HEADS, VOCABULARY, build, randomise


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "llama_tied"])
def test_the_verdict_on_every_tiny_model(name: str) -> None:
    inputs = padded_inputs()
    if HEADS[name] == "seq2seq":
        inputs |= {"decoder_input_ids": padded_inputs(6)["input_ids"]}
    verdict = measure_attention(build(name), inputs)
    assert str(verdict) == ("output_attentions" if name in ("gptj", "bloom") else "probe")
    assert verdict.unchanged
    assert (verdict.difference is None) == (name in ("gptj", "bloom"))


def test_the_verdict_refuses_what_it_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    import peftlab.inspection.attention_source as source

    rows = source.attention_rows

    def off(call: AttentionCall, **options: Any) -> Any:
        probabilities, sinks = rows(call, **options)
        return 0.999 * probabilities + 0.001 * probabilities.mean(dim=-1, keepdim=True), sinks

    monkeypatch.setattr(source, "attention_rows", off)
    monkeypatch.setattr(source, "tolerance", lambda dtype: 1.0)
    verdict = measure_attention(build("llama"), padded_inputs(pad="none"))
    assert str(verdict).startswith("refused: recomputed and eager attention differ by")


def test_a_map_is_not_taken_for_that_of_another_tower() -> None:
    """GIT records its text's attention only, and this one has as many layers for images as for text."""
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.GitConfig(
        **tower, vision_config=tower | {"image_size": 8, "patch_size": 4}, vocab_size=VOCABULARY, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=64, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = randomise(T.GitForCausalLM(config)).eval()
    inputs = padded_inputs() | {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    }
    verdict = measure_attention(model, inputs)
    assert str(verdict) == "output_attentions"
    assert verdict.difference is not None  # the images' maps were compared with their own


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("diffllama", {}),  # applies one attention to two halves of the values
        (
            "granite_swa",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
        ),  # sinks
        (
            "minimax",
            {"head_dim": 4, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
        ),
    ],
)
def test_the_verdict_on_models_of_their_own_kind(name: str, changes: dict[str, Any]) -> None:
    config = T.AutoConfig.for_model(
        name, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64, **changes,
    )  # fmt: skip
    verdict = measure_attention(randomise(T.AutoModelForCausalLM.from_config(config)).eval(), padded_inputs())
    assert str(verdict) == "probe"
    assert verdict.unchanged


def test_rounding_alone_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two float32 runs differ by, they do not in float64."""
    monkeypatch.setattr("peftlab.inspection.attention_verdict.EQUAL", 1e-7)
    verdict = measure_attention(build("bert"), padded_inputs())
    assert str(verdict) == "probe"
    assert verdict.difference is not None
    assert verdict.difference < 1e-7
