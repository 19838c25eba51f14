"""Blocks that several layers share (ALBERT): a layer is a call of a block, wherever layers are counted."""

from __future__ import annotations

import pytest
import torch
import transformers as T

import tiny_models
from peftlab.certificate import Certificate
from peftlab.errors import ConfigError
from peftlab.inspection.activations import extract_activations
from peftlab.inspection.attention import get_attention_patterns
from peftlab.inspection.blueprint import describe_map
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check

SHARED = {
    (12, 1): [0] * 12,
    (6, 2): [0, 0, 0, 1, 1, 1],
    (8, 4): [0, 0, 1, 1, 2, 2, 3, 3],
    (5, 2): [0, 0, 0, 1, 1],
}


def build(layers: int, groups: int):
    config = T.AlbertConfig(
        vocab_size=tiny_models.VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=layers,
        num_hidden_groups=groups, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return tiny_models.randomise(T.AlbertModel(config)).eval()


@pytest.mark.parametrize(("sizes", "order"), SHARED.items())
def test_layers_are_calls_of_blocks(sizes, order):
    layers, groups = sizes
    model = build(layers, groups)
    family = map_model(model)
    (stack,) = family.stacks
    assert (family.num_blocks(stack), family.num_outputs(stack)) == (groups, layers)
    assert list(family.order(stack)) == order
    assert family.proofs[stack].outputs == "equal"
    again = Certificate.from_json(family.certificates[0].to_json())
    assert again.stacks[0].order == family.proofs[stack].order
    assert any(f"outputs of {layers} layers" in found for found in spot_check(model, family))

    texts = ["w3 w4 w5", "w6 w7 w8 w9"]
    tokenizer = tiny_models.tokenizer()
    found = extract_activations(model, tokenizer, texts, range(layers), family=family)
    maps = get_attention_patterns(model, tokenizer, texts, [0, layers - 1], family=family)
    read = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**read, output_hidden_states=True)
    real = read["attention_mask"].bool()
    for layer in range(layers):
        expected = output.hidden_states[layer + 1][real]
        torch.testing.assert_close(torch.as_tensor(found[f"layer_{layer}"]), expected, atol=1e-5, rtol=1e-4)
    assert sorted(maps.weights) == sorted(["layer_0", f"layer_{layers - 1}"])
    (drawn,) = describe_map(model, family)["stacks"]
    assert (drawn["num_layers"], drawn["num_blocks"]) == (layers, groups)
    with pytest.raises(ConfigError, match=f"layers 0 to {layers - 1}"):
        extract_activations(model, tokenizer, texts, [layers], family=family)
