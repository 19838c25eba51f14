"""P-tuning under the manager: its network, and that every call of a model really reads the virtual tokens."""

import copy

import pytest
import torch
import transformers as T
from encoder_models import agree_and_learn_alike, encoder, ids
from torch import nn
from torch.nn import functional

import peftlab
import tiny_models
from peftlab.efficient.weights import adapter_tensors
from peftlab.errors import ConfigError, MethodError
from peftlab.manager import EfficientFineTuningManager, PTuningEmbedding
from peftlab.proof import fingerprint

COUNT = 5
SMALL = {"num_virtual_tokens": COUNT, "hidden_dimension": 8, "dropout_probability": 0.0}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network(embeddings, w1, b1, w2, b2, gain, offset):
    """LayerNorm(W2 relu(W1 e + b1) + b2), written out."""
    made = functional.relu(embeddings @ w1.T + b1) @ w2.T + b2
    centred = made - made.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + offset


def pairs(model):
    """Every tensor of the virtual tokens, and a copy to compute with by hand."""
    own = list(adapter_tensors(model).values())
    return own, [p.detach().clone().requires_grad_() for p in own]


@pytest.mark.parametrize("percent", [0, 1])
def test_the_network_is_the_formula(percent):
    made = tiny_models.randomise(PTuningEmbedding(4, 6, 5, dropout_probability=0.0).double())
    own, by_hand = list(made.parameters()), [p.detach().clone().requires_grad_() for p in made.parameters()]
    target = torch.randn(3, 4, 6, dtype=torch.float64)
    arguments = (lambda: made(3) * (1 + percent / 100) - target, lambda: network(*by_hand) - target)
    if percent:
        with pytest.raises(AssertionError, match="not close"):
            agree_and_learn_alike(*arguments, list(zip(own, by_hand, strict=True)))
    else:
        agree_and_learn_alike(*arguments, list(zip(own, by_hand, strict=True)))


def test_its_sizes_are_the_documents():
    made = PTuningEmbedding(num_virtual_tokens=20, embedding_dimension=768, hidden_dimension=512)
    assert sum(p.numel() for p in made.parameters()) == 804_608
    assert made.eval()(4).shape == (4, 20, 768)
    assert not torch.equal(made.train()(1), made(1)), "dropout is on while training"
    for wrong in ({"num_virtual_tokens": 0}, {"hidden_dimension": 1.5}, {"dropout_probability": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PTuningEmbedding(**wrong)


@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*batch_first=False")
def test_a_plain_module_reads_them_between_embedding_and_the_rest(batch_first, percent):
    model, base = (encoder(2, batch_first=batch_first) for _ in range(2))
    base.requires_grad_(False)
    EfficientFineTuningManager(model).apply_ptuning(**SMALL)
    tiny_models.randomise(model.ptuning_embeddings)
    own, by_hand = pairs(model)
    axis = 1 if batch_first else 0
    text = ids(6, 4) if batch_first else ids(4, 6)

    def reference():
        tokens = network(*by_hand).expand(text.shape[1 - axis], -1, -1) * (1 + percent / 100)
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        states = base.transformer(torch.cat([tokens, base.embedding(text)], dim=axis))
        return base.output(states).narrow(axis, COUNT, text.shape[axis])

    arguments = (lambda: model(text), reference, list(zip(own, by_hand, strict=True)))
    if percent:
        with pytest.raises(AssertionError, match="not close"):
            agree_and_learn_alike(*arguments)
    else:
        agree_and_learn_alike(*arguments)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("ptuning"))


@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_masks_grow_with_the_text(training, floating):
    """The text sees the virtual tokens and what it saw; virtual tokens see each other."""
    model, base = encoder(2), encoder(2)
    EfficientFineTuningManager(model).apply_ptuning(**SMALL)
    model.train(training)
    base.train(training)
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3, [False] * 5 + [True]])
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    longer = torch.ones(6 + COUNT, 6 + COUNT, dtype=torch.bool)
    longer[COUNT:, COUNT:] = causal
    longer[:, :COUNT] = False
    form = (
        (lambda m: torch.zeros(m.shape).double().masked_fill(m, float("-inf"))) if floating else (lambda m: m)
    )
    with torch.no_grad():
        for masked in ({"src_key_padding_mask"}, {"mask"}, {"src_key_padding_mask", "mask"}):
            given = {"src_key_padding_mask": form(padding), "mask": form(causal)}
            found = model(ids(), **{name: given[name] for name in masked})
            given = {
                "src_key_padding_mask": form(functional.pad(padding, (COUNT, 0))),
                "mask": form(longer),
            }
            tokens = torch.cat([model.ptuning_embeddings(3), base.embedding(ids())], dim=1)
            base.transformer.use_nested_tensor = False
            expected = base.output(base.transformer(tokens, **{name: given[name] for name in masked}))
            torch.testing.assert_close(found, expected[:, COUNT:], rtol=0, atol=1e-9)


def test_a_pooled_output_stays_as_it_is_and_the_embedding_too():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 3)

        def forward(self, text, fail=False):
            if fail:
                self.embedding(text)
                raise KeyError("in the middle")
            return {
                "scores": self.head(self.embedding(text).tanh().mean(1)),
                "states": (self.embedding.weight,),
            }

    model = Classifier()
    manager = peftlab.apply_ptuning_to_model(model, **SMALL)
    assert model(ids())["scores"].shape == (3, 3)
    assert model.embedding(ids()).shape == (3, 6, 16), "what calls the embedding by itself gets what it got"
    with pytest.raises(KeyError):
        model(ids(), fail=True)
    assert model.embedding(ids()).shape == (3, 6, 16)
    manager.remove()
    assert not hasattr(model, "ptuning_embeddings")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_it_is_not_plain_the_person_is_told_what_to_write():
    class Positions(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.embedding, self.kind = nn.Embedding(40, 16), kind
            self.positions = nn.Parameter(torch.randn(6, 16))
            if kind == "two":
                self.second = nn.Embedding(6, 16)

        def forward(self, text):
            if self.kind == "positions":
                return self.embedding(text) + self.positions[: text.shape[1]]
            if self.kind == "ignored":
                return self.embedding(text) * 0 + 1
            return self.embedding(text).flatten(1).mean(1).expand(2, -1) if self.kind == "shape" else text

    for model, told in (
        (nn.Sequential(nn.Linear(4, 4)), "has no nn.Embedding"),
        (Positions("two"), "has embeddings embedding, second"),
        (Positions("positions"), "does not run with virtual tokens in front .RuntimeError"),
        (Positions("ignored"), "no effect"),
    ):
        names = list(dict(model.named_parameters()))
        with pytest.raises(MethodError, match=rf"(?s){told}.*virtual_tokens = manager\.ptuning_embeddings"):
            peftlab.apply_ptuning_to_model(model, **SMALL)
        assert list(dict(model.named_parameters())) == names
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ConfigError, match="embedding_dimension is 8, the model's embeddings have 16"):
        peftlab.apply_ptuning_to_model(encoder(), embedding_dimension=8)
    manager = EfficientFineTuningManager(Positions("positions"))
    with pytest.raises(ConfigError, match="embedding_dimension is needed"):
        manager.apply_ptuning(**SMALL, by_hand=True)
    manager.apply_ptuning(**SMALL, embedding_dimension=16, by_hand=True)
    assert manager.ptuning_embeddings(2).shape == (2, COUNT, 16)
    assert len(manager.get_trainable_parameters()) == 7
    with pytest.raises(MethodError, match="apply_ptuning has been called"):
        manager.apply_ptuning(**SMALL)


class RandomInEvaluation(nn.Module):
    def forward(self, x):
        return functional.dropout(x, training=True)


def test_trying_it_out_touches_no_random_stream():
    torch.manual_seed(1)
    PTuningEmbedding(COUNT, 16, 8)
    expected = torch.rand(3)
    model = encoder().train()
    torch.manual_seed(1)
    peftlab.apply_ptuning_to_model(model, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in model.modules())
    model = nn.Sequential(nn.Embedding(9, 16), RandomInEvaluation())
    torch.manual_seed(1)
    peftlab.apply_ptuning_to_model(model, **SMALL)
    assert torch.equal(torch.rand(3), expected)


def in_front(model, name, given):
    """The same call with virtual tokens put in by hand."""
    reader = model.get_encoder() if tiny_models.HEADS[name] == "seq2seq" else model
    batch = given["input_ids"].shape[0]
    tokens = model.ptuning_embeddings(batch)
    embeddings = torch.cat([tokens, reader.get_input_embeddings()(given["input_ids"])], dim=1)
    made = {k: v for k, v in given.items() if k != "input_ids"} | {"inputs_embeds": embeddings}
    made["attention_mask"] = functional.pad(given["attention_mask"], (COUNT, 0), value=1)
    if tiny_models.HEADS[name] == "causal" and "labels" in given:
        made["labels"] = functional.pad(given["labels"], (COUNT, 0), value=-100)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "bart", "opt", "distilbert", "bloom"])
@pytest.mark.filterwarnings("ignore:.*loss_type")
def test_a_transformers_model_reads_them_in_every_call(name):
    model = tiny_models.build(name).double()
    before = {n: fingerprint(t) for n, t in model.state_dict().items()}
    base = copy.deepcopy(model)
    given = tiny_models.training_inputs(name)
    given["attention_mask"][0, -3:] = 0
    plain = base(**given)
    manager = EfficientFineTuningManager(model)
    manager.apply_ptuning(**SMALL)
    found = model(**given)
    base.ptuning_embeddings = model.ptuning_embeddings
    expected = base(**in_front(base, name, given))
    torch.testing.assert_close(found.loss, expected.loss)
    cut = COUNT if tiny_models.HEADS[name] == "causal" else 0
    torch.testing.assert_close(found.logits, expected.logits[:, cut:])
    assert found.logits.shape == plain.logits.shape
    assert not torch.allclose(found.logits, plain.logits, atol=1e-2)
    own = manager.get_trainable_parameters()
    gradients = [torch.autograd.grad(out.loss, own) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs)
    manager.remove()
    assert {n: fingerprint(t) for n, t in model.state_dict().items()} == before
    assert torch.equal(model(**given).logits, plain.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_generating_goes_on_from_them(name):
    model = tiny_models.build(name)
    peftlab.apply_ptuning_to_model(model, **SMALL).ptuning_embeddings.eval()
    given = tiny_models.inputs(name, length=6)
    given.pop("decoder_input_ids", None)
    text = slice(0, 4) if name == "t5" else slice(2, 6)  # an encoder's text has its padding behind it
    given["attention_mask"][0] = 0
    given["attention_mask"][0, text] = 1
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**given, **asked)
    assert torch.equal(cached, model.generate(**given, **asked, use_cache=False))
    alone = model.generate(**{k: v[:1, text] for k, v in given.items()}, **asked)
    assert torch.equal(cached[0, -5:], alone[0, -5:])


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}


def test_heads_that_look_at_ids_and_positions_still_find_them():
    last = tiny_models.randomise(
        T.LlamaForSequenceClassification(T.LlamaConfig(**SIZES, pad_token_id=0))
    ).eval()
    peftlab.apply_ptuning_to_model(last, **SMALL)
    text = torch.tensor([[5, 6, 7, 0, 0]])
    mask = (text != 0).long()
    padded, alone = last(text, mask).logits, last(text[:, :3], mask[:, :3]).logits
    torch.testing.assert_close(padded, alone)
    answers = tiny_models.randomise(T.RobertaForQuestionAnswering(T.RobertaConfig(**SIZES))).eval()
    base = copy.deepcopy(answers)
    peftlab.apply_ptuning_to_model(answers, **SMALL)
    text = ids(2, 6) + 5
    ends = {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([1, 5])}
    found = answers(input_ids=text, output_hidden_states=True, **ends)
    assert found.start_logits.shape == (2, 6)
    assert found.hidden_states[-1].shape == (2, 6, 16)
    assert torch.equal(answers(text, token_type_ids=torch.zeros_like(text), **ends).loss, found.loss)
    front = torch.cat([answers.ptuning_embeddings(2), base.get_input_embeddings()(text)], dim=1)
    by_hand = base(inputs_embeds=front, **{name: end + COUNT for name, end in ends.items()})
    torch.testing.assert_close(found.loss, by_hand.loss)  # ids of RoBERTa say by themselves where padding is
    named = tiny_models.randomise(T.BertForTokenClassification(T.BertConfig(**SIZES, num_labels=3))).eval()
    peftlab.apply_ptuning_to_model(named, **SMALL)
    labels = torch.ones_like(text)
    found = named(text, labels=labels)
    assert found.logits.shape == (2, 6, 3)
    torch.testing.assert_close(
        found.loss, functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten())
    )
    assert named(text, return_dict=False)[0].shape == (2, 6, 3)


def test_what_virtual_tokens_have_no_value_for_is_refused():
    model = tiny_models.build("llama")
    manager = peftlab.apply_ptuning_to_model(model, **SMALL)
    text = ids(2, 6) + 5
    with pytest.raises(MethodError, match="what 'weights_of_tokens' would be"):
        model(text, weights_of_tokens=torch.ones_like(text))
    with pytest.raises(MethodError, match=r"mask of \(batch, seq\)"):
        model(text, attention_mask=torch.ones(2, 1, 6, 6))
    embeddings = model.get_input_embeddings()(text)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(text).logits)
    shifted = model(text, position_ids=torch.arange(6).expand(2, -1)).logits
    torch.testing.assert_close(shifted, model(text).logits)
    manager.remove()
    with pytest.raises(MethodError, match="reads none"):
        peftlab.apply_ptuning_to_model(
            T.ViTModel(T.ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
        )
