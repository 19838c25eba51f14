"""The multi-model document's snippets run as they stand; its models are tiny ones under their hub names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as T
from documents import Snippet
from huggingface_hub import constants

import tiny_models

DOCUMENT = Path(__file__).parents[3] / "shared" / "seeds" / "002_e7129df5df6cc4b7.txt"

UNIVERSAL = Snippet(
    text="""# Load and analyze any supported model
analyzer = MultiModelAnalyzer()

# GPT model analysis
analyzer.load_model("gpt2")
activations = analyzer.extract_activations("gpt2", ["Hello world"], [0, 6, 11])
attention = analyzer.get_attention_patterns("gpt2", ["Hello world"], [0, 6, 11])

# BERT model analysis
analyzer.load_model("bert-base-uncased")
bert_activations = analyzer.extract_activations("bert-base-uncased", ["Hello world"], [0, 6, 11])
bert_attention = analyzer.get_attention_patterns("bert-base-uncased", ["Hello world"], [0, 6, 11])

# Cross-model comparison
memory_usage = analyzer.get_memory_usage()
model_info = analyzer.get_model_info("gpt2")""",
    differences=(),
    before="from peftlab import MultiModelAnalyzer",
    after="""
assert list(activations) == list(bert_activations) == ["layer_0", "layer_6", "layer_11"]
assert activations["layer_6"].shape == (len(analyzer.load_model("gpt2").tokenizer("Hello world")["input_ids"]), 16)
for patterns, causal in ((attention, True), (bert_attention, False)):
    weights = patterns.weights["layer_11"]
    assert abs(float(weights.sum(-1).mean()) - 1) < 1e-5
    assert bool((weights.triu(1) == 0).all()) is causal
assert memory_usage["system_memory_gb"] > 0 and memory_usage["process_memory_gb"] > 0
assert "gpu_memory_gb" in memory_usage
assert model_info["num_layers"] == 12 and model_info["family"] == "gpt", model_info
""",
)

DETECTION = Snippet(
    text="""registry = UniversalModelRegistry()

# Automatic family detection
family = registry.detect_model_family("gpt2")  # Returns ModelFamily.GPT
family = registry.detect_model_family("bert-base-uncased")  # Returns ModelFamily.BERT

# Configuration retrieval
config = registry.get_model_config("gpt2")
# Returns: ModelConfig with layers=12, hidden_size=768, etc.""",
    differences=(),
    before="from peftlab import ModelFamily, UniversalModelRegistry",
    after="""
assert family is ModelFamily.BERT
assert registry.detect_model_family("gpt2") is ModelFamily.GPT
assert config.layers == config.num_layers == 12
assert (config.hidden_size, config.num_attention_heads, config.max_position_embeddings) == (768, 12, 1024)
assert config.num_parameters == 124_439_808
assert round(config.memory_requirements_gb, 2) == 0.46
""",
)

MEMORY = Snippet(
    text="""# Automatic optimization based on model size
adapter = GPTModelAdapter(config)
adapter.load_model("gpt-j-6B", device="auto")  # Uses device mapping
adapter.optimize_memory()  # Applies gradient checkpointing

# Memory monitoring
analyzer = MultiModelAnalyzer()
memory_stats = analyzer.get_memory_usage()
# Returns: {'system_memory_gb': 14.0, 'gpu_memory_gb': 8.5, ...}""",
    differences=(),
    before="""
from peftlab import GPTModelAdapter, MultiModelAnalyzer, UniversalModelRegistry
config = UniversalModelRegistry().get_model_config("gpt2")
""",
    after="""
assert adapter.config.architecture == "gptj"
assert adapter.model.is_gradient_checkpointing
assert {"system_memory_gb", "gpu_memory_gb", "system_memory_percent", "gpu_memory_percent"} <= memory_stats.keys()
""",
)

SNIPPETS = {"universal": UNIVERSAL, "detection": DETECTION, "memory": MEMORY}


def repository(home: Path, name: str) -> Path:
    """The folder of a hub name in a Hugging Face cache."""
    found = home / f"models--{name.replace('/', '--')}"
    (found / "refs").mkdir(parents=True)
    (found / "refs" / "main").write_text("0" * 40)
    return found / "snapshots" / ("0" * 40)


def save(folder: Path, model: Any, *, causal: bool) -> None:
    """A tiny model with a tokenizer that reads every text."""
    tiny_models.randomise(model).save_pretrained(folder)
    tiny_models.tokenizer(byte_level=True, opens=not causal, closes=not causal).save_pretrained(folder)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face caches: tiny models of the document's depth, and configs of the real sizes without weights."""
    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tiny, real = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("real")
    gpt2, bert = "openai-community/gpt2", "google-bert/bert-base-uncased"
    save(repository(tiny, gpt2), T.GPT2LMHeadModel(T.GPT2Config(**small, **special)), causal=True)
    save(repository(tiny, bert), T.BertForMaskedLM(T.BertConfig(**small, intermediate_size=24)), causal=False)
    small |= {"num_hidden_layers": 2, "rotary_dim": 2}
    save(
        repository(tiny, "EleutherAI/gpt-j-6b"),
        T.GPTJForCausalLM(T.GPTJConfig(**small, **special)),
        causal=True,
    )
    T.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(repository(real, gpt2))
    T.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(repository(real, bert))
    return {"universal": tiny, "memory": tiny, "detection": real}


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name: str, hubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hubs[name]))  # where HF_HOME would put it
    exec(compile(SNIPPETS[name].runnable(), name, "exec"), {})


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_stands_in_the_document(name: str) -> None:
    if not DOCUMENT.exists():
        pytest.skip(f"needs {DOCUMENT}, which is not part of the repository")
    document = DOCUMENT.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = SNIPPETS[name].text.splitlines()
    assert "\n".join(line.rstrip() for line in wanted) in "\n".join(line.rstrip() for line in document)


def test_every_difference_has_a_reason() -> None:
    assert all(reason for snippet in SNIPPETS.values() for _, _, reason in snippet.differences)
