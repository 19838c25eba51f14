"""Law 1: what does not train is found within its steps; what must not move is found when it does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny_models
from peftlab.errors import NonFiniteError, NotTrainingError
from peftlab.gradients import read_gradients
from peftlab.mapping import map_model
from peftlab.methods import lora
from peftlab.proof import TrainingProof, fingerprint

BLOCKED = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
BEHIND = BLOCKED.replace("lora_B", "lora_A")


def attach(name="llama"):
    base = tiny_models.build(name)
    settings_ = lora.Settings(targets="both", dropout=0, rank=2)
    return lora.attach(base, map_model(base), settings_, head=tiny_models.HEADS[name], seed=0)


def run(attached, steps=2, *, rate=1e-2, proof=None, move=True, name="llama", disturb=lambda i: None):
    """Drive a proof as the trainer does; gives what it showed."""
    parameters = attached.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate if move else 0.0, weight_decay=0.0)
    if proof is None:
        proof = TrainingProof(parameters, attached.steps_to_train)
        proof.enter("first")
    shown = None
    for i in range(steps):
        optimizer.zero_grad(set_to_none=True)
        attached.model(**tiny_models.training_inputs(name, seed=i)).loss.backward()
        disturb(i)
        proof.observe(read_gradients(parameters), step=i + 1)
        optimizer.step()
        shown = proof.after_step(learning_rate=rate, step=i + 1) or shown
    return shown


@pytest.mark.parametrize("name", tiny_models.MAIN)
def test_a_healthy_adapter_is_shown_to_train_in_two_steps(name):
    attached = attach(name)
    shown = run(attached, 2, name=name)
    assert shown.tensors == len(attached.parameters())
    assert shown.steps_needed == 2, "A stands behind B = 0"
    assert (shown.phase, shown.unreached) == ("first", ())


def test_a_needs_two_steps_and_b_one():
    attached = attach()
    assert {attached.steps_to_train(n) for n in attached.parameters() if ".lora_A." in n} == {2}
    assert {attached.steps_to_train(n) for n in attached.parameters() if ".lora_B." in n} == {1}
    assert run(attached, 1) is None, "after one step A has not moved, and need not have"


def test_a_dead_factor_is_caught_at_its_step():
    attached = attach()
    attached.parameters()[BLOCKED].register_hook(torch.zeros_like)
    with pytest.raises(NotTrainingError) as caught:
        run(attached, 3)
    assert f"step 1, phase 'first': 1 active tensors did not train in 1 steps: {BLOCKED}" in str(caught.value)
    assert "its gradient was zero" in str(caught.value)


def test_what_stands_behind_a_dead_factor_is_caught_one_step_later():
    attached = attach()
    dead = attached.parameters()[BEHIND]
    dead.register_hook(torch.zeros_like)
    with pytest.raises(NotTrainingError, match=f"step 2, .*{BEHIND}: its gradient was zero"):
        run(attached, 3)


def test_a_tensor_the_optimizer_does_not_have_is_caught():
    """S1's trap: gradients come, the optimizer never moves the tensor."""
    attached = attach()
    parameters = attached.parameters()
    proof = TrainingProof(parameters, attached.steps_to_train)
    proof.enter("late")
    some = [p for n, p in parameters.items() if n != BLOCKED]
    optimizer = torch.optim.AdamW(some, lr=1e-2)
    attached.model(**tiny_models.training_inputs("llama")).loss.backward()
    proof.observe(read_gradients(parameters), step=1)
    optimizer.step()
    with pytest.raises(NotTrainingError, match=f"phase 'late'.*{BLOCKED}: it did not change"):
        proof.after_step(learning_rate=1e-2, step=1)


def test_steps_without_a_learning_rate_do_not_count():
    attached = attach()
    proof = TrainingProof(attached.parameters(), attached.steps_to_train)
    proof.enter("warm-up")
    assert run(attached, 5, rate=0.0, proof=proof) is None
    assert proof.is_open
    assert run(attached, 2, proof=proof).steps_needed == 2
    assert not proof.is_open


def test_companion_if_they_counted_the_same_steps_would_be_a_breach():
    attached = attach()
    proof = TrainingProof(attached.parameters(), attached.steps_to_train)
    proof.enter("warm-up")
    with pytest.raises(NotTrainingError, match="did not change"):
        run(attached, 5, move=False, proof=proof)


def test_what_the_forward_pass_never_reaches_is_named_and_made_untrainable():
    attached = attach()
    model = attached.model
    model.base_model.model.model.layers[1].mlp.forward = lambda x: x  # leaves the whole mlp of layer 1 out
    parameters = attached.parameters()
    shown = run(attached, 2)
    left_out = {n for n in parameters if ".layers.1.mlp." in n}
    assert set(shown.unreached) == left_out
    assert shown.tensors == len(parameters) - len(left_out)
    assert {n for n, p in parameters.items() if not p.requires_grad} == left_out


def test_warm_up_steps_do_not_forget_what_is_not_reached():
    attached = attach()
    attached.model.base_model.model.model.layers[1].mlp.forward = lambda x: x
    proof = TrainingProof(attached.parameters(), attached.steps_to_train)
    proof.enter("warm-up")
    assert run(attached, 2, rate=0.0, proof=proof) is None
    shown = run(attached, 2, proof=proof)
    assert set(shown.unreached) == {n for n in attached.parameters() if ".layers.1.mlp." in n}


def test_a_forward_pass_that_reaches_nothing_is_a_breach():
    parameters = {"a": nn.Parameter(torch.ones(2))}
    proof = TrainingProof(parameters, lambda name: 1)
    proof.enter("first")
    proof.observe(read_gradients(parameters), step=1)
    with pytest.raises(NotTrainingError, match="the forward pass reaches none of its tensors"):
        proof.after_step(learning_rate=1e-3, step=1)


def test_a_phase_that_trains_nothing_is_a_breach():
    proof = TrainingProof({"a": nn.Parameter(torch.ones(2), requires_grad=False)}, lambda name: 1)
    with pytest.raises(NotTrainingError, match="phase 'empty' trains nothing"):
        proof.enter("empty")


@pytest.fixture
def half_frozen():
    parameters = {"moving": nn.Parameter(torch.ones(4)), "frozen": nn.Parameter(torch.ones(4))}
    parameters["frozen"].requires_grad_(False)
    proof = TrainingProof(parameters, lambda name: 1)
    proof.enter("half")
    return parameters, proof


def test_a_frozen_tensor_with_a_gradient_is_caught(half_frozen):
    parameters, proof = half_frozen
    for parameter in parameters.values():
        parameter.grad = torch.ones(4)
    with pytest.raises(NotTrainingError, match="step 1, phase 'half': frozen tensors have gradients: frozen"):
        proof.observe(read_gradients(parameters), step=1)


def test_a_frozen_tensor_that_moves_is_caught_at_the_end_and_at_the_next_phase(half_frozen):
    parameters, proof = half_frozen
    proof.check_frozen()
    with torch.no_grad():
        parameters["frozen"][2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for check in (proof.check_frozen, lambda: proof.enter("next")):
        with pytest.raises(NotTrainingError, match="phase 'half': frozen tensors have changed: frozen"):
            check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_at_any_step(bad, half_frozen):
    parameters, proof = half_frozen
    parameters["moving"].grad = torch.ones(4)
    proof.observe(read_gradients(parameters), step=1)
    with torch.no_grad():
        parameters["moving"].add_(1)
    assert proof.after_step(learning_rate=1.0, step=1) is not None
    parameters["moving"].grad = torch.full((4,), bad)
    with pytest.raises(NonFiniteError, match="step 9: the gradient is not finite in moving"):
        proof.observe(read_gradients(parameters), step=9)


def test_a_proof_is_given_once(half_frozen):
    parameters, proof = half_frozen
    for step in range(2):
        parameters["moving"].grad = torch.ones(4)
        proof.observe(read_gradients(parameters), step=step)
        with torch.no_grad():
            parameters["moving"].add_(1)
        shown = proof.after_step(learning_rate=1.0, step=step)
        assert (shown is None) == (step == 1)


def test_many_dead_tensors_make_a_short_message():
    parameters = {f"p{i}": nn.Parameter(torch.ones(1)) for i in range(20)}
    proof = TrainingProof(parameters, lambda name: 1)
    proof.enter("first")
    for parameter in parameters.values():
        parameter.grad = torch.zeros(1)
    proof.observe(read_gradients(parameters), step=1)
    with pytest.raises(NotTrainingError, match=r"20 active tensors .*\(\+14 more\)"):
        proof.after_step(learning_rate=1.0, step=1)


# -- fingerprints -------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
FEW = settings(max_examples=80, deadline=None)


@FEW
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_any_flipped_bit_changes_the_fingerprint(data, shape, dtype, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    copy = tensor.clone()
    assert fingerprint(copy) == fingerprint(tensor)
    words = copy.view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, words.numel() - 1))
    words[place] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(copy) != fingerprint(tensor)


@FEW
@given(data=st.data(), size=st.integers(2, 50), seed=st.integers(0, 999))
def test_swapped_values_change_the_fingerprint(data, size, seed):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    one, two = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    swapped = tensor.clone()
    swapped[one], swapped[two] = tensor[two], tensor[one]
    assert fingerprint(swapped) != fingerprint(tensor)


@FEW
@given(
    size=st.integers(1, 30),
    others=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_a_constant_shift_or_scale_changes_the_fingerprint(size, others, seed):
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    for value in others:
        for moved in (tensor + value, tensor * (1 + value / 1e3)):
            assert (fingerprint(moved) == fingerprint(tensor)) == torch.equal(moved, tensor)


def test_signed_zero_and_odd_sizes_and_views():
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0])), "bits, not values"
    odd = torch.arange(7, dtype=torch.bfloat16)
    assert fingerprint(odd) != fingerprint(torch.cat([odd, torch.zeros(2, dtype=torch.bfloat16)]))
    matrix = torch.randn(3, 5)
    assert fingerprint(matrix.t()) == fingerprint(matrix.t().contiguous())
    assert fingerprint(torch.zeros(0)) == 0


def test_the_fingerprint_does_not_depend_on_where_it_is_cut(monkeypatch):
    tensor = torch.randn(1000)
    whole = fingerprint(tensor)
    moved = tensor.clone()
    moved[900] += 1
    monkeypatch.setattr("peftlab.proof._CHUNK_BYTES", 64)
    assert fingerprint(tensor) != fingerprint(moved)
    assert isinstance(whole, int)
    swapped = torch.cat([tensor[16:32], tensor[:16], tensor[32:]])
    assert fingerprint(swapped) != fingerprint(tensor), "two chunks that change places"
