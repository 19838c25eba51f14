"""AdaLoRA under the manager: ranks are really taken, as peft takes them, and stay taken."""

from types import SimpleNamespace

import peft
import pytest
import torch
from encoder_models import encoder, ids
from torch import nn

import peftlab
from peftlab.errors import MethodError, NotTrainingError, ScheduleError
from peftlab.manager import EfficientFineTuningManager

TARGETS = ["linear1", "linear2", "output"]
STEPS, RANK, TARGET = 24, 6, 2
BUDGET = {"target_rank": TARGET, "warmup_share": 0.125, "final_share": 0.25, "interval_steps": 2}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def managed(allocation="importance", **settings):
    torch.manual_seed(3)
    return peftlab.apply_adalora_to_model(
        encoder(2),
        TARGETS,
        rank=RANK,
        alpha=6.0,
        dropout_probability=0.0,
        rank_allocation=allocation,
        **settings,
    )


def ranks(manager):
    return [layer.get_effective_rank() for layer in manager.adalora_layers.values()]


def train(model, parameters, after, steps=STEPS):
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    seen = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        output = model(ids(seed=step))
        (output - torch.sin(output.detach() * 3)).square().mean().backward()
        optimizer.step()
        seen.append(after(step))
    return seen


def trained(allocation="importance", **settings):
    manager = managed(allocation, **settings)
    manager.begin(STEPS, **BUDGET)

    def after(step):
        manager.update_and_allocate(step)
        return ranks(manager)

    return manager, train(manager.model, manager.get_trainable_parameters(), after)


def test_it_is_what_peft_does_by_hand():
    manager, _ = trained()
    start = managed()  # the same random numbers
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=TARGET, lora_alpha=6, total_step=STEPS, tinit=3, tfinal=6, deltaT=2,
        target_modules=list(start.adalora_layers),
    )  # fmt: skip
    by_hand = peft.get_peft_model(
        encoder(2), config
    ).train()  # in evaluation torch would read past its layers
    with torch.no_grad():
        for path, layer in start.adalora_layers.items():
            for part in ("lora_A", "lora_B", "lora_E"):
                own = getattr(by_hand.base_model.model.get_submodule(path), part)
                own["default"].copy_(getattr(layer, part)["default"])
    parameters = [p for n, p in by_hand.named_parameters() if p.requires_grad and "ranknum" not in n]
    train(by_hand.base_model.model, parameters, by_hand.base_model.update_and_allocate)
    for path, layer in manager.adalora_layers.items():
        other = by_hand.base_model.model.get_submodule(path)
        for part in ("lora_A", "lora_B", "lora_E"):
            torch.testing.assert_close(
                getattr(layer, part)["default"], getattr(other, part)["default"], rtol=0, atol=1e-9
            )
        layer.lora_E["default"].data *= 1.01
        if layer.get_effective_rank():
            assert not torch.allclose(layer.lora_E["default"], other.lora_E["default"], rtol=0, atol=1e-9)


def test_ranks_fall_to_the_budget_and_stand():
    manager, seen = trained()
    total = [sum(found) for found in seen]
    assert total[0] == RANK * len(manager.adalora_layers)
    assert total[-7:] == [TARGET * len(manager.adalora_layers)] * 7
    assert len({tuple(found) for found in seen[-7:]}) == 1, "what is taken stays taken, and the same ones"
    assert len(set(seen[-1])) > 1, "given where they matter"


def test_allocations_differ():
    found = {name: trained(name)[1][-1] for name in ("uniform", "importance", "magnitude")}
    assert set(found["uniform"]) == {TARGET}
    assert sum(found["importance"]) == sum(found["magnitude"]) == sum(found["uniform"])
    assert len({tuple(v) for v in found.values()}) == 3, found


def test_magnitude_takes_the_smallest_singular_values():
    manager = managed("magnitude")
    manager.begin(10, target_rank=5, warmup_share=0, final_share=0.8, interval_steps=1)
    values = [layer.lora_E["default"] for layer in manager.adalora_layers.values()]
    with torch.no_grad():
        for i, value in enumerate(values):
            value.copy_(torch.arange(1.0, RANK + 1).unsqueeze(1) * (-1) ** i * (i + 1))
    manager.model(ids()).sum().backward()
    manager.update_and_allocate(2)
    size = torch.cat([torch.arange(1.0, RANK + 1) * (i + 1) for i in range(len(values))])
    kept = torch.cat([value.detach().flatten() != 0 for value in values])
    assert int(kept.sum()) == 5 * len(values)
    assert size[kept].min() >= size[~kept].max()


def test_without_adaptive_rank_nothing_is_taken():
    manager, seen = trained(adaptive_rank=False)
    assert seen[-1] == [RANK] * len(manager.adalora_layers)


def test_an_optimizer_can_be_followed():
    manager, _ = trained()
    followed = managed()
    optimizer = torch.optim.AdamW(followed.get_trainable_parameters(), lr=0.02)
    followed.begin(STEPS, **BUDGET, optimizer=optimizer)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        output = followed.model(ids(seed=step))
        (output - torch.sin(output.detach() * 3)).square().mean().backward()
        optimizer.step()
    assert ranks(followed) == ranks(manager)
    for own, other in zip(
        followed.get_trainable_parameters(), manager.get_trainable_parameters(), strict=True
    ):
        assert torch.equal(own, other)
    followed.remove()
    optimizer.step()  # nobody listens any more


@pytest.mark.parametrize("percent", [0, 1])
def test_the_orthogonality_loss_is_pefts(percent):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x):
            return SimpleNamespace(loss=self.linear2(self.linear1(x)).sum())

    model = WithLoss().double()
    x = torch.randn(2, 5, dtype=torch.float64)
    plain = model(x).loss.item()
    config = peft.AdaLoraConfig(
        init_r=4, total_step=10, target_modules=["linear1", "linear2"], orth_reg_weight=0.5
    )
    by_hand = peft.get_peft_model(model, config)
    theirs = by_hand.base_model(x).loss.item() - plain
    manager = peftlab.apply_adalora_to_model(WithLoss().double(), ["linear1", "linear2"], rank=4)
    with torch.no_grad():
        for path, layer in manager.adalora_layers.items():
            for part in ("lora_A", "lora_B"):
                other = getattr(by_hand.base_model.model.get_submodule(path), part)["default"]
                getattr(layer, part)["default"].copy_(other * (1 + percent / 100))
    ours = manager.orthogonality_loss()
    assert (ours.item() == pytest.approx(theirs, abs=1e-12)) is (percent == 0)
    ours.backward()
    gradients = [layer.lora_A["default"].grad for layer in manager.adalora_layers.values()]
    assert all(gradient.any() for gradient in gradients)


def test_what_is_forgotten_is_said():
    manager = managed()
    with pytest.raises(ScheduleError, match="call begin"):
        manager.update_and_allocate(1)
    for settings, told in (
        ({"target_rank": RANK}, f"target_rank {RANK} leaves no rank"),
        ({"target_rank": 0}, "from 1 to 5"),
        ({"warmup_share": 0.7}, "leave 0 in which ranks"),
    ):
        with pytest.raises(ScheduleError, match=told):
            manager.begin(STEPS, **settings)
    manager.begin(STEPS)
    with pytest.raises(NotTrainingError, match=r"no gradient on transformer\.layers\.0\.linear1.*zero_grad"):
        manager.update_and_allocate(1)
    plain = peftlab.apply_lora_to_model(encoder(), ["linear1"])
    for call in (lambda: plain.begin(3), lambda: plain.update_and_allocate(1), plain.orthogonality_loss):
        with pytest.raises(MethodError, match="apply_adalora first"):
            call()


def test_lora_beside_it_is_not_ranked():
    manager = EfficientFineTuningManager(encoder(2))
    manager.apply_lora(["self_attn.out_proj"], dropout_probability=0.0)
    manager.apply_adalora(TARGETS, rank=RANK, dropout_probability=0.0, rank_allocation="importance")
    manager.begin(STEPS, **BUDGET)
    train(manager.model, manager.get_trainable_parameters(), manager.update_and_allocate)
    assert sum(ranks(manager)) == TARGET * len(manager.adalora_layers)
    assert all(layer.lora_B["default"].weight.any() for layer in manager.lora_layers.values())
