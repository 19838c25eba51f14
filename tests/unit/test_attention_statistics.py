"""Streamed statistics against those of the whole maps, counted the long way; and that no map is made on the way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as T
from attention_models import CAUSAL, padded_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.errors import ConfigError, DataError
from peftlab.inspection.attention import AttentionPatterns, get_attention_patterns
from peftlab.inspection.attention_statistics import HeadStatistics, get_attention_statistics
from peftlab.inspection.reading_limits import ReadingLimits
from tiny_models import build, tokenizer

FIELDS = ("entropy", "sink_mass", "distance", "same_token_mass", "previous_token_mass")


def _long_way(patterns: AttentionPatterns, layer: str, row: int, head: int) -> dict[str, float]:
    """The five numbers of one head in one text, probability by probability."""
    rows = patterns.weights[layer][row, head].tolist()
    queries = [i for i, real in enumerate(patterns.query_real[row].tolist()) if real]
    first = patterns.key_real[row].tolist().index(True)
    before = [i for i in queries if i > first]
    own = patterns.kind == "self"
    return {
        "entropy": sum(-p * math.log(p) for i in queries for p in rows[i] if p > 0) / len(queries),
        "sink_mass": sum(rows[i][first] for i in queries) / len(queries),
        "distance": sum(p * abs(i - k) for i in queries for k, p in enumerate(rows[i])) / len(queries)
        if own
        else 0.0,
        "same_token_mass": sum(rows[i][i] for i in queries) / len(queries) if own else 0.0,
        "previous_token_mass": sum(rows[i][i - 1] for i in before) / len(before) if own else 0.0,
    }


def _same(statistics: HeadStatistics, patterns: AttentionPatterns, layer: str) -> None:
    """Streamed and counted numbers agree in every text and head."""
    texts, heads = statistics.entropy.shape
    for row in range(texts):
        for head in range(heads):
            for name, expected in _long_way(patterns, layer, row, head).items():
                value = getattr(statistics, name)
                if patterns.kind == "cross" and name not in ("entropy", "sink_mass"):
                    assert value is None
                else:
                    assert float(value[row, head]) == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_streamed_statistics_equal_those_of_the_maps(name: str, pad: str, chunk: int) -> None:
    make, implementation = CAUSAL[name]
    model, inputs = make(implementation), padded_inputs(pad=pad)
    patterns = get_attention_patterns(model, None, None, inputs=inputs)
    statistics = get_attention_statistics(model, None, None, inputs=inputs, chunk=chunk)
    assert list(statistics.layers) == ["layer_0", "layer_1"]
    for layer, heads in statistics.layers.items():
        _same(heads, patterns, layer)
        if name == "gpt_oss":
            real = inputs["attention_mask"].sum(dim=1, keepdim=True)
            expected = patterns.sinks[layer].sum(dim=-1) / real
            torch.testing.assert_close(heads.learnt_sink_mass, expected, atol=1e-5, rtol=0)
        else:
            assert heads.learnt_sink_mass is None


@pytest.mark.parametrize("name", ["gptj", "bert"])
def test_models_beside_the_interface_and_encoders(name: str) -> None:
    model, inputs = build(name), padded_inputs()
    patterns = get_attention_patterns(model, None, None, [1], heads=[2, 1], inputs=inputs)
    statistics = get_attention_statistics(model, None, None, [1], heads=[2, 1], inputs=inputs, chunk=2)
    assert statistics.source == patterns.source == ("output_attentions" if name == "gptj" else "probe")
    assert statistics.layers["layer_1"].entropy.shape == (2, 2)
    _same(statistics.layers["layer_1"], patterns, "layer_1")


def test_cross_attention_has_no_distances() -> None:
    inputs = padded_inputs() | {f"decoder_{key}": value for key, value in padded_inputs(6).items()}
    patterns = get_attention_patterns(build("bart"), None, None, kind="cross", inputs=inputs)
    statistics = get_attention_statistics(build("bart"), None, None, kind="cross", inputs=inputs, chunk=4)
    for layer, heads in statistics.layers.items():
        _same(heads, patterns, layer)


def _word_means(
    rows: torch.Tensor,
    words: list[int],
    key_words: list[int],
    query_real: torch.Tensor,
    key_real: torch.Tensor,
) -> torch.Tensor:
    """Word by word from one text's maps (heads, query, key), sum over keys and mean over queries."""
    queries, keys = query_real.nonzero()[:, 0].tolist(), key_real.nonzero()[:, 0].tolist()
    result = torch.zeros(rows.shape[0], max(words) + 1, max(key_words) + 1)
    for word in range(max(words) + 1):
        asking = [q for q, w in zip(queries, words, strict=True) if w == word]
        for key_word in range(max(key_words) + 1):
            asked = [k for k, w in zip(keys, key_words, strict=True) if w == key_word]
            result[:, word, key_word] = rows[:, asking][..., asked].sum(dim=-1).mean(dim=-1)
    return result


@pytest.mark.parametrize("pad", ["left", "right"])
def test_word_by_word_attention(pad: str) -> None:
    model, inputs = build("llama"), padded_inputs(pad=pad)
    words = [[-1, 0, 0, 1, 2, 2, 2, 3, -1], [-1, 0, 1, 1, -1, 2]]
    patterns = get_attention_patterns(model, None, None, inputs=inputs)
    statistics = get_attention_statistics(model, None, None, inputs=inputs, words=words, chunk=4)
    for layer, heads in statistics.layers.items():
        assert heads.words is not None
        for row, found in enumerate(heads.words):
            real = patterns.query_real[row]
            expected = _word_means(patterns.weights[layer][row], words[row], words[row], real, real)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [m.shape for m in statistics.layers["layer_0"].words or ()] == [(4, 4, 4), (4, 3, 3)]


def test_word_by_word_across() -> None:
    inputs = padded_inputs() | {f"decoder_{key}": value for key, value in padded_inputs(6).items()}
    words, key_words = [[-1, 0, 0, 1, 1, 1], [-1, 0, 1]], [[0, 0, 1, 2, 2, 3, 3, 4, -1], [0, 1, 1, 2, 2, -1]]
    model = build("t5")
    patterns = get_attention_patterns(model, None, None, [1], kind="cross", inputs=inputs)
    statistics = get_attention_statistics(
        model, None, None, [1], kind="cross", inputs=inputs, words=words, key_words=key_words
    )
    for row, found in enumerate(statistics.layers["layer_1"].words or ()):
        expected = _word_means(
            patterns.weights["layer_1"][row],
            words[row],
            key_words[row],
            patterns.query_real[row],
            patterns.key_real[row],
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_words_must_match_the_tokens() -> None:
    model = build("llama")
    for words, message in (
        ([[0] * 9, [0] * 5], "words of text 1 are 5 numbers, but it has 6 tokens"),
        ([[0] * 9], "words for 1 texts, but there are 2 texts"),
        ([[0] * 8 + [-2], [0] * 6], "or -1"),
    ):
        with pytest.raises(DataError, match=message):
            get_attention_statistics(model, None, None, inputs=padded_inputs(), words=words)


def test_batches_of_like_length_come_back_in_the_order_of_the_texts() -> None:
    model, words = build("llama"), tokenizer()
    texts = [
        "a cat sits on the small mat",
        "dog",
        "the bird flies over the house and the tree",
        "a big dog runs",
    ]
    spans = [[-1, *range(len(text.split()))] for text in texts]
    together = get_attention_statistics(model, words, texts, batch_size=2, words=spans).layers["layer_1"]
    for i, text in enumerate(texts):
        alone = get_attention_statistics(model, words, [text], words=spans[i : i + 1]).layers["layer_1"]
        for name in FIELDS:
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name)[0], atol=1e-5, rtol=0)
        assert together.words is not None
        assert alone.words is not None
        torch.testing.assert_close(together.words[i], alone.words[0], atol=1e-5, rtol=0)


def test_a_text_of_one_token_has_no_previous_token() -> None:
    statistics = get_attention_statistics(
        build("llama"), None, None, inputs={"input_ids": torch.tensor([[5]])}
    )
    heads = statistics.layers["layer_0"]
    assert heads.previous_token_mass is not None
    assert heads.previous_token_mass.isnan().all()
    assert heads.same_token_mass is not None
    assert heads.same_token_mass.tolist() == [[1.0] * 4]


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().size():
                self.numbers = max(self.numbers, tensor.untyped_storage().size() // tensor.element_size())
        return result


def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    config = T.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=2048,
    )  # fmt: skip
    model = T.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    length, chunk = 1024, 16
    words = [[i // 32 for i in range(length)]]
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(0))
    with _Largest() as largest:
        get_attention_statistics(model, None, None, inputs={"input_ids": ids}, words=words, chunk=chunk)
    assert largest.numbers <= 4 * chunk * length < length * length
    with _Largest() as largest:
        get_attention_patterns(model, None, None, [0], heads=[0], inputs={"input_ids": ids})
    assert largest.numbers >= length * length


def test_texts_are_checked_before_any_runs_and_named_by_their_numbers() -> None:
    model, words = build("gpt2"), tokenizer()
    ran: list[int] = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: ran.append(1))
    texts = ["the " * 64, "cat", "a dog"]
    with pytest.raises(DataError, match=r"text 0 has 65 tokens, the model reads 64: give max_length=64"):
        get_attention_statistics(model, words, texts, batch_size=1)
    assert not ran
    cut = get_attention_statistics(model, words, iter(texts), iter([0]), batch_size=1, max_length=64)
    assert len(ran) == 3
    alone = get_attention_statistics(model, words, [texts[1]], [0]).layers["layer_0"]
    torch.testing.assert_close(cut.layers["layer_0"].entropy[1:2], alone.entropy)
    for given, message in (
        ({"texts": [*texts[1:], None]}, r"texts\[2\] is 'None' of type NoneType: expected a text"),
        ({"texts": ["a", ""], "tokenizer": tokenizer(opens=False)}, "text 1 has no tokens"),
        ({"texts": ["cat"], "words": []}, "words for 0 texts, but there are 1 texts"),
        ({"texts": ["cat"], "decoder_texts": ["a", "b"]}, "decoder_texts for 2 texts, but there are 1"),
    ):
        with pytest.raises(DataError, match=message):
            get_attention_statistics(model, **{"tokenizer": words} | given)
    with pytest.raises(ConfigError, match="batch_size 0"):
        get_attention_statistics(model, words, ["cat"], batch_size=0)


@pytest.mark.parametrize(
    ("name", "settings", "positions"),
    [
        ("Mpt", {"max_seq_len": 20}, (20, 20)),
        ("Roberta", {"max_position_embeddings": 20, "pad_token_id": 1}, (18, 18)),
        ("MarkupLM", {"max_position_embeddings": 20, "pad_token_id": 0}, (19, 19)),  # counts likewise, from 1
        ("LED", {"max_encoder_position_embeddings": 20, "max_decoder_position_embeddings": 12}, (20, 12)),
        ("Bloom", {}, (None, None)),
        ("T5", {}, (None, None)),
    ],
)
def test_how_much_a_model_reads_is_found_in_its_config_and_its_tables(
    name: str, settings: dict[str, Any], positions: tuple[int | None, int | None]
) -> None:
    with torch.device("meta"):
        model = getattr(T, f"{name}Model")(getattr(T, f"{name}Config")(vocab_size=64, **settings))
    limits = ReadingLimits(model)
    assert limits.positions == positions
    assert limits.vocabulary == (64, 64)
    words = tokenizer()
    words.model_max_length = 15
    assert ReadingLimits(model, words).positions == tuple(min(most or 15, 15) for most in positions)
    if positions[0] is not None:
        assert (
            ReadingLimits(model, words, 17).positions == positions
        )  # cut, so the tokenizer's own does not count
