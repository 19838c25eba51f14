"""Extracted activations are the model's own hidden states, and the model is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as T

import tiny_models
from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.inspection.activations import extract_activations
from peftlab.inspection.block_outputs import BlockOutputs
from peftlab.mapping import map_model

TEXTS = (
    "the cat sits on the mat",
    "dog",
    "a blue bird and a red bird fly over the big green house , under the tree",
    "small house",
    "price : high = area riverside",
) * 2
TARGETS = tuple(f"red {text}" if i % 2 else "big" for i, text in enumerate(TEXTS))
LAYERS = 3
BAR = 1e-5


def tokenizer_for(name: str) -> Any:
    causal = tiny_models.HEADS[name] == "causal"
    return tiny_models.tokenizer(opens=causal, closes=not causal)


@torch.no_grad()
def hidden_states(model: Any, tokenizer: Any, text: str, target: str | None = None) -> list[torch.Tensor]:
    """The reference: transformers' hidden states of one text alone, from the first block's on, each (tokens, hidden)."""
    inputs = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
    two_sided = model.config.is_encoder_decoder
    if two_sided:
        inputs["labels"] = torch.tensor([tokenizer(target or "a")["input_ids"]])
    output = model(**inputs, output_hidden_states=True)
    states = output.hidden_states if not two_sided else output.encoder_hidden_states
    return [s[0] for s in (output.decoder_hidden_states if target else states)[1:]]


def largest_difference(found: Any, layer: int, text: int, expected: torch.Tensor) -> float:
    rows = torch.as_tensor(found[f"layer_{layer}"][found.rows_of(text)])
    assert rows.shape == expected.shape
    return float((rows - expected).abs().max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "opt", "distilbert", "bloom"])
@pytest.mark.parametrize("batch_tokens", [1, 40])
def test_rows_are_the_hidden_states_of_each_text_alone(name: str, batch_tokens: int) -> None:
    model, tokenizer = tiny_models.build(name, LAYERS), tokenizer_for(name)
    found = extract_activations(model, tokenizer, TEXTS, [1, 0], batch_tokens=batch_tokens)
    assert list(found) == ["layer_0", "layer_1"]
    assert found.proof == "equal"
    assert found.rows["text"].tolist() == sorted(found.rows["text"].tolist())
    for i, text in enumerate(TEXTS):
        expected = hidden_states(model, tokenizer, text)
        for layer in (0, 1):
            assert largest_difference(found, layer, i, expected[layer]) < BAR


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
def test_the_last_layer_is_before_the_final_norm(name: str) -> None:
    """Transformers gives it after the norm, in silence."""
    model, tokenizer = tiny_models.build(name, LAYERS), tokenizer_for(name)
    norms = {"llama": "model.norm", "gpt2": "transformer.ln_f", "t5": "encoder.final_layer_norm"}
    norm = model.get_submodule(norms.get(name, "model.decoder.final_layer_norm"))
    found = extract_activations(model, tokenizer, TEXTS, [LAYERS - 1])
    for i, text in enumerate(TEXTS[:5]):
        normed = hidden_states(model, tokenizer, text)[-1]
        rows = found[f"layer_{LAYERS - 1}"][found.rows_of(i)]
        assert (rows - normed).abs().max() > 0.1
        assert (norm(rows) - normed).abs().max() < BAR


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_reads_what_it_has_written(name: str) -> None:
    model, tokenizer = tiny_models.build(name, LAYERS), tokenizer_for(name)
    found = extract_activations(
        model, tokenizer, TEXTS, [0, 1], stack="decoder", decoder_texts=TARGETS, batch_tokens=60
    )
    for i, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        expected = hidden_states(model, tokenizer, text, target)
        assert largest_difference(found, 1, i, expected[1]) < BAR
        characters = found.rows[found.rows_of(i)][["character_start", "character_end"]].tolist()
        assert [target[a:b] for a, b in characters] == [
            "",
            *target.split(),
        ]  # the start token, then its words
    ids = [[2, *tokenizer(target)["input_ids"][:-1]] for target in TARGETS]  # another start than T5's own
    given = extract_activations(model, tokenizer, TEXTS, [1], stack="decoder", decoder_texts=ids)
    assert given["layer_1"].shape == found["layer_1"].shape
    assert torch.allclose(given["layer_1"], found["layer_1"], atol=BAR) == (name == "bart")


def test_poolings_are_means_over_tokens() -> None:
    model, tokenizer = tiny_models.build("bert", 2), tiny_models.tokenizer(byte_level=True, closes=True)
    tokenizer.cls_token = "<s>"
    model.resize_token_embeddings(300)
    texts = ["small  house", "the tree ,", " "]
    tokens = extract_activations(model, tokenizer, texts, [1])
    taken = {
        pooling: extract_activations(model, tokenizer, texts, [1], pooling=pooling)
        for pooling in ("word", "mean", "last", "cls")
    }
    for i in range(len(texts)):
        states = tokens["layer_1"][tokens.rows_of(i)]
        for pooling, expected in {"mean": states.mean(0), "last": states[-1], "cls": states[0]}.items():
            assert largest_difference(taken[pooling], 1, i, expected[None]) < BAR
        word_of_token = tokens.rows[tokens.rows_of(i)]["word"]
        words = [
            states[torch.from_numpy(word_of_token == word)].mean(0) for word in range(word_of_token.max() + 1)
        ]
        expected = torch.stack(words) if words else torch.empty(0, states.shape[1])
        rows = taken["word"]["layer_1"][taken["word"].rows_of(i)]
        assert torch.allclose(rows, expected, atol=BAR)
    spans = taken["word"].rows
    said = [texts[row["text"]][row["character_start"] : row["character_end"]] for row in spans]
    assert said == ["small", "house", "the", "tree", ","]
    assert spans["word"].tolist() == [0, 1, 0, 1, 2]
    assert all(int(row["token_end"]) > int(row["token_start"]) >= 1 for row in spans)


def state(model: Any) -> Any:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return hooks, [m.training for m in model.modules()], model.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_model_is_left_as_it_was_also_after_an_error(name: str) -> None:
    model, tokenizer = tiny_models.build(name, LAYERS).train(), tokenizer_for(name)
    model.get_submodule(map_model(model).blocks()[0].path).eval()  # one part in another mode
    before = state(model)
    extract_activations(model, tokenizer, TEXTS, [0])
    assert state(model) == before

    def fail(*_: Any) -> None:
        assert not model.training
        raise RuntimeError("within the model")

    handle = model.get_submodule(map_model(model).blocks()[1].path).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="within the model"):
        extract_activations(model, tokenizer, TEXTS, [1])
    handle.remove()
    assert state(model) == before


def test_dropout_is_off() -> None:
    config = T.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.9)
    model, tokenizer = T.GPT2LMHeadModel(config).train(), tokenizer_for("gpt2")
    first, second = (extract_activations(model, tokenizer, TEXTS, [1])["layer_1"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "stack"), [("gpt2", None), ("bart", None), ("bart", "decoder")])
def test_neither_later_blocks_nor_the_head_run(name: str, stack: str | None) -> None:
    model, tokenizer = tiny_models.build(name, LAYERS), tokenizer_for(name)
    ran: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: ran.add(path))
    targets = TARGETS if stack else None
    extract_activations(model, tokenizer, TEXTS, [1], stack=stack, decoder_texts=targets)
    blocks = [site.path for site in map_model(model).blocks(stack or next(iter(map_model(model).stacks)))]
    assert [path in ran for path in blocks] == [True, True, False]
    assert "lm_head" not in ran
    assert any("decoder" in path for path in ran) == bool(stack)


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_an_adapter_is_seen(kind: str) -> None:
    base, tokenizer = tiny_models.build("llama", LAYERS), tokenizer_for("llama")
    plain = extract_activations(base, tokenizer, TEXTS, [1])["layer_1"]
    config = {
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    model = peft.get_peft_model(base, config).eval()
    found = extract_activations(model, tokenizer, TEXTS, [0, 1], batch_tokens=40)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        expected = states.hidden_states[2][0, -ids.shape[1] :]
        assert largest_difference(found, 1, i, expected) < BAR
    assert (found["layer_1"] - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.allclose(extract_activations(model, tokenizer, TEXTS, [1])["layer_1"], plain, atol=BAR)


def test_pads_do_no_harm_where_a_model_mixes_past_the_mask() -> None:
    """ConvBERT's convolutions see pads whatever the mask says: its texts are not padded."""
    config = T.ConvBertConfig(
        vocab_size=64, hidden_size=16, embedding_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, conv_kernel_size=3, max_position_embeddings=64,
    )  # fmt: skip
    model, tokenizer = tiny_models.randomise(T.ConvBertModel(config)).eval(), tokenizer_for("bert")
    found = extract_activations(model, tokenizer, TEXTS, [0, 1])
    for i, text in enumerate(TEXTS):
        assert largest_difference(found, 1, i, hidden_states(model, tokenizer, text)[1]) < BAR


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "opt", "distilbert", "bloom"])
def test_texts_of_all_lengths_share_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These heed the mask, so one batch does after two passes that try the pads."""
    passes: list[int] = []
    run = BlockOutputs.run
    monkeypatch.setattr(BlockOutputs, "run", lambda *a, **options: (passes.append(1), run(*a, **options))[1])
    extract_activations(tiny_models.build(name), tokenizer_for(name), TEXTS, [1])
    assert len(passes) == 3


@pytest.mark.parametrize("num_groups", [1, 2])
def test_shared_blocks_are_told_apart_by_their_calls(num_groups: int) -> None:
    config = T.AlbertConfig(
        vocab_size=64, hidden_size=16, embedding_size=8, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=24, num_hidden_groups=num_groups,
    )  # fmt: skip
    model, tokenizer = tiny_models.randomise(T.AlbertModel(config)).eval(), tokenizer_for("bert")
    found = extract_activations(model, tokenizer, TEXTS, [0, 2])
    for i, text in enumerate(TEXTS):
        expected = hidden_states(model, tokenizer, text)
        for layer in (0, 2):
            assert largest_difference(found, layer, i, expected[layer]) < BAR
    with pytest.raises(ConfigError, match="has layers 0 to 3"):
        extract_activations(model, tokenizer, TEXTS, [4])


def test_a_stack_with_the_sequence_first() -> None:
    config = T.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=24)
    model, tokenizer = tiny_models.randomise(T.XLNetModel(config)).eval(), tokenizer_for("bert")
    found = extract_activations(model, tokenizer, TEXTS, [0, 1])
    for i, text in enumerate(TEXTS):
        assert largest_difference(found, 1, i, hidden_states(model, tokenizer, text)[1]) < BAR


def test_no_pad_token_is_needed() -> None:
    model, tokenizer = tiny_models.build("gpt2"), tokenizer_for("gpt2")
    expected = extract_activations(model, tokenizer, TEXTS, [0])["layer_0"]
    tokenizer.pad_token = None
    assert torch.equal(extract_activations(model, tokenizer, TEXTS, [0])["layer_0"], expected)


def test_values_can_be_trained_on() -> None:
    values = extract_activations(tiny_models.build("gpt2"), tokenizer_for("gpt2"), TEXTS, [0])["layer_0"]
    probe = torch.nn.Linear(values.shape[1], 2)
    probe(values).sum().backward()  # tensors of inference mode would refuse
    assert probe.weight.grad is not None


def test_dtypes() -> None:
    model, tokenizer = tiny_models.build("gpt2").to(torch.bfloat16), tokenizer_for("gpt2")
    assert extract_activations(model, tokenizer, TEXTS, [0])["layer_0"].dtype == torch.bfloat16
    half = extract_activations(model, tokenizer, TEXTS, [0], dtype=torch.float16)["layer_0"]
    assert half.dtype == torch.float16
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias.fill_(1e5)
    with pytest.raises(DataError, match="larger than float16 holds"):
        extract_activations(model, tokenizer, TEXTS, [0], dtype=torch.float16)


@pytest.mark.parametrize(
    ("texts", "layers", "settings", "error", "message"),
    [
        (TEXTS, [2], {}, ConfigError, r"layers \[2\]: the layers of this gpt2 model has layers 0 to 1"),
        (TEXTS, [-1], {}, ConfigError, r"layers \[-1\]"),
        (TEXTS, [], {}, ConfigError, r"layers \[\]"),
        (TEXTS, [0], {"stack": "decoder"}, ConfigError, "no stack 'decoder'.*there is: layers"),
        (TEXTS, [0], {"pooling": "max"}, ConfigError, "pooling 'max': expected one of token, word"),
        (TEXTS, [0], {"pooling": "cls"}, ConfigError, "has no CLS token"),
        (TEXTS, [0], {"dtype": torch.int8}, ConfigError, "floating-point"),
        (TEXTS, [0], {"batch_tokens": 0}, ConfigError, "batch_tokens 0"),
        (TEXTS, [0], {"max_length": 65}, ConfigError, "max_length 65: the model reads 1 to 64 tokens"),
        (TEXTS, [0], {"decoder_texts": TEXTS}, ConfigError, "decoder_texts are given but the layers"),
        ([], [0], {}, DataError, "at least one text"),
        ("the cat", [0], {}, DataError, "expected a list"),
        (None, [0], {}, DataError, "texts 'None': expected a list"),
        (["a", None], [0], {}, DataError, r"texts\[1\] is 'None' of type NoneType: expected a text"),
        (["the cat", "the " * 64], [0], {}, DataError, "text 1 has 65 tokens, the model reads 64.*max_length=64"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    texts: Any, layers: list[int], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, tokenizer = tiny_models.build("gpt2"), tokenizer_for("gpt2")
    with pytest.raises(error, match=message):
        extract_activations(model, tokenizer, texts, layers, **settings)


def test_more_bad_input(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("t5"), tiny_models.tokenizer(opens=False)
    with pytest.raises(DataError, match="give decoder_texts="):
        extract_activations(model, tokenizer, TEXTS, [0], stack="decoder")
    with pytest.raises(DataError, match="2 decoder_texts for 10 texts"):
        extract_activations(model, tokenizer, TEXTS, [0], stack="decoder", decoder_texts=["a", "b"])
    with pytest.raises(DataError, match="text 1 has no tokens"):
        extract_activations(model, tokenizer, ["a", ""], [0])
    with pytest.raises(DataError, match="text 1 has no tokens"):
        extract_activations(model, tokenizer, ["a", ""], [0], output=tmp_path / "a")
    assert not (tmp_path / "a").exists()  # found before anything ran
    for given, message in (
        ([], "0 decoder_texts for 10 texts"),
        ([3] * 10, r"decoder_texts\[0\] is '3' of type int: expected a text, or a list of token ids"),
        ([[3, 64]] * 10, "decoder text 0 has the token id 64, the model knows 0 to 63"),
        ([[2**40]] * 10, "decoder text 0 has the token id"),
    ):
        with pytest.raises(DataError, match=message):
            extract_activations(model, tokenizer, TEXTS, [0], stack="decoder", decoder_texts=given)
    other = tiny_models.tokenizer(byte_level=True, opens=False)
    for output in (None, tmp_path / "b"):
        with pytest.raises(
            DataError, match=r"text 0 has the token id \d+, the model knows 0 to 63: give the tok"
        ):
            extract_activations(model, other, TEXTS, [0], output=output)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ModelError, match="has no weights"):
        extract_activations(tiny_models.build("gpt2").to("meta"), tokenizer, TEXTS, [0])


def test_of_two_towers_the_one_that_reads_can_be_looked_at() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = sizes | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = T.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 8, "patch_size": 4})
    model, tokenizer = tiny_models.randomise(T.CLIPModel(config)).eval(), tokenizer_for("bert")
    reads, sees = map_model(model).stacks
    with pytest.raises(ConfigError, match=f"several stacks: give stack=, one of {reads}, {sees}"):
        extract_activations(model, tokenizer, TEXTS, [0])
    with pytest.raises(ModelError, match="around vision_model takes input_ids, so it reads no text"):
        extract_activations(model, tokenizer, TEXTS, [0], stack=sees)
    found = extract_activations(model, tokenizer, TEXTS, np.arange(2), stack=reads)
    for i, words in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(words)["input_ids"]])
        states = model.text_model(ids, output_hidden_states=True).hidden_states
        assert largest_difference(found, 0, i, states[1][0].detach()) < BAR


def test_texts_are_cut_where_asked_and_positions_are_counted_as_the_model_does() -> None:
    config = T.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=22, pad_token_id=1,
    )  # fmt: skip
    model, tokenizer = T.RobertaModel(config).eval(), tokenizer_for("bert")
    with pytest.raises(DataError, match="the model reads 20"):  # two positions lie before the first token's
        extract_activations(model, tokenizer, ["the " * 22], [0])
    found = extract_activations(model, tokenizer, ["the " * 22, "a cat"], [0], max_length=20)
    assert [len(found.rows[found.rows_of(i)]) for i in (0, 1)] == [20, 3]


def test_virtual_tokens_take_positions() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_models.build("gpt2"), config).eval()
    with pytest.raises(DataError, match="text 0 has 61 tokens, the model reads 60"):
        extract_activations(model, tokenizer_for("gpt2"), ["the " * 60], [0])
    assert len(extract_activations(model, tokenizer_for("gpt2"), ["the " * 59], [0]).rows) == 60


def test_texts_may_come_one_after_another() -> None:
    model, tokenizer = tiny_models.build("bart"), tokenizer_for("bart")
    settings: dict[str, Any] = {"layers": [1], "stack": "decoder"}
    expected = extract_activations(model, tokenizer, TEXTS, decoder_texts=TARGETS, **settings)
    found = extract_activations(model, tokenizer, iter(TEXTS), decoder_texts=iter(TARGETS), **settings)
    assert torch.equal(found["layer_1"], expected["layer_1"])


def test_what_is_not_proved_is_given_only_by_name() -> None:
    model, tokenizer = tiny_models.build("llama"), tokenizer_for("llama")
    family = map_model(model)
    for proofs, why in (
        ({"layers": replace(family.proofs["layers"], outputs="output of layer 1 is another tensor")}, "layer 1"),
        ({}, "no certificate"),
    ):  # fmt: skip
        doubtful = replace(family, proofs=proofs)
        with pytest.raises(ModelError, match=rf"not proved to be its hidden states: .*{why}.*unproven=True"):
            extract_activations(model, tokenizer, TEXTS, [0], family=doubtful)
        found = extract_activations(model, tokenizer, TEXTS, [0], family=doubtful, unproven=True)
        assert why in found.proof
    for proof in ("equal", "equal, without the embeddings before them"):
        sure = replace(family, proofs={"layers": replace(family.proofs["layers"], outputs=proof)})
        assert extract_activations(model, tokenizer, TEXTS, [0], family=sure).proof == proof
