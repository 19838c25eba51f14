"""The loss over labelled rows alone: the model's own loss and gradients, for every head that can have it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny_models
import tiny_runs
from peftlab.batches import IGNORED, Collator
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from peftlab.objective import ClassLoss, LabelledLoss, ModelLoss, choose_objective

GENERATING = [name for name in tiny_models.BUILDERS if tiny_models.HEADS[name] != "classification"]


def batch_of(name, count=4, seed=3):
    head = tiny_models.HEADS[name]
    return Collator(0, head)(tiny_runs.make_rows(head, count, seed=seed))


def gradients_of(objective, model, batch):
    model.zero_grad()
    loss = objective.total(model, batch) / objective.count(batch)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


class EveryRow(ModelLoss):
    """The plain loss in full width: transformers' own rounds logits to float32."""

    def total(self, model, batch):
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.head == "seq2seq":
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(**inputs, use_cache=False).logits
        if self.head == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("name", [name for name in GENERATING if name != "mixtral"])
def test_loss_and_gradients_equal_the_plain_ones_in_float64(name):
    model = tiny_models.build(name).double()
    head, batch = tiny_models.HEADS[name], batch_of(name)
    chosen, found = choose_objective(model, batch, head=head)
    assert isinstance(chosen, LabelledLoss), found
    expected, wanted = gradients_of(EveryRow(head), model, batch)
    loss, got = gradients_of(chosen, model, batch)
    assert math.isclose(loss, expected, rel_tol=1e-12)
    assert math.isclose(loss, gradients_of(ModelLoss(head), model, batch)[0], rel_tol=1e-6)
    assert got.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-9, atol=1e-12, msg=key)


def test_experts_have_it_in_float32():
    model, batch = tiny_models.build("mixtral"), batch_of("mixtral")
    chosen, found = choose_objective(model, batch, head="causal")
    assert isinstance(chosen, LabelledLoss), found
    expected, wanted = gradients_of(ModelLoss("causal"), model, batch)
    loss, got = gradients_of(chosen, model, batch)
    assert math.isclose(loss, expected, rel_tol=1e-5)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_the_head_computes_labelled_rows_alone(name):
    model, batch, head = tiny_models.build(name), batch_of(name), tiny_models.HEADS[name]
    chosen, _ = choose_objective(model, batch, head=head)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    chosen.total(model, batch)
    assert seen == [(chosen.count(batch), tiny_models.VOCABULARY)]
    assert (batch["labels"] == IGNORED).any()


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "adalora", "new_layer"])
def test_methods_keep_their_loss(method):
    base = tiny_models.build("llama").double()
    leaf = METHODS.load(method)
    attached = leaf.attach(base, map_model(base), leaf.Settings(), head="causal", seed=1)
    attached.model.double()
    batch = batch_of("llama")
    chosen, found = choose_objective(attached.answering, batch, head="causal", penalty=attached.penalty)
    assert isinstance(chosen, LabelledLoss), found
    attached.model.train()
    for module in attached.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    own = float(ModelLoss("causal").total(attached.model, batch).detach())
    assert math.isclose(float(chosen.total(attached.model, batch).detach()), own, rel_tol=1e-6)
    assert (attached.penalty() is not None) == (method == "adalora")


def test_adalora_validates_without_its_penalty():
    base = tiny_models.build("llama").double()
    leaf = METHODS.load("adalora")
    attached = leaf.attach(base, map_model(base), leaf.Settings(), head="causal", seed=1)
    batch = batch_of("llama")
    chosen, _ = choose_objective(attached.answering, batch, head="causal", penalty=attached.penalty)
    attached.model.eval()
    without = float(chosen.total(attached.model, batch).detach())
    attached.model.train()
    for module in attached.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    added = float(attached.penalty().detach()) * chosen.count(batch)
    assert added > 0
    assert math.isclose(float(chosen.total(attached.model, batch).detach()) - without, added, rel_tol=1e-4)


def test_scales_and_soft_caps_are_the_models_own():
    import transformers as T

    config = T.Gemma2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=24, max_position_embeddings=64, final_logit_softcapping=1.5, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = tiny_models.randomise(T.Gemma2ForCausalLM(config)).double().eval()
    batch = batch_of("llama")
    chosen, found = choose_objective(model, batch, head="causal")
    assert isinstance(chosen, LabelledLoss), found
    own = float(ModelLoss("causal").total(model, batch).detach())
    assert math.isclose(float(chosen.total(model, batch).detach()), own, rel_tol=1e-6)


def test_a_model_that_gives_another_loss_keeps_its_own():
    model, batch = tiny_models.build("llama"), batch_of("llama")
    usual = model.loss_function
    model.loss_function = lambda *given, **named: usual(*given, **named) * 1.01
    chosen, found = choose_objective(model, batch, head="causal")
    assert not isinstance(chosen, LabelledLoss)
    assert "instead of" in found


def test_a_model_whose_logits_are_looked_at_by_position_keeps_its_own_loss():
    model, batch = tiny_models.build("llama"), batch_of("llama")
    model.lm_head = nn.Sequential(model.lm_head, nn.Unflatten(-1, (8, 8)), nn.Flatten(-2))
    model.get_output_embeddings = lambda: model.lm_head
    model.lm_head.register_forward_hook(lambda _, args, out: out[:, :, :])
    chosen, found = choose_objective(model, batch, head="causal")
    assert not isinstance(chosen, LabelledLoss)
    assert "fails" in found


def test_classification_has_its_own():
    chosen, _ = choose_objective(tiny_models.build("bert"), batch_of("bert"), head="classification")
    assert type(chosen) is ModelLoss


def test_classes_have_their_loss_in_full_width_where_the_model_rounds_it():
    model, batch = tiny_models.build("bert").bfloat16(), batch_of("bert", 8)
    chosen, found = choose_objective(model, batch, head="classification")
    assert isinstance(chosen, ClassLoss), found
    loss = chosen.total(model, batch)
    assert loss.dtype == torch.float32
    logits = model(**{**batch, "labels": None}).logits.double()
    expected = F.cross_entropy(logits, batch["labels"], reduction="sum")
    assert math.isclose(float(loss.detach()), float(expected.detach()), rel_tol=1e-6)
    assert model(**batch).loss.dtype == torch.bfloat16, "so the model's own would be rounded"


def test_a_penalty_is_added_to_the_loss_of_classes_in_training_alone():
    model, batch = tiny_models.build("bert"), batch_of("bert", 4)
    plain, chosen = ClassLoss(), ClassLoss(lambda: torch.tensor(0.5))
    with torch.no_grad():
        assert torch.equal(chosen.total(model.eval(), batch), plain.total(model, batch))
        whole = chosen.total(model.train(), batch)
    assert float(whole) > 2.0, "half a unit for each of four rows, and the loss"


def test_several_classes_a_row_keep_the_models_own_loss():
    model, batch = tiny_models.build("bert").bfloat16(), batch_of("bert", 4)
    model.config.problem_type = "multi_label_classification"
    chosen, found = choose_objective(model, batch, head="classification")
    assert type(chosen) is ModelLoss
    assert "the model's own loss" in found
