"""The main job on E2E NLG's own files with the GPT-2 tokenizer: the run that the issue tracker shows."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import whole_runs
from peftlab.checkpoint import load_adapter
from peftlab.run import RunFolder


def test_early_then_late_on_e2e(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = whole_runs.peftlab(
        "run", "--dataset", "e2e_nlg", "--data-dir", str(shared_data / "e2e"), "--model", str(tmp_path / "model"),
        "--max_steps", "30", "--dynamic_lora", "--phase_strategy", "early->late", "--phase1_end", "15",
        "--batch_size", "4", "--eval_samples", "4",
        "--set", "training.save_steps=5", "--set", "training.validation_steps=15",
        "--set", "training.validation_rows=16", "--set", "training.keep_checkpoints=9",
        "--set", "evaluation.max_new_tokens=8",
        "--output_dir", str(tmp_path / "runs"), folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = list((tmp_path / "runs").iterdir())
    run = RunFolder(folder)
    assert run.is_finished
    assert run.preflight["rows"]["train"]["read"] == 4000
    at = {step: load_adapter(run.checkpoints / f"checkpoint-{step}") for step in (5, 10, 15, 20, 30)}
    for name in at[30]:
        early = ".layers.0." in name
        if "lora_B" in name:  # starts at zero
            assert bool(at[15][name].any()) == early
        assert torch.equal(at[5][name], at[15][name]) != early
        assert torch.equal(at[15][name], at[30][name]) == early
    assert [phase["proved"] for phase in run.summary()["phases"]] == [True, True]
