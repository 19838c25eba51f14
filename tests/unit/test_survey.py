"""What is collected of a model: map in running order, shares, facts, readings of texts, similarity, base beside tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as T

import tiny_models
from peftlab.errors import ConfigError, ModelError
from peftlab.inspection.blueprint import describe_map
from peftlab.inspection.facts import model_facts, parameter_shares
from peftlab.inspection.readings import Texts, read_texts, read_words, text_stacks
from peftlab.inspection.subject import find_subject
from peftlab.inspection.training_memory import training_memory
from peftlab.mapping import map_model

TEXT = "the cat sits on a mat"


def adapted(name: str = "llama", *, num_layers: int = 2, **changes: Any) -> Any:
    """A tiny model with a LoRA that is not zero."""
    linear = {"llama": ["q_proj", "down_proj"], "t5": ["q", "wo"]}[name]
    config = peft.LoraConfig(**{"r": 2, "target_modules": linear, "lora_dropout": 0.5} | changes)
    model = peft.get_peft_model(tiny_models.build(name, num_layers), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


# -- the map ------------------------------------------------------------------------------------------------------


def drawn(model: Any) -> list[list[str]]:
    """The parts of the first kind of block of each stack, with the roles of their layers."""
    stacks = describe_map(model, map_model(model))["stacks"]
    return [
        [part["kind"] + "".join(f" {layer['role']}" for layer in part.get("layers", ())) for part in kind["parts"]]
        for stack in stacks
        for kind in stack["kinds"]
    ]  # fmt: skip


ATTENTION = "attention query key value output"
CROSS = "cross_attention query key value output"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [["norm", ATTENTION, "norm", "mlp gate up down"]]),
        ("gpt2", [["norm", "attention qkv output", "norm", "mlp up down"]]),
        ("bert", [[ATTENTION, "norm", "mlp up down", "norm"]]),
        ("t5", [
            ["norm", ATTENTION, "norm", "mlp up down"],
            ["norm", ATTENTION, "norm", CROSS, "norm", "mlp up down"],
        ]),
        ("mixtral", [["norm", ATTENTION, "norm", "mlp experts"]]),
    ],
)  # fmt: skip
def test_parts_are_drawn_in_the_order_they_run(name: str, expected: list[list[str]]) -> None:
    assert drawn(tiny_models.build(name, 3)) == expected


def test_norms_on_queries_and_keys_belong_to_their_box() -> None:
    config = T.Qwen3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, head_dim=4,
    )  # fmt: skip
    model = tiny_models.randomise(T.Qwen3ForCausalLM(config)).eval()
    assert drawn(model)[0][1] == "attention query norm key norm value output"


@pytest.mark.parametrize(("name", "beside"), [("gptj", True), ("llama", False)])
def test_parts_that_read_the_same_input_are_side_by_side(name: str, beside: bool) -> None:
    model = tiny_models.build(name)
    (stack,) = describe_map(model, map_model(model))["stacks"]
    boxes = [part for part in stack["kinds"][0]["parts"] if part["kind"] != "norm"]
    assert [box["side_by_side"] for box in boxes] == [False, beside]
    assert [box["residual"] for box in boxes] == ["branch", "branch"]


def test_layers_that_are_adapted_are_marked_and_set_apart() -> None:
    model = adapted(num_layers=3, layers_to_transform=[0, 2], modules_to_save=["lm_head"])
    found = describe_map(model, map_model(model))
    kinds = found["stacks"][0]["kinds"]
    assert [kind["layers"] for kind in kinds] == [[0, 2], [1]]
    marks = {layer["role"]: layer.get("adapted") for layer in kinds[0]["parts"][1]["layers"]}
    assert marks == {"query": "lora, rank 2", "key": None, "value": None, "output": None}
    assert found["head"]["adapted"] == "trained whole"
    assert found["embeddings"][0]["size"] == [64, 16]


def test_one_block_for_all_layers_is_told_with_the_models_own_number() -> None:
    with torch.device("meta"):
        model = T.AlbertModel(T.AlbertConfig(num_hidden_layers=12, hidden_size=64, num_attention_heads=4))
    (stack,) = describe_map(model, map_model(model))["stacks"]
    assert stack["num_layers"] == 12


# -- shares and facts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "t5", "mixtral", "bert"])
def test_shares_add_up_to_the_model(name: str) -> None:
    model = tiny_models.build(name).to(torch.bfloat16)
    shares = parameter_shares(model, map_model(model), adapted=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert shares["total"]["parameters"] == sum(row["parameters"] for row in shares["rows"]) == count
    assert shares["total"]["bytes"] == 2 * count
    assert shares["dtypes"] == {"bfloat16": count}


def test_a_layers_shares_are_those_of_its_modules() -> None:
    model = tiny_models.build("llama")
    rows = parameter_shares(model, map_model(model), adapted=False)["rows"]
    counted = {(row["stack"], row["layer"], row["group"]): row["parameters"] for row in rows}
    layer = model.model.layers[1]
    assert counted["layers", 1, "attention"] == sum(p.numel() for p in layer.self_attn.parameters())
    assert counted["layers", 1, "mlp"] == sum(p.numel() for p in layer.mlp.parameters())
    assert counted["layers", 1, "other"] == 2 * tiny_models.HIDDEN
    assert counted["", None, "embed"] == model.model.embed_tokens.weight.numel()


def test_an_adapter_is_counted_apart() -> None:
    model = adapted()
    shares = parameter_shares(model, map_model(model), adapted=True)
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    whole = sum(p.numel() for p in model.parameters())
    assert shares["total"]["adapter_parameters"] == trained
    assert shares["total"]["parameters"] == whole - trained
    assert {r["group"] for r in shares["rows"] if r["adapter_parameters"]} == {"attention", "mlp"}


def test_facts_say_what_a_model_is() -> None:
    model = tiny_models.build("mixtral")
    facts = model_facts(model, model.config, tiny_models.tokenizer(), map_model(model))
    expected = {
        "family": "llama", "class": "MixtralForCausalLM", "layers": 2, "hidden size": 16, "heads": 4,
        "key/value heads": 2, "head size": 4, "experts": 2, "experts per token": 1, "norm": "rmsnorm",
        "causal": True, "positions": 64, "position encoding": "rotary", "vocabulary": 64,
        "embedding and head tied": False,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    t5 = tiny_models.build("t5")
    found = model_facts(t5, t5.config, None, map_model(t5))
    assert found["causal"] == "encoder no, decoder yes"
    assert found["layers of decoder"] == 2
    assert "tokenizer" not in found


def test_a_training_step_is_predicted_or_the_reason_told(tmp_path: Path) -> None:
    subject = find_subject(
        str(tiny_models.save_model(tmp_path / "mixtral", "mixtral")), runs=tmp_path, device="cpu"
    )
    found = training_memory(subject, map_model(subject.structure()))
    assert (found["method"], found["targets"], found["shape"]["length"]) == ("lora", "attention", 64)
    assert sum(found["parts"].values()) == found["peak_bytes"] > found["parts"]["weights"] > 0
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    T.ViTModel(T.ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    subject = find_subject(str(tmp_path / "vit"), runs=tmp_path, device="cpu")
    assert list(training_memory(subject, map_model(subject.structure()))) == ["note"]


# -- readings -----------------------------------------------------------------------------------------------------


def test_norms_and_cosines_are_those_of_the_hidden_states() -> None:
    model, tokenizer = tiny_models.build("gpt2", 3), tiny_models.tokenizer()
    seen = read_texts(model, tokenizer, map_model(model), Texts((TEXT, "a red bird")))
    (reading,) = seen.stacks
    norms = seen.arrays[reading["norms"]]
    at = 0
    hidden: list[torch.Tensor] = []
    for text in (TEXT, "a red bird"):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        states = torch.cat(output.hidden_states[1:3])  # the last is behind the final norm
        np.testing.assert_allclose(norms[:2, at : at + states.shape[1]], states.norm(dim=-1), rtol=1e-5)
        at += states.shape[1]
        hidden.append(states)
    assert norms.shape == (3, at)
    both = torch.cat(hidden, dim=1)
    cosine = torch.nn.functional.cosine_similarity(both[0], both[1], dim=-1).mean()
    assert reading["layers"][0]["cosine_to_next"] == pytest.approx(float(cosine), rel=1e-5)
    top = reading["layers"][0]["top_dimensions"][0]
    assert top["magnitude"] == pytest.approx(float(both[0].abs().max()), rel=1e-5)
    assert top["dimension"] == int(both[0].abs().amax(dim=0).argmax())
    assert reading["texts"][0]["words"] == TEXT.split()
    assert reading["texts"][0]["tokens"][:2] == ["<s>", "the"]


def test_a_massive_activation_is_found_where_it_is() -> None:
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    model.model.layers[0].mlp.down_proj.bias = None
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-3)
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("cat"), 5] = 5000.0
    seen = read_texts(model, tokenizer, map_model(model), Texts((TEXT,)))
    first = seen.stacks[0]["layers"][0]
    assert first["massive"] == [5]
    assert first["top_dimensions"][0]["token"] == 2
    assert first["top_dimensions"][0]["ratio"] > 1000


def test_attention_between_words_is_the_eager_one_and_statistics_follow_from_it() -> None:
    model, tokenizer = tiny_models.build("bert"), tiny_models.tokenizer(byte_level=True, closes=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    seen = read_texts(model, tokenizer, map_model(model), Texts(("the cat zzq runs",), layers=(1,)))
    words = seen.arrays["layers.self.layer_1.text_0"]
    assert list(seen.arrays) == ["layers.norms", "layers.self.layer_1.text_0"]
    model.set_attn_implementation("eager")
    encoded = tokenizer("the cat zzq runs", return_tensors="pt")
    with torch.no_grad():
        rows = model(**encoded, output_attentions=True).attentions[1][0].double().numpy()
    word_of = np.array([-1 if w is None else w for w in _whole_words(tokenizer, "the cat zzq runs")])
    expected = np.stack(
        [
            [rows[:, word_of == q][:, :, word_of == k].sum(axis=-1).mean(axis=-1) for k in range(4)]
            for q in range(4)
        ]
    ).transpose(2, 0, 1)
    np.testing.assert_allclose(words, expected, atol=1e-6)
    layer = seen.stacks[0]["attention"][0]["layers"][1]
    np.testing.assert_allclose(layer["no_word_mass"], 1 - expected.sum(axis=-1).mean(axis=-1), atol=1e-6)
    np.testing.assert_allclose(
        layer["previous_word_mass"], [head.diagonal(-1).mean() for head in expected], atol=1e-6
    )
    np.testing.assert_allclose(layer["entropy"], -(rows * np.log(rows)).sum(axis=-1).mean(axis=-1), rtol=1e-4)


def _whole_words(tokenizer: Any, text: str) -> list[int | None]:
    """The word of each token, by characters, of a text with single blanks."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [text[: end - 1].count(" ") if text[start:end].strip() else None for start, end in spans]


def test_a_decoder_reads_the_text_where_no_other_is_given() -> None:
    model, tokenizer = tiny_models.build("t5"), tiny_models.tokenizer(opens=False, closes=True)
    family = map_model(model)
    copied = read_texts(model, tokenizer, family, Texts(("a cat",)))
    written = read_texts(model, tokenizer, family, Texts(("a cat",), ("red dog sits",)))
    assert [r["stack"] for r in copied.stacks] == ["encoder", "decoder"]
    kinds = [[seen["kind"] for seen in reading["attention"]] for reading in copied.stacks]
    assert kinds == [["self"], ["self", "cross"]]
    assert copied.stacks[1]["texts"][0]["tokens"] == ["<pad>", "a", "cat"]
    assert written.stacks[1]["texts"][0]["tokens"] == ["<pad>", "red", "dog", "sits"]
    assert written.arrays["decoder.cross.layer_0.text_0"].shape == (4, 3, 2)


def test_a_text_of_one_word_beside_a_longer_one() -> None:
    model, tokenizer = tiny_models.build("llama"), tiny_models.tokenizer()
    seen = read_texts(model, tokenizer, map_model(model), Texts(("cat", TEXT)))
    alone = read_texts(model, tokenizer, map_model(model), Texts((TEXT,)))
    first, second = (s.stacks[0]["attention"][0]["layers"][0]["previous_word_mass"] for s in (seen, alone))
    np.testing.assert_allclose(first, second, atol=1e-6)  # one word has none before it, so it does not count


def test_what_is_no_number_is_blank() -> None:
    model, tokenizer = tiny_models.build("gpt2"), tiny_models.tokenizer()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias.fill_(torch.nan)
    layer = read_texts(model, tokenizer, map_model(model), Texts((TEXT,))).stacks[0]["layers"][1]
    assert layer["median_norm"] is None
    assert layer["top_dimensions"][0]["magnitude"] is None
    assert layer["massive"] == []


def test_a_tower_that_sees_reads_no_text() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    text = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **sizes}
    config = T.CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **sizes})
    model = tiny_models.randomise(T.CLIPModel(config)).eval()
    family = map_model(model)
    (stack,) = text_stacks(model, family)
    assert stack.startswith("text")
    seen = read_texts(model, tiny_models.tokenizer(closes=True), family, Texts(("a cat", "a red dog sits")))
    assert seen.notes == []
    assert seen.stacks[0]["attention"][0]["kind"] == "self"


def test_words_are_the_same_whatever_the_tokenizer() -> None:
    whole, bytewise = tiny_models.tokenizer(), tiny_models.tokenizer(byte_level=True)
    model = tiny_models.build("gpt2")
    other = tiny_models.build("gpt2", seed=3)
    other.resize_token_embeddings(len(bytewise), mean_resizing=False)
    found = [
        read_words(m, t, map_model(m), Texts((TEXT, "a dog")))[1]
        for m, t in ((model, whole), (other, bytewise))
    ]
    keys = [list(zip(f.rows["text"].tolist(), f.rows["word"].tolist(), strict=True)) for f in found]
    assert keys[0] == keys[1] == [(0, i) for i in range(6)] + [(1, 0), (1, 1)]


# -- what is named ------------------------------------------------------------------------------------------------


def test_any_kind_of_model_is_found_and_loaded(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tmp_path / "bert", "bert")
    subject = find_subject(str(folder), runs=tmp_path, device="cpu")
    assert (subject.name, subject.adapter) == ("bert", None)
    structure = subject.structure()
    assert type(structure) is T.BertForSequenceClassification
    assert next(structure.parameters()).device.type == "meta"
    model, missing = subject.load()
    assert missing == []
    assert torch.equal(model.classifier.weight, tiny_models.build("bert").classifier.weight)


def test_the_embedded_base_has_a_short_name(tmp_path: Path) -> None:
    subject = find_subject("embedded", runs=tmp_path)
    assert subject.name == "tiny-base"
    assert type(subject.structure()).__name__ == "LlamaForCausalLM"


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        find_subject("./nothing", runs=tmp_path)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        find_subject("nobody/nothing", runs=tmp_path)
    with pytest.raises(ConfigError, match="device"):
        find_subject("embedded", runs=tmp_path, device="abacus")
