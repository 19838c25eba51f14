"""The code snippets and commands of the dynamic-LoRA document, as they stand there, and what must differ to run.

Each has the smallest difference that makes it run, with its reason. The text is compared with the document itself
where that lies beside the repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = "the document's modules are one package here; every public name imports from it"
NAME = "the document's program is one verb of the command line here"
SHELL = "unquoted, the shell takes > for a redirection and the program never sees the strategy"
DATA_FOLDER = "data sets are read from their own files, and an adapter's folder does not know where they lie"
OWN_PROMPT = "an adapter is scored with the prompt that it was trained with, so each task has its own"
HUB = "the document's model is a tiny one under the same hub name, its data a few rows in the same files"


@dataclass(frozen=True)
class Snippet:
    """One snippet.

    Attributes:
        text: As in the document.
        differences: (old, new, reason).
        before: Code that makes the names it takes for granted.
        after: Code that checks what it made.
    """

    text: str
    differences: tuple[tuple[str, str, str], ...]
    before: str = ""
    after: str = ""

    def runnable(self) -> str:
        """The snippet with its differences applied."""
        text = self.text
        for old, new, _ in self.differences:
            assert text.count(old) == 1, f"'{old}' does not stand once in the snippet"
            text = text.replace(old, new)
        return f"{self.before}\n{text}\n{self.after}\n"


CONFIGURATION = Snippet(
    text="""from configs.config import ExperimentConfig, PRESETS

# Use preset
config = PRESETS["e2e_attention"]()

# Or build from args
config = ExperimentConfig()
config.data.dataset_type = DatasetType.WIKISQL
config.lora.r = 4""",
    differences=(
        (
            "from configs.config import ExperimentConfig, PRESETS",
            "from peftlab import DatasetType, ExperimentConfig, PRESETS",
            PACKAGE + "; the document forgets to import DatasetType",
        ),
    ),
    after="assert config.lora.r == 4 and config.data.dataset_type is DatasetType.WIKISQL",
)

PHASES = Snippet(
    text="""from src.callbacks.dynamic_lora import DynamicLoRACallback, create_phased_lora_config

# Module-based strategy
phase_configs = create_phased_lora_config(
    phase1_steps=(0, 300),
    phase2_steps=(300, 600),
    phase3_steps=(600, None),
    phase1_modules=["attention", "mlp"],
    phase2_modules=["mlp"],
    phase3_modules=["attention"]
)

callback = DynamicLoRACallback(phase_configs, verbose=True)""",
    differences=(("src.callbacks.dynamic_lora", "peftlab", PACKAGE),),
    after="assert [p['active_modules'] for p in phase_configs] == [['attention', 'mlp'], ['mlp'], ['attention']]",
)

GRADIENTS = Snippet(
    text="""from src.callbacks.gradient_norm import GradientNormCallback, GradientMeasuringTrainer

# Create callback
grad_callback = GradientNormCallback(
    config=gradient_analysis_config,
    output_dir="./results/experiment"
)

# Use custom trainer
trainer = GradientMeasuringTrainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    gradient_callback=grad_callback,
    callbacks=[grad_callback, dynamic_lora_callback]
)""",
    differences=(("src.callbacks.gradient_norm", "peftlab", PACKAGE),),
    before="""
import warnings
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
from transformers import TrainingArguments
import peftlab
experiment = peftlab.ExperimentConfig()
experiment.lora.target_module_group = peftlab.TargetModuleGroup.BOTH
model, tokenizer = peftlab.setup_model_with_lora(experiment.model, experiment.lora)
peftlab.print_trainable_parameters(model)
gradient_analysis_config = experiment.gradient_analysis
dynamic_lora_callback = peftlab.DynamicLoRACallback(
    peftlab.create_phased_lora_config((0, 2), (2, 4), (4, None)), verbose=True
)
ids = tokenizer("name[The Mill]")["input_ids"]
train_dataset = [{"input_ids": ids, "labels": ids}] * 12
training_args = TrainingArguments(
    output_dir="out", max_steps=6, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
    learning_rate=1e-2, disable_tqdm=True,
)
""",
    after="""
trainer.train()
from pathlib import Path
log = peftlab.load_gradient_log(Path("results/experiment"))
assert log.steps == [1, 2, 3, 4, 5, 6], log.steps
assert log.mlp_norm[0] is None and log.attention_norm[0] is not None
assert log.attention_norm[2] is None and log.mlp_norm[2] is not None
assert not log.clipped
""",
)

TRAINED = f"""
import shutil, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import task_samples, whole_runs
from peftlab.config import build_config
from peftlab.execute import execute
writers = {{"wikisql": task_samples.write_wikisql, "e2e_nlg": whole_runs.write_e2e}}
for task, write in writers.items():
    write(Path("data") / task)
    done = execute(build_config({{
        "model": {{"name": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "device": "cpu"}},
        "task": {{"name": task, "data_dir": f"data/{{task}}", "max_length": 300}},
        "training": {{"max_steps": 2, "batch_size": 2, "warmup_steps": 0}},
        "evaluation": {{"enabled": False}},
    }}), show=lambda line: None)
    for name in ("experiment", "exp") if task == "wikisql" else ("exp_e2e",):
        shutil.copytree(done.path / "final_model", f"results/{{name}}/final_model")
"""

SCORING = Snippet(
    text="""from src.evaluation import evaluate_wikisql

result = evaluate_wikisql(
    model_path="results/experiment/final_model",
    base_model_id="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    num_samples=100,
    batch_size=8
)
# result = {"exact_match": 0.02, "num_samples": 100}""",
    differences=(
        ("src.evaluation", "peftlab", PACKAGE),
        ("batch_size=8", 'batch_size=8, data_dir="data/wikisql", max_new_tokens=4', DATA_FOLDER),
    ),
    before=TRAINED,
    after="""
assert result["num_samples"] == 6 and 0 <= result["exact_match"] <= 1
assert {"logical_form", "execution_accuracy"} <= set(result.metrics)
""",
)

EVALUATION = Snippet(
    text="""from src.evaluation import evaluate_wikisql, evaluate_e2e

# WikiSQL
wikisql_result = evaluate_wikisql(
    model_path="results/exp/final_model",
    base_model_id="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    num_samples=100
)

# E2E NLG
e2e_result = evaluate_e2e(
    model_path="results/exp/final_model",
    base_model_id="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    num_samples=100
)""",
    differences=(
        ("src.evaluation", "peftlab", PACKAGE),
        (
            "num_samples=100\n)\n\n# E2E",
            'num_samples=100, data_dir="data/wikisql", max_new_tokens=4\n)\n\n# E2E',
            DATA_FOLDER,
        ),
        (
            'evaluate_e2e(\n    model_path="results/exp/',
            'evaluate_e2e(\n    model_path="results/exp_e2e/',
            OWN_PROMPT,
        ),
        (
            "num_samples=100\n)",
            'num_samples=100, data_dir="data/e2e_nlg", max_new_tokens=4\n)',
            DATA_FOLDER,
        ),
    ),
    before=TRAINED,
    after="""
assert type(wikisql_result) is type(e2e_result)
assert e2e_result.save("e2e.json") and type(e2e_result).load("e2e.json") == e2e_result
""",
)

SNIPPETS = {
    "configuration": CONFIGURATION,
    "phases": PHASES,
    "gradients": GRADIENTS,
    "scoring": SCORING,
    "evaluation": EVALUATION,
}

COMMANDS = {
    "standard": Snippet(
        text="python run_experiment.py --dataset e2e_nlg --target both --r 8 --max_steps 1000",
        differences=(
            ("python run_experiment.py", "peftlab run", NAME),
            ("--max_steps 1000", "--max_steps 6 --data-dir DATA --model TINYLLAMA", HUB),
        ),
    ),
    "phases": Snippet(
        text="""python run_experiment.py \\
    --dataset samsum \\
    --target both \\
    --dynamic_lora \\
    --phase_strategy both->mlp->attn \\
    --phase1_end 300 \\
    --phase2_end 600 \\
    --max_steps 1500""",
        differences=(
            ("python run_experiment.py", "peftlab run", NAME),
            ("both->mlp->attn", "'both->mlp->attn'", SHELL),
            ("--phase1_end 300", "--phase1_end 3", HUB),
            ("--phase2_end 600", "--phase2_end 6", HUB),
            ("--max_steps 1500", "--max_steps 9 --data-dir DATA --model TINYLLAMA", HUB),
        ),
    ),
}
