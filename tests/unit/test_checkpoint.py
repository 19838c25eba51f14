"""Checkpoints: found, pruned, and optimizers that come back to the bit."""

import json

import pytest
import torch
from torch import nn

from peftlab.checkpoint import (
    OPTIMIZER_FILE,
    last_good_checkpoint,
    list_checkpoints,
    load_adapter,
    load_optimizer,
    prune_checkpoints,
    save_optimizer,
)
from peftlab.errors import CheckpointError
from peftlab.files import new_folder


def make(folder, *steps):
    for step in steps:
        with new_folder(folder / f"checkpoint-{step}") as aside:
            (aside / "a.bin").write_bytes(str(step).encode())
    return folder


def test_checkpoints_are_listed_by_number(tmp_path):
    make(tmp_path, 10, 9, 100)
    (tmp_path / ".checkpoint-11.123.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [9, 10, 100]
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_the_last_one_that_verifies_is_taken(tmp_path):
    make(tmp_path, 1, 2, 3)
    assert last_good_checkpoint(tmp_path) == (tmp_path / "checkpoint-3", [])
    (tmp_path / "checkpoint-3" / "a.bin").write_bytes(b"x")
    (tmp_path / "checkpoint-2" / "checksums.json").unlink()
    good, problems = last_good_checkpoint(tmp_path)
    assert good == tmp_path / "checkpoint-1"
    assert ["checkpoint-3" in problems[0], "checkpoint-2" in problems[1]] == [True, True]
    (tmp_path / "checkpoint-1" / "a.bin").unlink()
    assert last_good_checkpoint(tmp_path)[0] is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    make(tmp_path, 1, 2, 3, 4)
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 4]
    prune_checkpoints(tmp_path, keep=5, best_step=None)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3, 4]


def parameters():
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(3, 2)) for name in ("a.x", "b|y", "c")}


def train(optimizer, params, steps=3, skip=()):
    source = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for name, parameter in params.items():
            gradient = torch.randn(parameter.shape, generator=source)
            parameter.grad = None if name in skip else gradient
        optimizer.step()


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.95)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "weight_decay": 0.3}, {"params": p[1:]}], lr=0.1
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_optimizer_comes_back_to_the_bit(kind, tmp_path):
    one = parameters()
    optimizer = MAKERS[kind](list(one.values()))
    train(optimizer, one, skip=("c",))  # c was never active: it has no state
    save_optimizer(optimizer, {p: n for n, p in one.items()}, tmp_path)
    two = parameters()
    for name in two:
        two[name].data.copy_(one[name])
    other = MAKERS[kind](list(two.values()))
    train(other, parameters(), steps=0)
    load_optimizer(other, {p: n for n, p in two.items()}, tmp_path)
    assert {k: v for k, v in other.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    train(optimizer, one)
    train(other, two)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_the_check_notices_a_lost_moment(tmp_path):
    one = parameters()
    optimizer = MAKERS["adamw"](list(one.values()))
    train(optimizer, one)
    before = {n: p.detach().clone() for n, p in one.items()}
    optimizer.state.clear()
    train(optimizer, one)
    two = {n: nn.Parameter(t) for n, t in before.items()}
    whole = MAKERS["adamw"](list(two.values()))
    train(whole, two)
    assert all(torch.equal(one[n], two[n]) for n in one), "a fresh optimizer, as the one without its moments"
    three = parameters()
    kept = MAKERS["adamw"](list(three.values()))
    train(kept, three)
    train(kept, three)
    assert not any(torch.equal(one[n], three[n]) for n in one)


def test_a_state_of_other_parameters_is_refused(tmp_path):
    one = parameters()
    optimizer = MAKERS["adamw"](list(one.values()))
    train(optimizer, one)
    save_optimizer(optimizer, {p: n for n, p in one.items()}, tmp_path)
    fewer = dict(list(parameters().items())[:2])
    with pytest.raises(CheckpointError, match="belongs to other parameters"):
        load_optimizer(MAKERS["adamw"](list(fewer.values())), {p: n for n, p in fewer.items()}, tmp_path)


def test_the_files_are_safetensors_and_json(tmp_path):
    one = parameters()
    optimizer = MAKERS["adamw"](list(one.values()))
    train(optimizer, one)
    save_optimizer(optimizer, {p: n for n, p in one.items()}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["optimizer.json", OPTIMIZER_FILE]
    said = json.loads((tmp_path / "optimizer.json").read_text())
    assert said["class"] == "AdamW"
    assert said["param_groups"][0]["params"] == list(one)


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter\.safetensors"):
        load_adapter(tmp_path)
