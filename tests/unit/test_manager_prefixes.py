"""Prefix tuning under the manager: attention really reads it, in torch's modules and in transformers models."""

import copy

import peft
import pytest
import torch
from encoder_models import agree_and_learn_alike, encoder, ids, train
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache

import peftlab
import tiny_models
from peftlab.errors import ConfigError, MethodError
from peftlab.manager import EfficientFineTuningManager, PrefixTuning
from peftlab.proof import fingerprint

COUNT, HEADS, FEATURES = 3, 4, 4
SMALL = {"num_heads": HEADS, "head_dimension": FEATURES, "prefix_length": COUNT, "dropout_probability": 0.0}
PADDING = torch.tensor([[False] * 6, [False] * 3 + [True] * 3, [False] * 5 + [True]])
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def attention(module, x, prefix, padding=None, mask=None):
    """softmax(Q [P_K; K]' / sqrt(d)) [P_V; V], written out for (batch, seq, features); the weights with it."""

    def heads(t):
        return t.unflatten(-1, (HEADS, FEATURES)).transpose(1, 2)

    q, k, v = map(heads, functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1))
    p_k, p_v = (
        prefix.view(COUNT, 2, HEADS, FEATURES).permute(1, 2, 0, 3).unsqueeze(1).expand(-1, len(x), -1, -1, -1)
    )
    scores = q @ torch.cat([p_k, k], dim=2).transpose(-1, -2) / FEATURES**0.5
    hidden = torch.zeros(len(x), 1, x.shape[1], x.shape[1], dtype=torch.bool)
    hidden = (
        hidden | (False if padding is None else padding[:, None, None]) | (False if mask is None else mask)
    )
    weights = scores.masked_fill(functional.pad(hidden, (COUNT, 0)), float("-inf")).softmax(-1)
    mixed = (weights @ torch.cat([p_v, v], dim=2)).transpose(1, 2).flatten(2)
    return functional.linear(mixed, module.out_proj.weight, module.out_proj.bias), weights


class Attending(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, HEADS, batch_first=batch_first)

    def forward(self, x, **masks):
        return self.attention(x, x, x, **masks)


@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("masked", [(), ("padding",), ("mask",), ("padding", "mask")])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_the_formula(batch_first, masked, percent):
    model = tiny_models.randomise(Attending(batch_first)).double()
    base = copy.deepcopy(model.attention).requires_grad_(False)
    manager = peftlab.apply_prefix_tuning_to_model(model, num_layers=1, **SMALL)
    (own,) = manager.get_trainable_parameters()
    by_hand = own.detach().clone().requires_grad_()
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    given = {name: {"padding": PADDING, "mask": CAUSAL}[name] for name in masked}
    to_torch = {{"padding": "key_padding_mask", "mask": "attn_mask"}[n]: m for n, m in given.items()}

    def product(**settings):
        states = x if batch_first else x.transpose(0, 1)
        made, weights = model(states, **to_torch, **settings)
        return made if batch_first else made.transpose(0, 1), weights

    def reference():
        return attention(base, x, by_hand * (1 + percent / 100), **given)[0]

    if percent:
        with pytest.raises(AssertionError, match="not close"):
            agree_and_learn_alike(lambda: product()[0], reference, [(own, by_hand)])
        return
    agree_and_learn_alike(lambda: product()[0], reference, [(own, by_hand)])
    expected, weights = attention(base, x, own, **given)
    torch.testing.assert_close(product(need_weights=True, average_attn_weights=False)[1], weights)
    for settings in ({"need_weights": False}, {"need_weights": True}):
        torch.testing.assert_close(product(**settings)[0], expected)
    if "mask" in masked:
        torch.testing.assert_close(product(need_weights=False, is_causal=True)[0], expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layers_read_it_in_evaluation_too():
    model = encoder(2, dtype=torch.float32)
    masks = {"src_key_padding_mask": PADDING}
    seen = ~PADDING
    before = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = model(ids(), **masks)
    manager = peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL)
    assert isinstance(model.transformer.layers[0].self_attn, nn.MultiheadAttention)
    with torch.no_grad():
        evaluated = model(ids(), **masks)
    assert not torch.allclose(evaluated[seen], plain[seen], atol=1e-2)
    torch.testing.assert_close(
        evaluated[seen], model.train()(ids(), **masks).detach()[seen], rtol=0, atol=1e-5
    )
    model.eval()
    train(model, manager.get_trainable_parameters(), **masks)
    assert all(p.grad.any() for p in manager.get_trainable_parameters())
    manager.remove()
    assert {name: fingerprint(tensor) for name, tensor in model.state_dict().items()} == before
    assert {type(layer.self_attn) for layer in model.transformer.layers} == {nn.MultiheadAttention}
    assert not hasattr(model.transformer.layers[0].self_attn, "prefix")
    with torch.no_grad():
        assert torch.equal(model(ids(), **masks), plain)


def test_a_copy_of_the_model_has_a_prefix_of_its_own():
    model = encoder()
    peftlab.apply_prefix_tuning_to_model(model, num_layers=1, **SMALL)
    copied = copy.deepcopy(model)
    expected = model(ids())
    with torch.no_grad():
        model.prefix_tuning.prefix_embeddings[0].mul_(3)
    torch.testing.assert_close(copied(ids()), expected)
    assert not torch.allclose(model(ids()), expected)


def test_only_self_attention_reads_it():
    layer = nn.TransformerDecoderLayer(16, HEADS, 24, batch_first=True)
    model = nn.ModuleDict({"decoder": nn.TransformerDecoder(layer, 2)})
    peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL)
    kinds = {path.rpartition(".")[2]: type(m).__name__ for path, m in model.named_modules() if "attn" in path}
    assert kinds["self_attn"] == "PrefixedAttention"
    assert kinds["multihead_attn"] == "MultiheadAttention"


def test_sizes_and_states():
    made = PrefixTuning(num_layers=12, num_heads=12, head_dimension=64, prefix_length=20)
    assert sum(p.numel() for p in made.parameters()) == 368_640
    keys, values = made.eval().get_prefix_states(11)
    assert keys.shape == values.shape == (20, 12, 64)
    torch.testing.assert_close(
        torch.cat([keys.flatten(1), values.flatten(1)], 1), made.prefix_embeddings[11].data
    )
    dropped = made.train().get_prefix_states(0)[0]
    assert 0.05 < float((dropped == 0).double().mean()) < 0.15
    for index in (-1, 12):
        with pytest.raises(ConfigError, match="layers 0 to 11"):
            made.get_prefix_states(index)
    for wrong, told in (
        ({"num_layers": 2}, r"num_layers=2 \(it has 1\)$"),
        ({"num_heads": 2, "head_dimension": 8}, r"num_heads=2 \(it has 4\), head_dimension=8 \(it has 4\)"),
    ):
        model = encoder()
        with pytest.raises(ConfigError, match=told):
            peftlab.apply_prefix_tuning_to_model(model, **{"num_layers": 1} | SMALL | wrong)
        assert not hasattr(model, "prefix_tuning")
        assert all(p.requires_grad for p in model.parameters())


def test_where_it_cannot_be_read_the_person_is_told_what_to_write():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(MethodError, match=r"(?s)has no nn.MultiheadAttention.*get_prefix_states\(i\)"):
        peftlab.apply_prefix_tuning_to_model(model, num_layers=1, **SMALL)
    for attending, told in (
        (Own(16, HEADS), "Own"),
        (nn.MultiheadAttention(16, HEADS, add_bias_kv=True), "bias_k"),
    ):
        with pytest.raises(MethodError, match=rf"(?s)attention of its own kind .*{told}.*by_hand=True"):
            peftlab.apply_prefix_tuning_to_model(nn.Sequential(attending), num_layers=1, **SMALL)
    with pytest.raises(MethodError, match="takes no keys and values from outside"):
        peftlab.apply_prefix_tuning_to_model(tiny_models.build("distilbert"), num_layers=2, **SMALL)
    manager = EfficientFineTuningManager(model)
    manager.apply_prefix_tuning(num_layers=1, **SMALL, by_hand=True)
    assert manager.prefix_tuning.get_prefix_states(0)[0].shape == (COUNT, HEADS, FEATURES)
    assert manager.count_trainable_parameters() == 2 * COUNT * HEADS * FEATURES
    with pytest.raises(MethodError, match="cannot be merged"):
        manager.merge()
    with pytest.raises(MethodError, match="apply_prefix_tuning has been called"):
        manager.apply_prefix_tuning(num_layers=1, **SMALL)


KINDS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "bert": "SEQ_CLS",
}


@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:.*loss_type")
def test_a_transformers_model_reads_what_pefts_reads(name, percent):
    heads = 2 if name == "llama" else HEADS
    model = tiny_models.build(name).double()
    plain = model(**tiny_models.inputs(name)).logits
    manager = peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL | {"num_heads": heads})
    config = peft.PrefixTuningConfig(num_virtual_tokens=COUNT, task_type=KINDS[name])
    theirs = peft.get_peft_model(tiny_models.build(name).double(), config).eval()
    states = [torch.stack(manager.prefix_tuning.get_prefix_states(layer)) for layer in range(2)]
    ordered = torch.cat(states).transpose(0, 1).reshape(COUNT, -1) * (1 + percent / 100)
    with torch.no_grad():
        theirs.prompt_encoder.double()["default"].embedding.weight.copy_(ordered)
    given = tiny_models.training_inputs(name)
    given["attention_mask"][0, -2:] = 0
    found, expected = model(**given), theirs(**given)
    found.loss.backward()
    expected.loss.backward()
    gradient = torch.stack([p.grad for p in manager.get_trainable_parameters()], dim=1).reshape(COUNT, -1)
    assert found.logits.shape == plain.shape
    if name in ("llama", "gpt2"):
        placed = model(**tiny_models.inputs(name), position_ids=torch.arange(8).expand(2, -1)).logits
        torch.testing.assert_close(placed, model(**tiny_models.inputs(name)).logits)
    assert not torch.allclose(found.logits, plain, atol=1e-2)
    close = torch.allclose(found.logits, expected.logits, rtol=0, atol=1e-9)
    alike = torch.allclose(
        gradient, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=0, atol=1e-9
    )
    assert (close, alike) == ((True, True) if not percent else (False, False))


@pytest.mark.parametrize("percent", [0, 1])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_every_layer_of_a_decoder_reads_its_own(name, percent):
    """peft 0.21 deals the prefix of an encoder-decoder out so that every second layer's is never read."""
    model, base = (tiny_models.build(name).double() for _ in range(2))
    base.requires_grad_(False)
    manager = peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL)
    own = manager.get_trainable_parameters()
    by_hand = [p.detach().clone().requires_grad_() for p in own]
    given = tiny_models.training_inputs(name)

    def reference():
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, prefix in enumerate(by_hand):
            both = prefix.view(COUNT, 2, 1, HEADS, FEATURES).permute(1, 2, 3, 0, 4).expand(-1, 2, -1, -1, -1)
            cache.self_attention_cache.update(*(both * (1 + percent / 100)), layer)
        return base(**given, past_key_values=cache).logits

    arguments = (lambda: model(**given).logits, reference, list(zip(own, by_hand, strict=True)))
    if percent:
        with pytest.raises(AssertionError, match="not close"):
            agree_and_learn_alike(*arguments)
    else:
        agree_and_learn_alike(*arguments)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("tokens", [False, True])
def test_generating_goes_on_from_it(name, tokens):
    model = tiny_models.build(name)
    manager = EfficientFineTuningManager(model)
    manager.apply_prefix_tuning(num_layers=2, **SMALL | {"num_heads": 2 if name == "llama" else HEADS})
    if tokens:
        manager.apply_ptuning(5, hidden_dimension=8)
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
    manager.remove()
    assert torch.equal(model.generate(**given, **asked), tiny_models.build(name).generate(**given, **asked))


def test_where_a_layer_drops_it_the_call_fails(monkeypatch):
    model = tiny_models.build("llama")
    manager = peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL | {"num_heads": 2})
    given = tiny_models.training_inputs("llama")
    model.model.layers[0].gradient_checkpointing = True  # what enabling it comes to
    model(**given)
    with pytest.raises(MethodError, match="gradient checkpointing"):
        model.train()(**given)
    model.model.layers[0].gradient_checkpointing = False
    model(**given)
    with pytest.raises(MethodError, match="a cache of fixed size"):
        model.eval().generate(
            tiny_models.inputs("llama")["input_ids"], max_new_tokens=2, cache_implementation="static"
        )
    second = model.model.layers[1]
    forward = type(second).forward
    dropped = {"past_key_values": None, "attention_mask": None}
    monkeypatch.setattr(
        type(second),
        "forward",
        lambda self, *args, **kwargs: forward(self, *args, **kwargs | (dropped if self is second else {})),
    )
    with pytest.raises(MethodError, match=r"their caches hold \[11, 3\] keys, not 11"):
        model(**given)
    manager.remove()
    with pytest.raises(ConfigError, match=r"num_heads=4 \(it has 2\)"):
        peftlab.apply_prefix_tuning_to_model(model, num_layers=2, **SMALL)
