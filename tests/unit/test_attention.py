"""Attention patterns against the same model loaded eagerly, and that nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as T
from attention_models import CAUSAL, ENCODERS, known, of, padded_inputs
from torch import nn

from peftlab.attention_interface import AttentionCall, attention_configs, observed_attention
from peftlab.errors import ConfigError, DataError, EvaluationError, ModelError
from peftlab.inspection.attention import AttentionPatterns, get_attention_patterns
from peftlab.mapping import map_model
from tiny_models import VOCABULARY, build, randomise, tokenizer


def _equal(patterns: AttentionPatterns, eager: tuple[torch.Tensor, ...], layers: list[int]) -> None:
    """Patterns are the eager maps of some layers at real queries, and zero at pads."""
    heads = list(patterns.heads) if patterns.heads is not None else slice(None)
    real = patterns.query_real[:, None, :, None]
    assert list(patterns.weights) == [f"layer_{i}" for i in layers]
    for layer in layers:
        rows = patterns.weights[f"layer_{layer}"]
        assert rows.dtype == torch.float32
        expected = torch.where(real, eager[layer][:, heads], 0.0)
        torch.testing.assert_close(rows, expected, atol=1e-4, rtol=0)
        sums = rows.sum(dim=-1) + patterns.sinks.get(f"layer_{layer}", 0.0)
        torch.testing.assert_close(sums, real[..., 0].expand_as(sums).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_patterns_equal_those_of_the_model_loaded_eagerly(name: str, pad: str) -> None:
    make, implementation = (CAUSAL | ENCODERS)[name]
    inputs = padded_inputs(pad=pad)
    eager = make("eager")(**inputs, output_attentions=True).attentions
    model = make(implementation)
    patterns = get_attention_patterns(model, None, None, inputs=inputs)
    assert patterns.source == "probe"
    assert model.config._attn_implementation == implementation
    assert torch.equal(patterns.query_real, inputs["attention_mask"].bool())
    _equal(patterns, eager, [0, 1])
    for rows in patterns.weights.values():
        above = rows.triu(1).abs().max()
        assert above == 0 if name in CAUSAL else above > 0
        assert rows[1, :, 3:6][..., ~inputs["attention_mask"][1].bool()].abs().sum() == 0
    assert bool(patterns.sinks) == (name == "gpt_oss")
    if patterns.sinks:
        assert all(
            mass[patterns.query_real[:, None].expand_as(mass)].min() > 0 for mass in patterns.sinks.values()
        )


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3", "bert"])
def test_chosen_heads_come_in_the_order_asked_for(name: str) -> None:
    make, implementation = (CAUSAL | ENCODERS)[name]
    inputs = padded_inputs()
    eager = make("eager")(**inputs, output_attentions=True).attentions
    patterns = get_attention_patterns(make(implementation), None, None, [1], heads=[3, 0], inputs=inputs)
    assert patterns.weights["layer_1"].shape == (2, 2, 9, 9)
    _equal(patterns, eager, [1])


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    ("kind", "stack", "field"),
    [
        ("self", "encoder", "encoder_attentions"),
        ("self", "decoder", "decoder_attentions"),
        ("cross", None, "cross_attentions"),
    ],
)
def test_both_sides_and_the_attention_between_them(
    name: str, kind: Any, stack: str | None, field: str
) -> None:
    decoder = padded_inputs(6)
    inputs = padded_inputs() | {f"decoder_{key}": value for key, value in decoder.items()}
    eager = known(name)("eager")(**inputs, output_attentions=True)
    patterns = get_attention_patterns(known(name)("sdpa"), None, None, kind=kind, stack=stack, inputs=inputs)
    assert patterns.source == "probe"
    _equal(patterns, eager[field], [0, 1])
    queries, keys = (6, 6) if stack == "decoder" else (9, 9) if stack else (6, 9)
    assert patterns.weights["layer_0"].shape == (2, 4, queries, keys)
    assert patterns.query_real.sum() == 2 * queries - 3
    assert patterns.key_real.sum() == 2 * keys - 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_and_decoder_texts_are_read_as_in_training(side: str) -> None:
    words = tokenizer(opens=False, closes=True)
    words.padding_side = side
    model = build("bart")
    patterns = get_attention_patterns(
        model, words, ["the cat sits", "a dog"], kind="cross", decoder_texts=["bird", "a small tree runs"]
    )
    assert patterns.query_ids is not None
    assert patterns.query_ids[0, 0] == model.config.decoder_start_token_id
    assert words.convert_ids_to_tokens(patterns.query_ids[1])[1:] == ["a", "small", "tree", "runs"]
    assert patterns.query_real.sum(dim=1).tolist() == [2, 5]
    assert patterns.key_real.sum(dim=1).tolist() == [4, 3]
    assert words.convert_ids_to_tokens(patterns.key_ids[0])[:3] == ["the", "cat", "sits"]
    alone = get_attention_patterns(model, words, ["a dog"], kind="cross", decoder_texts=["a small tree runs"])
    together = patterns.weights["layer_1"][1][:, patterns.query_real[1]][..., patterns.key_real[1]]
    torch.testing.assert_close(alone.weights["layer_1"][0], together)


def test_a_text_in_a_batch_is_read_as_it_is_alone() -> None:
    words = tokenizer()
    words.padding_side = "left"  # would move GPT-2's positions
    model = build("gpt2")
    together = get_attention_patterns(model, words, ["a dog", "the cat sits on a mat"])
    alone = get_attention_patterns(model, words, ["a dog"])
    torch.testing.assert_close(together.weights["layer_1"][:1, :, :3, :3], alone.weights["layer_1"])


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # positions that are learnt, and that are turned
def test_texts_beyond_the_positions_are_refused_or_cut(name: str) -> None:
    model, words, texts = build(name), tokenizer(), ["the cat", "the " * 64]
    with pytest.raises(DataError, match=r"text 1 has 65 tokens, the model reads 64: give max_length=64"):
        get_attention_patterns(model, words, texts)
    cut = get_attention_patterns(model, words, texts, [0], max_length=64)
    assert cut.query_real.sum(dim=1).tolist() == [3, 64]
    ids = {"input_ids": torch.ones(1, 65, dtype=torch.long)}
    with pytest.raises(DataError, match="has 65 positions, the model reads 64"):
        get_attention_patterns(model, None, None, inputs=ids)
    with pytest.raises(ConfigError, match="max_length 65: the model reads 1 to 64 tokens"):
        get_attention_patterns(model, words, texts, max_length=65)
    with pytest.raises(ConfigError, match="cuts texts, and none are given"):
        get_attention_patterns(model, None, None, inputs=padded_inputs(), max_length=5)


def test_tokens_that_the_model_does_not_know_are_refused_and_pads_that_it_does_not_know_are_none() -> None:
    model, words = build("bart"), tokenizer(opens=False, closes=True)
    expected = get_attention_patterns(model, words, ["the cat", "a"], kind="cross", decoder_texts=["a", "a"])
    words.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(words.pad_token_id)
    found = get_attention_patterns(model, words, ["the cat", "a"], kind="cross", decoder_texts=["a", "a"])
    torch.testing.assert_close(found.weights["layer_1"], expected.weights["layer_1"])
    with pytest.raises(
        DataError, match=r"^text 1 has the token id \d+, the model knows 0 to \d+: give the tok"
    ):
        get_attention_patterns(model, words, ["the", "the [PAD]"])
    with pytest.raises(DataError, match=r"^decoder text 0 has the token id"):
        get_attention_patterns(model, words, ["the"], kind="cross", decoder_texts=["[PAD]"])
    with pytest.raises(DataError, match="input_ids has the token id -1"):
        get_attention_patterns(model, None, None, inputs={"input_ids": torch.tensor([[5, -1]])})
    written = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[70, -100]])}
    with pytest.raises(DataError, match="labels has the token id 70"):
        get_attention_patterns(model, None, None, kind="cross", inputs=written)


def test_a_decoder_without_input_is_an_error_and_an_encoder_needs_none() -> None:
    words = tokenizer(opens=False, closes=True)
    model = build("t5")
    for chosen in ({"kind": "cross"}, {"stack": "decoder"}):
        with pytest.raises(DataError, match=r"decoder has no input: give decoder_texts"):
            get_attention_patterns(model, words, ["the cat"], **chosen)
    patterns = get_attention_patterns(model, words, ["the cat"])
    assert patterns.stack == "encoder"
    assert patterns.weights["layer_1"].shape == (1, 4, 3, 3)


def test_an_image_in_place_of_text() -> None:
    config = T.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    image = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    model = randomise(T.ViTModel._from_config(config, attn_implementation="sdpa")).eval()
    patterns = get_attention_patterns(model, None, None, [1], inputs=image)
    model.set_attn_implementation("eager")
    _equal(patterns, model(**image, output_attentions=True).attentions, [1])
    assert patterns.weights["layer_1"].shape == (2, 4, 5, 5)
    assert patterns.query_ids is None


@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_models_beside_the_interface_hand_out_their_own(name: str) -> None:
    model, inputs = build(name), padded_inputs()
    implementations = [config._attn_implementation for config in attention_configs(model)]
    eager = model(**inputs, output_attentions=True).attentions
    patterns = get_attention_patterns(model, None, None, [1], heads=[2], inputs=inputs)
    assert patterns.source == "output_attentions"
    assert "interface" in patterns.note
    _equal(patterns, eager, [1])
    assert [config._attn_implementation for config in attention_configs(model)] == implementations


def test_models_without_attention_are_refused_by_name() -> None:
    config = T.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = randomise(T.MambaForCausalLM(config)).eval()
    with pytest.raises(ModelError, match="mamba"):
        get_attention_patterns(model, None, None, inputs=padded_inputs())


def test_the_runs_of_a_shared_block_are_layers() -> None:
    config = T.AlbertConfig(
        vocab_size=VOCABULARY, hidden_size=16, embedding_size=8, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model, inputs = randomise(T.AlbertForMaskedLM(config)).eval(), padded_inputs()
    patterns = get_attention_patterns(model, None, None, inputs=inputs)
    chosen = get_attention_patterns(model, None, None, [1], inputs=inputs)
    with pytest.raises(ConfigError, match="layer 3 "):
        get_attention_patterns(model, None, None, [1, 3], inputs=inputs)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True).attentions
    _equal(patterns, eager, [0, 1, 2])
    _equal(chosen, eager, [1])


def test_layers_whose_mixer_is_no_attention_are_left_out_or_refused() -> None:
    config = T.Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    model, inputs = randomise(T.Lfm2ForCausalLM(config)).eval(), padded_inputs()
    patterns = get_attention_patterns(model, None, None, inputs=inputs)
    assert list(patterns.weights) == ["layer_1"]
    assert "layers 0, 2 of 'layers' did not call" in patterns.note
    with pytest.raises(ModelError, match="layer 0 of 'layers' did not call"):
        get_attention_patterns(model, None, None, [0], inputs=inputs)


def test_each_tower_of_a_model_that_reads_and_sees() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.CLIPConfig(
        text_config=tower
        | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = randomise(T.CLIPModel(config)).eval()
    text, vision = map_model(model).stacks
    for length, pads in ((9, "right"), (5, "right"), (5, "none")):  # the image has five positions too
        inputs = padded_inputs(length, pads) | {"pixel_values": torch.randn(2, 3, 8, 8)}
        read = get_attention_patterns(model, None, None, stack=text, inputs=inputs)
        seen = get_attention_patterns(model, None, None, stack=vision, inputs=inputs)
        assert torch.equal(read.query_real, inputs["attention_mask"].bool())
        assert seen.query_real.all()
        model.set_attn_implementation("eager")
        eager = model(**inputs, output_attentions=True)
        _equal(read, eager.text_model_output.attentions, [0, 1])
        _equal(seen, eager.vision_model_output.attentions, [0, 1])
        model.set_attn_implementation("sdpa")


def test_maps_are_float32_in_half_precision_and_under_autocast() -> None:
    model, inputs = build("llama"), padded_inputs()
    half = copy.deepcopy(model).to(torch.bfloat16)
    eager = copy.deepcopy(half)
    eager.set_attn_implementation("eager")
    patterns = get_attention_patterns(half, None, None, inputs=inputs)
    assert patterns.source == "probe"
    expected = eager(**inputs, output_attentions=True).attentions
    real = patterns.query_real[:, None, :, None]
    for layer in (0, 1):
        rows = patterns.weights[f"layer_{layer}"]
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, torch.where(real, expected[layer].float(), 0.0), atol=2e-2, rtol=0)
        torch.testing.assert_close(rows.sum(dim=-1), real[..., 0].expand(2, 4, 9).float(), atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        patterns = get_attention_patterns(model, None, None, inputs=inputs)
    assert patterns.source == "probe"
    assert patterns.weights["layer_0"].dtype == torch.float32


def test_only_the_asked_layers_are_computed_and_no_later_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import peftlab.inspection.attention_source as source

    model = build("llama", 4)
    computed: list[nn.Module] = []
    ran: list[int] = []
    rows = source.attention_rows
    monkeypatch.setattr(
        source,
        "attention_rows",
        lambda call, **options: (computed.append(call.module), rows(call, **options))[1],
    )
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    get_attention_patterns(model, None, None, [1], inputs=padded_inputs())
    assert computed == [model.model.layers[1].self_attn]
    assert ran == [0, 1]


def test_a_model_wrapped_by_peft() -> None:
    model, inputs = build("llama"), padded_inputs()
    eager = copy.deepcopy(model)
    settings = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = [peft.get_peft_model(m, settings) for m in (model, eager)]
    wrapped[1].load_state_dict(wrapped[0].state_dict())
    eager.set_attn_implementation("eager")
    expected = wrapped[1](**inputs, output_attentions=True).attentions
    plain = get_attention_patterns(build("llama"), None, None, inputs=inputs)
    patterns = get_attention_patterns(wrapped[0], None, None, inputs=inputs)
    _equal(patterns, expected, [0, 1])
    assert (patterns.weights["layer_0"] - plain.weights["layer_0"]).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "queries", "keys"), [("prefix", 9, 11), ("prompt", 11, 11)])
def test_the_virtual_tokens_of_peft_are_positions(method: str, queries: int, keys: int) -> None:
    make = peft.PrefixTuningConfig if method == "prefix" else peft.PromptTuningConfig
    model = peft.get_peft_model(build("llama"), make(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    patterns = get_attention_patterns(model, None, None, inputs=padded_inputs())
    assert patterns.weights["layer_1"].shape == (2, 4, queries, keys)
    assert patterns.key_real[1].tolist() == [True] * 8 + [False] * 3
    sums = patterns.weights["layer_1"].sum(dim=-1)
    torch.testing.assert_close(sums, patterns.query_real[:, None].expand_as(sums).float())


def test_mode_and_setting_are_restored_after_errors_too() -> None:
    model = of(T.LlamaForCausalLM, T.LlamaConfig, attention_dropout=0.5)("sdpa").train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    inputs = padded_inputs()
    assert get_attention_patterns(model, None, None, inputs=inputs).source == "probe"  # without dropout
    with pytest.raises(ConfigError, match="no head 4: this model's attention has heads 0 to 3"):
        get_attention_patterns(model, None, None, heads=[4], inputs=inputs)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())


def test_what_does_not_exist_is_an_error() -> None:
    model, words = build("llama"), tokenizer()
    with pytest.raises(ConfigError, match=r"layer 2 .* has it in layers 0, 1"):
        get_attention_patterns(model, words, ["the cat"], [0, 2])
    with pytest.raises(ConfigError, match="layer -1"):
        get_attention_patterns(model, words, ["the cat"], [-1])
    with pytest.raises(ConfigError, match="stack 'decoder'"):
        get_attention_patterns(model, words, ["the cat"], stack="decoder")
    with pytest.raises(ModelError, match="no cross attention"):
        get_attention_patterns(model, words, ["the cat"], kind="cross")
    with pytest.raises(DataError, match="at least one text"):
        get_attention_patterns(model, words, "the cat")
    with pytest.raises(DataError, match="nothing to look at"):
        get_attention_patterns(model, words, None)
    words.pad_token = None
    with pytest.raises(DataError, match="no pad token"):
        get_attention_patterns(model, words, ["the cat", "a"])


def test_attention_that_is_not_softmax_is_never_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose fused attention does something else than its inputs say: the proof by the output catches it."""
    from transformers.modeling_utils import AttentionInterface

    sdpa = AttentionInterface._global_mapping["sdpa"]

    def sharper(module: Any, query: Any, *rest: Any, **options: Any) -> Any:
        return sdpa(module, 1.05 * query, *rest, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sharper)
    patterns = get_attention_patterns(build("llama"), None, None, inputs=padded_inputs())
    assert patterns.source == "output_attentions"
    assert "is not softmax" in patterns.note


def test_maps_that_are_no_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("gptj"), padded_inputs()
    forward = type(model).forward

    def broken(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **options: Any) -> Any:
            outputs = forward(self, *args, **options)
            outputs["attentions"] = tuple(change(rows) for rows in outputs.attentions)
            return outputs

        return run

    for change, message in (
        (lambda rows: rows * 1.01, "sum to"),
        (lambda rows: rows[:, 0], r"gives \(2, 9, 9\) as attention"),
    ):
        monkeypatch.setattr(type(model), "forward", broken(change))
        with pytest.raises(EvaluationError, match=message):
            get_attention_patterns(model, None, None, inputs=inputs)
    monkeypatch.setattr(type(model), "forward", broken(lambda rows: rows[:, :, 1:]))
    with pytest.raises(ModelError, match="is no token"):
        get_attention_patterns(model, None, None, inputs=inputs)


def test_the_map_may_be_given() -> None:
    model = build("llama")
    seen: list[AttentionCall] = []
    with observed_attention(model, seen.append):
        get_attention_patterns(model, None, None, [0], inputs=padded_inputs(), family=map_model(model))
    assert len(seen) == 1
