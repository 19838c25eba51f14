"""Families by facts, sizes from the real config and structure, and paths that resolve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import tiny_models
from peftlab.errors import ModelError
from peftlab.mapping import map_model
from peftlab.model_config import LayerMapping, tokenizer_kind
from peftlab.model_facts import ModelFacts, decide_family, empty_model, read_facts
from peftlab.model_registry import ModelFamily, UniversalModelRegistry

LABELS: dict[ModelFamily, str] = {
    ModelFamily.GPT: "gpt2 gpt_neo gptj gpt_neox codegen opt bloom falcon phi",
    ModelFamily.BERT: """bert roberta distilbert deberta deberta-v2 electra albert xlm-roberta mpnet modernbert camembert
        eurobert fnet""",
    ModelFamily.T5: "t5 mt5 umt5 switch_transformers",
    ModelFamily.LLAMA: """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 mixtral olmo olmo2 stablelm cohere granite
        qwen2_moe gpt_oss""",
    ModelFamily.BART: "bart mbart pegasus marian plbart m2m_100 led",
    ModelFamily.VISION: "vit deit beit dinov2 clip siglip swin",
    ModelFamily.OTHER: "rwkv",
}
"""Model types by what they are known to be."""

TYPES = {name: family for family, names in LABELS.items() for name in names.split()}
SMALLER: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "led": {"encoder_layers": 2, "decoder_layers": 2, "attention_window": [64, 64]},
    "swin": {"depths": [1, 1], "num_heads": [3, 6]},
}
"""What replaces two layers where a config counts otherwise."""


def config_of(name: str) -> Any:
    """The default config of a model type, with two layers."""
    return T.AutoConfig.for_model(name, **SMALLER.get(name, {"num_hidden_layers": 2}))


@pytest.fixture(scope="module")
def registry() -> UniversalModelRegistry:
    return UniversalModelRegistry()


def test_the_list_is_long_enough() -> None:
    assert len(TYPES) >= 40


@pytest.mark.parametrize("name", TYPES)
def test_family_of_every_labelled_type(name: str, registry: UniversalModelRegistry, tmp_path: Path) -> None:
    folder = tmp_path / "a-model-without-a-telling-name"
    config_of(name).save_pretrained(folder)
    assert registry.detect_model_family(str(folder)) is TYPES[name]


def test_the_decision_table() -> None:
    def family(**changes: Any) -> ModelFamily:
        facts: dict[str, Any] = {
            "reads_tokens": True, "reads_pixels": False, "is_encoder_decoder": False, "is_causal": True,
            "has_attention": True, "norm": "layernorm", "has_gated_mlp": False, "has_relative_attention": False,
        }  # fmt: skip
        return decide_family(ModelFacts(**facts | changes))

    assert family() is ModelFamily.GPT
    assert family(norm="rmsnorm") is ModelFamily.LLAMA
    assert family(norm="none") is ModelFamily.OTHER
    assert family(norm="none", has_gated_mlp=True) is ModelFamily.LLAMA
    assert family(has_attention=False) is ModelFamily.OTHER
    assert family(is_causal=None) is ModelFamily.OTHER
    assert family(is_causal=False, norm="mixed") is ModelFamily.BERT
    assert family(is_encoder_decoder=True) is ModelFamily.BART
    assert family(is_encoder_decoder=True, norm="rmsnorm", is_causal=None) is ModelFamily.T5
    assert family(is_encoder_decoder=True, norm="unproven") is ModelFamily.OTHER
    assert family(reads_pixels=True) is ModelFamily.VISION
    assert family(reads_tokens=False) is ModelFamily.OTHER


def test_facts_are_those_of_the_config_not_of_the_type(
    registry: UniversalModelRegistry, tmp_path: Path
) -> None:
    T.BertConfig(num_hidden_layers=2, is_decoder=True).save_pretrained(tmp_path / "bert")
    assert registry.detect_model_family(str(tmp_path / "bert")) is ModelFamily.GPT  # it looks back only
    model = empty_model(T.T5Config(num_layers=1, feed_forward_proj="gated-gelu"))
    assert read_facts(model, map_model(model)).has_gated_mlp
    for relative in (True, False):
        model = empty_model(T.DebertaConfig(num_hidden_layers=1, relative_attention=relative))
        assert read_facts(model, map_model(model)).has_relative_attention is relative


def test_an_unknown_model_is_an_error(registry: UniversalModelRegistry, tmp_path: Path) -> None:
    for ask in (registry.detect_model_family, registry.get_model_config, registry.create_adapter):
        with pytest.raises(
            ModelError, match=r"no model 'gpt22' \(did you mean 'gpt2'\?\).*Hugging Face cache"
        ):
            ask("gpt22")
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ModelError, match="has no config that transformers can read"):
        registry.detect_model_family(str(tmp_path))


def test_an_unproved_model_says_so(
    registry: UniversalModelRegistry, tmp_path: Path, monkeypatch: Any
) -> None:
    from peftlab.certificate import Certificate
    from peftlab.mapping import assembly

    monkeypatch.setattr(
        assembly, "certify", lambda model: Certificate("GPT2", "gpt2", problem="no twin runs")
    )
    folder = tiny_models.save_model(tmp_path / "m", "gpt2")
    assert registry.detect_model_family(str(folder)) is ModelFamily.OTHER
    assert "no twin runs" in registry.get_model_config(str(folder)).notes


SIZES = {  # decoder layers, positions, inner width, RMSNorm, relative attention, encoder-decoder
    "llama": (None, 64, 24, True, False, False),
    "llama_tied": (None, 64, 24, True, False, False),
    "gpt2": (None, 64, 4 * tiny_models.HIDDEN, False, False, False),
    "bert": (None, 64, 24, False, False, False),
    "t5": (2, None, 24, True, True, True),
    "opt": (None, 64, 24, False, False, False),
    "gptj": (None, 64, 4 * tiny_models.HIDDEN, False, False, False),
    "bloom": (None, None, 4 * tiny_models.HIDDEN, False, False, False),
    "phi3": (None, 64, 24, True, False, False),
    "bart": (2, 64, 24, False, False, True),
    "distilbert": (None, 64, 24, False, False, False),
    "mixtral": (None, 64, 24, True, False, False),
}


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_sizes_and_paths_are_the_models_own(
    name: str, registry: UniversalModelRegistry, tmp_path: Path
) -> None:
    folder = tiny_models.save_model(tmp_path / name, name)
    config, model = registry.get_model_config(str(folder)), tiny_models.build(name)
    assert (config.num_layers, config.layers) == (2, 2)
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (16, 4, 64)
    assert SIZES[name] == (
        config.num_decoder_layers, config.max_position_embeddings, config.intermediate_size, config.uses_rms_norm,
        config.has_relative_attention, config.is_encoder_decoder,
    )  # fmt: skip
    assert config.class_name == type(model).__name__
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert config.memory_requirements_gb == pytest.approx(held / 2**30)
    assert config.supports_gradient_checkpointing
    assert config.supports_mixed_precision
    assert (config.tokenizer_type, config.notes) == ("WordLevel", ())
    assert config.special_tokens["pad_token"] == "<pad>"
    check_mapping(config.layer_mapping, model)


def check_mapping(mapping: LayerMapping, model: Any) -> None:
    """Every path resolves, and there is one of each part for every layer."""
    lists = [mapping.transformer_layers, *mapping.stacks.values()]
    assert all(isinstance(model.get_submodule(path), torch.nn.ModuleList) for path in lists)
    num_layers = sum(len(model.get_submodule(path)) for path in mapping.stacks.values())
    for path in (*mapping.attention, *mapping.mlp, *mapping.layer_norm, *mapping.cross_attention):
        assert path.startswith(tuple(lists))
        model.get_submodule(path)
    assert len(mapping.attention) == num_layers
    assert len(mapping.mlp) >= num_layers
    assert len(mapping.layer_norm) >= num_layers
    two_sided = bool(model.config.is_encoder_decoder)
    assert len(mapping.cross_attention) == (len(model.get_submodule(mapping.decoder)) if two_sided else 0)
    assert (mapping.encoder is None) is not two_sided


def test_the_documents_paths() -> None:
    expected = {
        "gpt2": "transformer.h",
        "bert": "bert.encoder.layer",
        "distilbert": "distilbert.transformer.layer",
    }
    expected |= {"t5": "encoder.block", "llama": "model.layers"}
    for name, path in expected.items():
        family = map_model(tiny_models.build(name))
        assert LayerMapping.of(family, "encoder" if name == "t5" else "layers").transformer_layers == path
    mapping = LayerMapping.of(family := map_model(tiny_models.build("t5")), "encoder", stack="decoder")
    assert (mapping.transformer_layers, mapping.decoder) == ("decoder.block", "decoder.block")
    assert all(path.startswith("decoder.") for path in mapping.attention)
    assert len(mapping.attention) == family.num_blocks("decoder")


def test_shared_blocks_count_as_layers(registry: UniversalModelRegistry, tmp_path: Path) -> None:
    T.AlbertConfig(num_hidden_layers=5, hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    assert registry.get_model_config(str(tmp_path)).num_layers == 5


def test_two_towers_are_known_by_the_one_that_sees(registry: UniversalModelRegistry, tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text, vision = small | {"num_hidden_layers": 1, "vocab_size": 64}, small | {"num_hidden_layers": 3}
    T.CLIPConfig(text_config=text, vision_config=vision).save_pretrained(tmp_path)
    config = registry.get_model_config(str(tmp_path))
    assert (config.num_layers, config.vocab_size, len(config.layer_mapping.stacks)) == (3, 64, 2)
    assert "vision" in config.layer_mapping.transformer_layers
    assert config.intermediate_size == 48
    assert "has no tokenizer beside it" in config.notes[-1]


def test_a_domain_is_said_not_guessed(registry: UniversalModelRegistry, tmp_path: Path) -> None:
    folder = tiny_models.save_model(tmp_path / "scibert-like", "bert")
    assert registry.get_model_config(str(folder)).families == (ModelFamily.BERT,)
    fresh = UniversalModelRegistry()
    fresh.register("lab-bert", str(folder), domain="chemistry")
    config = fresh.get_model_config("Lab-BERT")
    assert config.domain == "chemistry"
    assert config.families == (ModelFamily.BERT, ModelFamily.DOMAIN_SPECIFIC)
    assert type(fresh.create_adapter("lab-bert")).__name__ == "DomainSpecificAdapter"


def test_register(registry: UniversalModelRegistry) -> None:
    fresh = UniversalModelRegistry()
    fresh.register("mine", "someone/mine")
    assert "mine" in fresh.list_supported_models()
    assert "mine" not in registry.list_supported_models()
    with pytest.raises(ModelError, match="stands for openai-community/gpt2"):
        fresh.register("GPT2", "someone/else")
    with pytest.raises(ModelError, match="cannot be a short name"):
        fresh.register("a/b", "someone/else")


def test_the_embedded_base(registry: UniversalModelRegistry) -> None:
    config = registry.get_model_config("peftlab/tiny-base")
    assert config.family is ModelFamily.LLAMA
    assert config.tokenizer_type == "BPE"


def test_kinds_of_tokenizers() -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    def kind(made: Tokenizer) -> str:
        return tokenizer_kind(T.PreTrainedTokenizerFast(tokenizer_object=made))

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert kind(made) == "BPE"
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")  # Llama's and Gemma's
    assert kind(made) == "SentencePiece BPE"
    made = Tokenizer(models.Unigram([("a", 0.0)]))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    assert kind(made) == "SentencePiece Unigram"
    assert kind(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))) == "WordPiece"


def test_memory_is_predicted_when_it_is_asked_for(
    registry: UniversalModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from peftlab.memory import fitting

    config = registry.get_model_config(str(tiny_models.save_model(tmp_path / "gpt2", "gpt2")))
    context = 600 / 1024  # GB that CUDA takes beside tensors
    assert context < config.min_gpu_memory_gb < context + 0.01
    asked = []
    monkeypatch.setattr(
        fitting, "choose_batch_size", lambda run: asked.append(run) or SimpleNamespace(batch_size=24)
    )
    assert (config.recommended_batch_size, config.recommended_batch_size) == (24, 24)
    (run,) = asked  # remembered
    assert (run.model.name, run.task.max_length) == (config.location, 64)
    T.ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError):
        _ = registry.get_model_config(str(tmp_path / "vit")).min_gpu_memory_gb
