"""A run on conversations of one's own, and its adapter's folder scored by drawing."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

import whole_runs
from peftlab.config import build_config
from peftlab.evaluation import evaluate_saved
from peftlab.execute import execute

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def test_conversations_are_trained_and_scored(tmp_path: Path) -> None:
    model = whole_runs.save_byte_model(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    data = tmp_path / "data"
    data.mkdir()
    talks = [
        [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": f"yo {n}"}]
        for n in range(12)
    ]
    (data / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    config = build_config(
        {
            "model": {"name": str(model), "device": "cpu"},
            "task": {"name": "chat", "data_dir": str(data)},
            "training": {"max_steps": 4, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2},
            "evaluation": {"max_new_tokens": 4, "stop": ["\n"]},
            "output": {"directory": str(tmp_path / "runs")},
        }
    )
    run = execute(config, show=lambda _: None)
    assert run.is_finished
    assert not list(run.path.glob("*.partial"))
    decoding = {"decoding": "sample", "sampling_seed": 1, "max_new_tokens": 4}
    made = evaluate_saved(
        str(run.path / "final_model"), data_dir=data, changes={"evaluation": decoding}, directory=tmp_path
    )
    assert (made["task"], made["after"]["decoding"]["kind"]) == ("chat", "sample")
    own = json.loads((run.path / "chat_evaluation.json").read_text())
    assert own["after"]["decoding"]["stop"] == ["\n"]
    assert evaluate_saved(str(run.path))["after"]["metrics"] == own["after"]["metrics"]
