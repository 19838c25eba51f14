"""Runs that train together end where each ends alone; nothing of one run reaches another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
import tiny_runs
from peftlab.batches import Collator, PackingCollator
from peftlab.config import build_config
from peftlab.errors import ConfigError, MethodError, ModelError, RunError
from peftlab.isolation import Isolation
from peftlab.joint.adapters import AdapterOfRun, JoinedAdapters
from peftlab.joint.shares import join_batches
from peftlab.joint.training import JointRun, train_together
from peftlab.mapping import map_model
from peftlab.methods.lora import Settings, attach
from peftlab.objective import ModelLoss, labelled_loss
from peftlab.schedule import Schedule, place_phases, strategy_phases
from peftlab.trainer import LabTrainer
from peftlab.training import TrainingParts, make_arguments

RUNS: dict[str, dict[str, Any]] = {
    "small": {"rank": 2, "alpha": 4, "targets": "both", "dropout": 0.1, "rate": 1e-3, "seed": 1},
    "attentive": {
        "rank": 4, "alpha": 16, "targets": "attention", "dropout": 0.2, "rate": 5e-4, "seed": 2, "accumulation_steps": 2,
    },
    "wide": {"rank": 8, "alpha": 8, "targets": "mlp", "dropout": 0.0, "rate": 2e-3, "seed": 3, "batch_size": 3},
    "dora": {
        "rank": 3, "alpha": 6, "targets": "attention_qv", "dropout": 0.3, "use_dora": True, "rate": 1e-3, "seed": 4,
    },
}  # fmt: skip
CLOSE = 1e-5


def settings(run: dict[str, Any]) -> Settings:
    names = (
        "rank", "alpha", "targets", "dropout", "use_dora", "use_rslora", "init", "bias", "optimizer", "modules_to_save",
        "rank_pattern", "layers",
    )  # fmt: skip
    return Settings(**{name: run[name] for name in names if name in run})


def prepare(
    attachment: Any,
    run: dict[str, Any],
    folder: Path,
    *,
    head: str,
    steps: int,
    packed: bool = False,
    phases: str = "",
) -> tuple[TrainingParts, Any]:
    asked = {name: run[name] for name in ("batch_size", "accumulation_steps") if name in run}
    training = {"max_steps": steps, "batch_size": 2, "learning_rate": run["rate"], "warmup_steps": 2} | asked
    training |= {"seed": run["seed"], "weight_decay": 0.1, "validation_steps": 10 if steps < 300 else 150}
    training |= {"save_steps": 10 if steps < 300 else 300}
    config = build_config({"training": training, "model": {"device": "cpu"}})
    placed = place_phases(strategy_phases(phases, total_steps=steps) if phases else (), total_steps=steps)
    schedule = Schedule(placed, steps, run["rate"], 2)
    objective = labelled_loss(attachment.model, head=head)
    parts = TrainingParts(
        attachment=attachment,
        schedule=schedule,
        objective=ModelLoss(head) if isinstance(objective, str) else objective,
        collator=Collator(0, head),
        train_rows=tiny_runs.make_rows(head, seed=run["seed"]),
        validation_rows=tiny_runs.make_rows(head, 5, seed=9),
        seed=run["seed"],
        isolation=Isolation(attachment.model) if packed else None,
    )
    return parts, make_arguments(config, folder, schedule)


def base(name: str, dropout: float = 0.0) -> Any:
    """A tiny model, its own dropout on where asked."""
    model = tiny_models.build(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        for rate in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, dropout)
    return model


def join(
    name: str, folder: Path, runs: dict[str, dict[str, Any]], *, dropout: float = 0.0, **how: Any
) -> Any:
    head, model = tiny_models.HEADS[name], base(name, dropout)
    adapters = {key: AdapterOfRun(settings(run), run["seed"]) for key, run in runs.items()}
    joined = JoinedAdapters(model, map_model(model), adapters, head=head)
    return joined, {
        key: JointRun(*prepare(joined.attachments[key], run, folder / f"joint {key}", head=head, **how))
        for key, run in runs.items()
    }


def train_alone(
    name: str, folder: Path, run: dict[str, Any], *, dropout: float = 0.0, **how: Any
) -> LabTrainer:
    model = base(name, dropout)
    attachment = attach(
        model, map_model(model), settings(run), head=tiny_models.HEADS[name], seed=run["seed"]
    )
    trainer = LabTrainer(*prepare(attachment, run, folder, head=tiny_models.HEADS[name], **how))
    trainer.train()
    return trainer


def check_same(name: str, folder: Path, runs: dict[str, dict[str, Any]], **how: Any) -> None:
    joined, joint = join(name, folder, runs, **how)
    trainers = train_together(joined, joint)
    for key, run in runs.items():
        alone = train_alone(name, folder / key, run, **how)
        own, expected = joined.attachments[key].tensors(), alone.parts.attachment.tensors()
        assert list(own) == list(expected)
        for tensor in own:
            torch.testing.assert_close(
                own[tensor], expected[tensor], rtol=0, atol=CLOSE, msg=f"{key}: {tensor}"
            )
        losses = [
            [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            for trainer in (trainers[key], alone)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(
    ("packed", "steps"), [(True, 300 if os.environ.get("PEFTLAB_LONG") == "1" else 40), (False, 20)]
)
def test_four_runs_end_where_each_ends_alone(packed: bool, steps: int, tmp_path: Path) -> None:
    check_same("llama", tmp_path, RUNS, steps=steps, packed=packed)


@pytest.mark.parametrize("name", ["t5", "bart", "opt", "bloom", "phi3", "gptj", "llama_tied"])
def test_families(name: str, tmp_path: Path) -> None:
    runs = {key: {**RUNS[key], "targets": "both"} for key in ("small", "dora")}
    check_same(name, tmp_path, runs, steps=10)


@pytest.mark.parametrize(
    ("name", "packed"), [("gpt2", False), ("gpt2", True), ("bart", False), ("t5", False)]
)
def test_the_bases_own_dropout_is_each_runs(name: str, packed: bool, tmp_path: Path) -> None:
    check_same(name, tmp_path, RUNS, steps=10, packed=packed, dropout=0.2)


def test_phases_and_one_run_alone(tmp_path: Path) -> None:
    check_same("llama", tmp_path, {key: RUNS[key] | {"targets": "both"} for key in ("small", "attentive")},
               steps=12, phases=tiny_runs.BOTH_MLP_ATTENTION)  # fmt: skip
    joined, joint = join("llama", tmp_path, {"long": RUNS["small"]}, steps=3)
    train_together(joined, joint)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_has_its_own_optimizer_scale_and_rank_of_each_module(dropout: float, tmp_path: Path) -> None:
    plain = {"rank": 4, "alpha": 4, "targets": "both", "dropout": dropout, "rate": 1e-3}
    runs = {
        "plus": plain | {"optimizer": "lora_plus", "seed": 1, "alpha": 16},
        "frozen": plain | {"optimizer": "lora_fa", "seed": 2},
        "scaled": plain | {"use_rslora": True, "seed": 3, "rank_pattern": {"mlp": 2}},
        "top": plain | {"layers": (1,), "seed": 4},
    }
    check_same("llama", tmp_path, runs, steps=12, packed=True)


def test_wide_adapters_are_computed_one_by_one(tmp_path: Path) -> None:
    runs = {name: RUNS[name] | {"rank": 49, "targets": "both"} for name in ("small", "wide")}
    check_same("llama", tmp_path, runs, steps=4)


def test_a_run_that_fails_leaves_the_others_as_they_are_alone(tmp_path: Path) -> None:
    runs = {"good": RUNS["small"], "bad": RUNS["wide"] | {"rate": 1e30, "seed": 5}}
    joined, joint = join("llama", tmp_path, runs, steps=10)
    with pytest.raises(RunError, match=r"1 of 2 runs failed: bad: .*good trained to the end"):
        train_together(joined, joint)
    expected = train_alone("llama", tmp_path / "good", RUNS["small"], steps=10).parts.attachment.tensors()
    for name, tensor in joined.attachments["good"].tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=CLOSE)


def test_saved_as_alone_and_taken_off(tmp_path: Path) -> None:
    import peft

    joined, joint = join("llama", tmp_path, {key: RUNS[key] for key in ("small", "dora")}, steps=3)
    train_together(joined, joint)
    batch = tiny_models.inputs("llama")
    for name in joint:
        joined.save(name, tmp_path / "saved" / name)
        loaded = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path / "saved" / name))
        with torch.no_grad(), joined.alone(name):
            joined.model.eval()
            torch.testing.assert_close(joined.model(**batch).logits, loaded(**batch).logits)
    back, plain = joined.remove(), base("llama")
    assert list(back.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(back(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias=all"),
        ({"init": "pissa"}, "init=pissa"),
        ({"modules_to_save": ("norm",)}, "modules_to_save"),
        ({"targets": "all"}, "embeddings and head"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(MethodError, match=rf"run 'odd' cannot share the base.*{words}"):
        join("llama", tmp_path, {"odd": RUNS["small"] | changes}, steps=2)


def test_heads_and_names_and_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"classification model"):
        join("bert", tmp_path, RUNS, steps=2)
    with pytest.raises(MethodError, match=r"cannot be called 'q_proj'"):
        join("llama", tmp_path, {"q_proj": RUNS["small"]}, steps=2)
    joined, joint = join("llama", tmp_path, {key: RUNS[key] for key in ("small", "dora")}, steps=2)
    with pytest.raises(ConfigError, match=r"give each one run"):
        train_together(joined, {"small": joint["small"]})


def test_a_model_that_mixes_rows_is_refused(tmp_path: Path) -> None:
    joined, joint = join("llama", tmp_path, {key: RUNS[key] for key in ("small", "wide")}, steps=2)
    inner = joined.model.base_model.model.model
    inner.norm.register_forward_hook(lambda _, __, hidden: hidden + hidden.mean(dim=(0, 1)))
    with pytest.raises(ModelError, match=r"cannot share a pass: the loss of small"):
        train_together(joined, joint)


@pytest.mark.parametrize("head", ["causal", "seq2seq"])
def test_shares_come_apart_as_they_were(head: str) -> None:
    rows = tiny_runs.make_rows(head)
    batches = {name: Collator(0, head)(rows[i : i + 3]) for i, name in enumerate(("a", "b", "c"))}
    joint, shares = join_batches(batches, pad_id=0)
    for key in ("input_ids", "labels"):
        hidden = joint[key][..., None].float()
        for batch, piece in zip(batches.values(), shares.split(hidden), strict=True):
            assert torch.equal(piece[..., 0].long(), batch[key])
        flat = hidden.flatten(0, 1)
        assert shares.merge(shares.split(flat), flat).shape == flat.shape
    packed = {name: PackingCollator()(rows[i : i + 3]) for i, name in enumerate(("a", "b"))}
    joint, shares = join_batches(packed, pad_id=0)
    hidden = joint["input_ids"][..., None]
    assert torch.equal(shares.merge(shares.split(hidden), hidden), hidden)
