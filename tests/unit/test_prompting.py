"""Virtual tokens in front of a text: a row's answer depends on no pad; what takes no such tokens is refused at once."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as T

import tiny_models
from peftlab.attaching import prompting
from peftlab.attaching.pooling import IdsBesideEmbeddings, looks_for_pads
from peftlab.catalog import METHODS
from peftlab.errors import MethodError
from peftlab.generation import classify
from peftlab.mapping import map_model
from peftlab.proof import fingerprint

PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
_COMMON = {"vocab_size": 64, "num_labels": 3, "eos_token_id": 2}
_LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_ROBERTA = _COMMON | _LLAMA | {"max_position_embeddings": 66, "pad_token_id": 1}
BUILD = {
    "llama": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**_COMMON, **_LLAMA, pad_token_id=0)),
    "gpt2": lambda: T.GPT2ForSequenceClassification(
        T.GPT2Config(**_COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=2)
    ),
    "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**_COMMON, **_LLAMA)),
    "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**_ROBERTA)),
    "distilbert": lambda: T.DistilBertForSequenceClassification(
        T.DistilBertConfig(**_COMMON, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
    ),
    "t5": lambda: T.T5ForSequenceClassification(
        T.T5Config(
            **_COMMON, d_model=16, num_layers=2, d_kv=4, d_ff=24, num_heads=4, decoder_start_token_id=0
        )
    ),
    "bart": lambda: T.BartForSequenceClassification(
        T.BartConfig(**_COMMON, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
    ),
}
LENGTHS = (9, 4, 6)


def build(name: str) -> Any:
    """A tiny classifier in float64 whose answers differ from token to token."""
    torch.manual_seed(0)
    model = tiny_models.randomise(BUILD[name]()).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def attach(model: Any, method: str, **settings: Any) -> Any:
    leaf = METHODS.load(method)
    settings |= {"dropout": 0.0} if "dropout" in leaf.Settings.model_fields else {}
    attached = leaf.attach(model, map_model(model), leaf.Settings(**settings), head="classification", seed=0)
    attached.model.eval()
    return attached


def rows(model: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Three texts of different length in one batch, and each alone."""
    source = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 64, (1, length), generator=source) for length in LENGTHS]
    together = torch.full((len(texts), max(LENGTHS)), model.config.pad_token_id)
    mask = torch.zeros_like(together)
    for row, text in enumerate(texts):
        together[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    labels = torch.tensor([0, 2, 1])
    alone = [
        {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels[row : row + 1]}
        for row, text in enumerate(texts)
    ]
    return {"input_ids": together, "attention_mask": mask, "labels": labels}, alone


def gradients(attached: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over rows, and its gradients, in training mode."""
    attached.model.train()
    attached.model.zero_grad()
    losses = [attached.model(**batch).loss * len(batch["labels"]) / len(LENGTHS) for batch in batches]
    loss = torch.stack(losses).sum()
    loss.backward()
    attached.model.eval()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in attached.parameters().items() if p.grad is not None
    }


@pytest.mark.parametrize("method", [*PROMPTS, "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta"])
def test_a_padded_row_is_answered_and_trains_as_it_does_alone(name: str, method: str) -> None:
    model = build(name)
    attached = attach(model, method)
    together, alone = rows(model)
    with torch.no_grad():
        batched = attached.model(**together).logits
        single = torch.cat([attached.model(**row).logits for row in alone])
    assert torch.allclose(batched, single, atol=1e-6), "float32 norms inside"
    assert (batched[0] - batched[1]).abs().max() > 1e-3
    loss, expected = gradients(attached, alone)
    found_loss, found = gradients(attached, [together])
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert found.keys() == expected.keys() == attached.parameters().keys()
    for key, gradient in found.items():
        assert torch.allclose(gradient, expected[key], atol=1e-6), key


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_classes_do_not_change_with_the_batch_size(name: str, method: str) -> None:
    attached = attach(build(name), method)
    source = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 16, (24,), generator=source).tolist()
    texts = [torch.randint(3, 64, (length,), generator=source).tolist() for length in lengths]
    pad = attached.model.config.pad_token_id
    one, many = (classify(attached.model, texts, pad_id=pad, batch_size=size) for size in (1, 8))
    assert one == many
    assert len(set(one)) > 1


def test_companion_peft_alone_answers_from_a_pad() -> None:
    """What is mended: plain peft gives the classifier no ids."""
    model = build("llama")
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS", num_transformer_submodules=1)
    plain = peft.get_peft_model(model, config).eval()
    together, alone = rows(model)
    with torch.no_grad():
        apart = (plain(**together).logits - torch.cat([plain(**row).logits for row in alone])).abs().amax(1)
    assert apart[0] < 1e-6 < 1e-3 < apart[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_row_without_pads_is_answered_as_peft_answers_it(name: str) -> None:
    attached = attach(build(name), "p_tuning")
    row = rows(build(name))[1][1]
    with torch.no_grad():
        ours = attached.model(**row).logits
        attached._ids.remove()
        assert torch.allclose(attached.model(**row).logits, ours, atol=1e-12)


def test_embeddings_without_ids_are_left_to_transformers() -> None:
    model = build("llama")
    attached = attach(model, "prompt_tuning")
    row = rows(model)[1][0]
    embedded = model.get_input_embeddings()(row["input_ids"])
    with torch.no_grad():
        by_ids = attached.model(**row).logits
        given = attached.model(inputs_embeds=embedded, attention_mask=row["attention_mask"]).logits
    assert torch.allclose(given, by_ids, atol=1e-12)


def test_the_base_comes_back_without_hooks() -> None:
    model = build("gpt2")
    marks = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    together, _ = rows(model)
    with torch.no_grad():
        before = model(**together).logits
        attached = attach(model, "prompt_tuning")
        with attached.disabled():
            assert torch.equal(attached.model(**together).logits, before)
        attached.model(**together)
        base = attached.remove()
        assert torch.equal(base(**together).logits, before)
    assert {name: fingerprint(tensor) for name, tensor in base.state_dict().items()} == marks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_which_classifiers_look_for_pads() -> None:
    assert {name: looks_for_pads(build(name)) for name in ("llama", "gpt2", "bert", "roberta", "distilbert")} == {
        "llama": True, "gpt2": True, "bert": False, "roberta": False, "distilbert": False,
    }  # fmt: skip
    model = BUILD["llama"]()
    model.config.pad_token_id = None
    assert looks_for_pads(model), "a twin has a pad of its own"
    assert model.config.pad_token_id is None


def test_a_model_that_takes_ids_alone_is_named() -> None:
    class Alone(T.LlamaForSequenceClassification):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **more: Any) -> Any:
            if input_ids is None:
                raise NotImplementedError("ids, please")
            return super().forward(input_ids=input_ids, **more)

    with pytest.raises(MethodError, match=r"Alone takes ids alone, and no embeddings: ids, please"):
        looks_for_pads(Alone(BUILD["llama"]().config))


def test_an_embedding_that_is_not_read_is_noticed() -> None:
    model = build("llama")
    attached = attach(model, "prompt_tuning")
    attached._ids.remove()
    elsewhere, model.get_input_embeddings = model.get_input_embeddings, lambda: torch.nn.Embedding(64, 16)
    IdsBesideEmbeddings(attached.model, model, num_virtual_tokens=20)
    with pytest.raises(MethodError, match=r"does not read its ids by its input embedding"):
        attached.model(**rows(model)[0])
    model.get_input_embeddings = elsewhere


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_that_classify_are_refused(name: str, method: str) -> None:
    model = build(name)
    keys = list(model.state_dict())
    with pytest.raises(
        MethodError, match=rf"{method} does not work on {type(model).__name__}: its decoder reads"
    ):
        attach(model, method)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_distilbert_s_width_is_known(method: str) -> None:
    model = build("distilbert")
    attached = attach(model, method, num_virtual_tokens=3)
    together, alone = rows(model)
    with torch.no_grad():
        batched = attached.model(**together).logits
        assert torch.allclose(batched, torch.cat([attached.model(**row).logits for row in alone]), atol=1e-12)
    assert attached.config.token_dim == prompting.embedding_width(model) == 16


def test_prefixes_need_a_model_that_takes_a_cache() -> None:
    with pytest.raises(MethodError, match=r"past_key_values.*DistilBertForSequenceClassification takes none"):
        attach(build("distilbert"), "prefix_tuning")


@pytest.mark.parametrize("method", PROMPTS)
def test_more_virtual_tokens_than_positions_are_refused(method: str) -> None:
    base, leaf = tiny_models.build("gpt2"), METHODS.load(method)
    settings = leaf.Settings(num_virtual_tokens=64)
    with pytest.raises(MethodError, match=r"64 leaves no room for a text in the 64 positions"):
        leaf.attach(base, map_model(base), settings, head="causal", seed=0)
    assert all(p.requires_grad for p in base.parameters())
