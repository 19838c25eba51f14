"""S1's callbacks in a plain transformers `Trainer`, and S1's helper functions."""

import math

import peft
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny_models
from peftlab import callbacks
from peftlab.batches import Collator
from peftlab.callbacks import (
    DynamicLoRACallback,
    GradientMeasuringTrainer,
    GradientNormCallback,
    create_layerwise_lora_config,
    create_phased_lora_config,
    print_trainable_parameters,
    setup_model_with_lora,
)
from peftlab.errors import ScheduleError
from peftlab.experiment_config import GradientAnalysisConfig, LoRAConfig, ModelConfig
from peftlab.gradient_log import GradientNormLog
from tiny_runs import make_rows

STEPS = 6


class Rows(Dataset):
    rows = make_rows("causal", 12)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Snapshots(TrainerCallback):
    """The adapter's tensors and unclipped norm at every step."""

    def __init__(self, model):
        self.model, self.seen = model, {}

    def on_step_begin(self, args, state, control, **_):
        self.seen[state.global_step] = self.copy()

    def on_train_end(self, args, state, control, **_):
        self.seen[state.global_step] = self.copy()

    def copy(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}


def adapted(num_layers=2, dtype=torch.float32):
    base = tiny_models.build("llama", num_layers).to(dtype)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


def trainer_of(model, folder, *extra, kind=Trainer, **changes):
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "weight_decay": 0.5, "report_to": "none", "use_cpu": True, "remove_unused_columns": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100, "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }  # fmt: skip
    own = {key: changes.pop(key) for key in ("gradient_callback",) if key in changes}
    snapshots = Snapshots(model)
    made = kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments | changes),
        train_dataset=Rows(),
        data_collator=Collator(0, "causal"),
        callbacks=[*extra, snapshots],
        **own,
    )
    return made, snapshots.seen


EARLY_LATE = {"num_layers": 2, "phase1_steps": (0, 3), "phase2_steps": (3, None)}


def moved(seen, start, end):
    return {n for n in seen[start] if not torch.equal(seen[start][n], seen[end][n])}


def test_early_then_late_in_a_plain_trainer(tmp_path):
    model = adapted()
    made, seen = trainer_of(model, tmp_path, DynamicLoRACallback(create_layerwise_lora_config(**EARLY_LATE)))
    made.train()
    assert moved(seen, 0, 3) == {n for n in seen[0] if ".layers.0." in n}
    assert moved(seen, 3, STEPS) == {n for n in seen[0] if ".layers.1." in n}


def test_the_trap_late_tensors_frozen_before_the_optimizer_is_built(tmp_path):
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)
    made, seen = trainer_of(model, tmp_path, DynamicLoRACallback(create_layerwise_lora_config(**EARLY_LATE)))
    made.create_optimizer()
    before = sum(len(group["params"]) for group in made.optimizer.param_groups)
    assert before == len(seen_names(model)) // 2, "the stock optimizer has only half of them"
    made.train()
    assert moved(seen, 3, STEPS) == {n for n in seen[0] if ".layers.1." in n}


def seen_names(model):
    return [n for n, _ in model.named_parameters() if "lora_" in n]


def test_companion_without_the_completion_the_late_half_never_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "_complete_optimizer", lambda *_: None)
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)
    made, seen = trainer_of(model, tmp_path, DynamicLoRACallback(create_layerwise_lora_config(**EARLY_LATE)))
    made.train()
    assert moved(seen, 3, STEPS) == set()


def test_three_phases_by_group(tmp_path, capsys):
    config = create_phased_lora_config((0, 2), (2, 4), (4, None))
    callback = DynamicLoRACallback(config)
    made, seen = trainer_of(adapted(), tmp_path, callback)
    made.train()
    assert moved(seen, 0, 2) == {n for n in seen[0] if "self_attn" in n}
    assert moved(seen, 2, 4) == {n for n in seen[0] if ".mlp." in n}
    assert moved(seen, 4, 6) == set(seen[0])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 0", "step 2", "step 4"]
    assert "8 tensors" in lines[0]
    assert (
        callback._get_layer_number("base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight") == 1
    )
    assert callback._get_layer_number("model.norm.weight") is None


def test_quiet_says_nothing(tmp_path, capsys):
    config = create_phased_lora_config((0, 2), (2, 4), (4, None))
    trainer_of(adapted(), tmp_path, DynamicLoRACallback(config, verbose=False))[0].train()
    assert "tensors" not in capsys.readouterr().out


def test_a_resumed_plain_trainer_enters_the_phase_of_its_step(tmp_path):
    config = create_layerwise_lora_config(**EARLY_LATE)
    whole, _ = trainer_of(
        adapted(), tmp_path, DynamicLoRACallback(config, verbose=False), save_strategy="steps", save_steps=4
    )
    whole.train()
    model = adapted()
    resumed, seen = trainer_of(model, tmp_path, DynamicLoRACallback(config, verbose=False))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sorted(seen) == [4, 5, 6]
    assert moved(seen, 4, 6) == {n for n in seen[4] if ".layers.1." in n}


def test_phases_that_end_before_the_run_are_refused(tmp_path):
    config = create_layerwise_lora_config(num_layers=2, phase1_steps=(0, 2), phase2_steps=(2, 4))
    with pytest.raises(ScheduleError, match="ends at step 4 but training runs to 6"):
        trainer_of(adapted(), tmp_path, DynamicLoRACallback(config))[0].train()


# -- gradient norms -----------------------------------------------------------------------------------------------


def log_of(tmp_path, name, *, kind=Trainer, clip=1e-3, config=None):
    callback = GradientNormCallback(config, tmp_path / name)
    extra = {"gradient_callback": callback} if kind is GradientMeasuringTrainer else {}
    listed = () if extra else (callback,)
    made, _ = trainer_of(adapted(), tmp_path, *listed, kind=kind, max_grad_norm=clip, **extra)
    made.train()
    return callback.log


def test_a_plain_trainer_clips_first_and_the_log_says_so(tmp_path):
    log = log_of(tmp_path, "plain")
    assert log.clipped is True
    assert log.steps == list(range(1, STEPS + 1))
    assert max(log.total_norm) == pytest.approx(1e-3, rel=1e-3), "what is seen is the clipped gradient"


def test_without_clipping_a_plain_trainer_sees_the_gradient_itself(tmp_path):
    assert log_of(tmp_path, "plain", clip=0.0).clipped is False


def test_the_measuring_trainer_sees_the_gradient_before_it_is_clipped(tmp_path):
    clipped = log_of(tmp_path, "clipped", kind=GradientMeasuringTrainer)
    loose = log_of(tmp_path, "loose", clip=0.0)
    assert clipped.clipped is False
    assert clipped.steps == list(range(1, STEPS + 1)), "once per optimizer step, not per batch"
    assert clipped.total_norm[0] == pytest.approx(loose.total_norm[0], rel=1e-6), "the whole accumulated step"
    assert clipped.total_norm[0] > 1e-2


def test_the_three_files_and_the_frequency(tmp_path):
    config = GradientAnalysisConfig(log_frequency=2)
    log = log_of(tmp_path, "files", config=config)
    assert log.steps == [2, 4, 6]
    written = sorted(p.name for p in (tmp_path / "files").iterdir())
    assert written == [
        f"gradient_analysis.{n}" for n in ("group_norms.csv", "layer_norms.csv", "summary.json")
    ]


def test_layers_can_be_left_out(tmp_path):
    log = log_of(tmp_path, "groups", config=GradientAnalysisConfig(measure_layer_norm=False))
    assert log.layer_data == {}
    assert len(log.total_norm) == STEPS


def test_both_callbacks_together_give_blanks_for_what_is_inactive(tmp_path):
    phases = DynamicLoRACallback(create_layerwise_lora_config(**EARLY_LATE), verbose=False)
    norms = GradientNormCallback(None, None)
    trainer_of(adapted(), tmp_path, phases, norms)[0].train()
    assert [v is None for v in norms.log.layer_data["layer_1_mlp"]] == [True] * 3 + [False] * 3
    assert [v is None for v in norms.log.layer_data["layer_0_mlp"]] == [False] * 3 + [True] * 3
    assert isinstance(norms.log, GradientNormLog)


def test_a_callback_given_twice_measures_once(tmp_path):
    callback = GradientNormCallback(None, None)
    made, _ = trainer_of(
        adapted(), tmp_path, callback, kind=GradientMeasuringTrainer, gradient_callback=callback
    )
    made.train()
    assert callback.log.steps == list(range(1, STEPS + 1))
    assert all(math.isfinite(v) for v in callback.log.total_norm)


# -- S1's functions -----------------------------------------------------------------------------------------------


def test_layerwise_config_as_documented():
    early, late = create_layerwise_lora_config(num_layers=22)
    assert (early["start_step"], early["end_step"], early["layer_range"]) == (0, 200, (0, 10))
    assert (late["start_step"], late["end_step"], late["layer_range"]) == (200, None, (11, 21))
    assert early["active_modules"] == late["active_modules"] == ["attention", "mlp"]


def test_odd_layers_give_the_smaller_half_first():
    early, late = create_layerwise_lora_config(num_layers=5)
    assert (early["layer_range"], late["layer_range"]) == ((0, 1), (2, 4))


def test_phased_config_as_documented():
    phases = create_phased_lora_config()
    assert [(p["start_step"], p["end_step"]) for p in phases] == [(0, 100), (100, 200), (200, None)]
    assert [p["active_modules"] for p in phases] == [["attention"], ["mlp"], ["attention", "mlp"]]
    assert [p["layer_range"] for p in phases] == [None] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_layerwise_lora_config(num_layers=1), "1 layers has no two halves"),
        (lambda: create_layerwise_lora_config(phase2_steps=(250, None)), "leave a gap"),
        (lambda: create_phased_lora_config(phase2_steps=(50, 200)), "leave an overlap"),
        (lambda: create_phased_lora_config(phase1_modules=("atention",)), r"unknown groups \['atention'\]"),
        (lambda: DynamicLoRACallback([]), "at least one phase"),
    ],
)
def test_configs_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


def test_print_trainable_parameters(capsys):
    model = adapted()
    trainable, total = print_trainable_parameters(model)
    assert trainable == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert total == sum(p.numel() for p in model.parameters())
    out = capsys.readouterr().out
    assert f"trainable: {trainable:,} parameters in 16 tensors" in out
    assert f"of {total:,}" in out


def test_setup_model_with_lora(tmp_path):
    folder = tiny_models.save_model(tmp_path / "model")
    model, tokenizer = setup_model_with_lora(ModelConfig(model_id=str(folder)), LoRAConfig(r=2))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".lora_")[0].rpartition(".")[2] for n in trainable} == {"q_proj", "v_proj"}
    assert {min(p.shape) for p in trainable.values()} == {2}
    assert tokenizer.pad_token_id is not None
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n), (
        "the base is frozen"
    )


def test_setup_adapts_experts(tmp_path):
    folder = tiny_models.save_model(tmp_path / "mixtral", "mixtral")
    made, _ = setup_model_with_lora(
        ModelConfig(model_id=str(folder)), LoRAConfig(target_module_group="mlp_only")
    )
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert trained
    assert all(".experts." in name and ".lora_" in name for name in trained)
