"""Bad input gets one clear message and exit code 2, before anything heavy."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Answer, command, commands

FILES = {
    "list.yaml": "- a\n- b\n",
    "broken.yaml": "training:\n  max_steps: [1, 2\n",
    "typos.yaml": "training: {max_step: 3, lr: 4}\nmethod: {rnk: 3}\ntraning: {}\ntask: {max_length: 1}\n",
    "both.yaml": "schedule: {strategy: both-mlp-attn, phases: [{groups: [mlp], steps: 3}, {groups: [mlp]}]}\n",
    "two.yaml": "method: {rank: 4}\nadapters: [{method: lora}]\n",
    "none.yaml": "adapters: []\n",
    "towers.yaml": "adapters:\n- {scope: encoder}\n- {scope: decoder, settings: {rank: 4}}\n",
    "misspelt.yaml": "adapters:\n- {scope: encoder}\n- {scope: decoder, setings: {}, settings: {rnk: 4, alpha: 0}}\n",
    "open.yaml": "schedule: {phases: [{groups: [mlp]}, {groups: [attention]}]}\n",
    "section.yaml": "training: 5\n",
    "empty.yaml": "",
    "prompts.txt": "\n \n",
    "file": "",
    "model/readme.txt": "",
}
CASES: dict[str, tuple[list[str], list[str]]] = {
    "unknown verb": (["rnu"], ["unknown verb 'rnu'", "did you mean 'run'"]),
    "flag before the verb": (["--seed", "3"], ["the verb comes first"]),
    "unknown flag": (["run", "--max_stps", "3"], ["unknown flag --max_stps", "did you mean '--max_steps'"]),
    "unknown flag in dashes": (
        ["run", "--max-stps=3"],
        ["unknown flag --max-stps", "did you mean '--max_steps'"],
    ),
    "unexpected argument": (["run", "a.yaml", "b.yaml"], ["unexpected argument 'b.yaml'"]),
    "flag without value": (["run", "--r"], ["--r", "expected one argument"]),
    "not a whole number": (
        ["run", "--r", "x", "--lr", "y"],
        ["--r: 'x' is not a whole number", "--lr: 'y' is not"],
    ),
    "value out of range": (
        ["run", "--r", "0"],
        ["'method.rank' (--r): must be greater than or equal to 1 (given: 0)"],
    ),
    "unknown key": (
        ["run", "--set", "training.max_step=3"],
        ["'training.max_step'", "mean 'training.max_steps'"],
    ),
    "key without its section": (
        ["run", "--set", "max_steps=3"],
        ["'max_steps'", "did you mean 'training.max_steps'"],
    ),
    "flag's name as key": (
        ["run", "--set", "lr=3"],
        ["unknown key 'lr'", "did you mean 'training.learning_rate'"],
    ),
    "unknown method key": (
        ["run", "--set", "method.rang=3"],
        ["'method.rang'", "did you mean 'method.rank'"],
    ),
    "misspelt method key": (
        ["run", "--set", "method.rnak=3"],
        ["'method.rnak' (did you mean 'method.rank'?); method lora has: rank, alpha, dropout, targets, "],
    ),
    "key of another method": (
        ["run", "--set", "method.rank=4", "--method", "ia3"],
        [
            "'method.rank'; method ia3 has: targets; 'rank' is a setting of the methods hybrid, lora (--method NAME)"
        ],
    ),
    "flag of another method": (
        ["run", "--r", "4", "--lora_alpha", "2", "--method", "bitfit"],
        [
            "'method.rank' (--r); method bitfit has: norm_gains; 'rank' is a",
            "'method.alpha' (--lora_alpha); method bitfit",
        ],
    ),
    "flag whose key the method has two of": (
        ["run", "--r", "4", "--method", "adalora"],
        [
            "'method.rank' (--r) (did you mean 'method.initial_rank' or 'method.target_rank'?); method adalora has: "
        ],
    ),
    "misspelt key of another method": (
        ["run", "--set", "method.num_virtal_tokens=4"],
        [
            "method lora has: ",
            "'num_virtual_tokens' is a setting of the methods p_tuning, prefix_tuning, prompt_tuning",
        ],
    ),
    "peft's name of a method's key": (
        ["run", "--set", "method.target_modules=[q_proj]"],
        ["(did you mean 'method.targets'?); method lora has: "],
    ),
    "key of another section in a method": (
        ["run", "--set", "method.lr=3", "--method", "full"],
        ["(did you mean 'training.learning_rate'?); method full has: "],
    ),
    "method's key without its section": (
        ["run", "--set", "rank=3", "--method", "ia3"],
        ["unknown key 'rank'; 'rank' is a setting of the methods hybrid, lora"],
    ),
    "no adapters": (
        ["run", "none.yaml"],
        ["none.yaml: 'adapters' is an empty list: a run has at least one, such as"],
    ),
    "adapters that are no list": (
        ["run", "--set", "adapters=lora"],
        ["'adapters' must be a list, such as", "'lora'"],
    ),
    "adapter that is a word": (
        ["run", "--set", "adapters=[lora]"],
        ["adapter 0 must hold scope, method, settings"],
    ),
    "misspelt key of the second adapter": (
        ["run", "misspelt.yaml"],
        [
            "misspelt.yaml: adapter 1 (decoder, lora): unknown key 'adapters.1.setings' (did you mean 'settings'?)",
            "misspelt.yaml: adapter 1 (decoder, lora): unknown key 'adapters.1.settings.rnk' (did you mean"
            " 'adapters.1.settings.rank'?); method lora has: rank, ",
            "misspelt.yaml: adapter 1 (decoder, lora): 'adapters.1.settings.alpha': must be greater than 0 (given: 0)",
        ],
    ),
    "misspelt key of a numbered adapter": (
        ["run", "--set", "adapters.0.settings.r=4"],
        [
            "adapter 0 (model, lora): unknown key 'adapters.0.settings.r' (did you mean 'adapters.0.settings.rank'?)"
        ],
    ),
    "setting beside the settings of an adapter": (
        ["run", "towers.yaml", "--set", "adapters.1.rank=4"],
        [
            "adapter 1 (decoder, lora): unknown key 'adapters.1.rank'",
            "stand below settings: adapters.1.settings.rank",
        ],
    ),
    "number of no adapter": (
        ["run", "towers.yaml", "--set", "adapters.2.settings.rank=4"],
        ["'adapters.2': there are 2 adapters, counted from 0: 0 (encoder, lora), 1 (decoder, lora)"],
    ),
    "method of a numbered adapter": (
        ["run", "towers.yaml", "--set", "adapters.1.method=loar"],
        ["adapter 1 (decoder, loar): unknown method 'loar' (did you mean 'lora'?)"],
    ),
    "flag for one of several adapters": (
        ["run", "towers.yaml", "--r", "4"],
        [
            "--r: there are 2 adapters, counted from 0: 0 (encoder, lora)",
            "such as --set adapters.0.settings.rank=4",
        ],
    ),
    "both ways to set an adapter": (
        ["run", "--r", "4", "--set", "adapters.0.settings.rank=5"],
        ["give method.KEY (one adapter) or adapters.NUMBER.KEY (several), not both"],
    ),
    "unknown probe": (["run", "--set", "probes.norms={}"], ["unknown probe 'norms'", "gradient_norms"]),
    "unknown probe key": (
        ["run", "--set", "probes.gradient_norms.x=1"],
        ["'probes.gradient_norms.x'", "frequency"],
    ),
    "set without equals": (["run", "--set", "training"], ["--set training: expected KEY=VALUE"]),
    "set without key": (["run", "--set", "=3"], ["expected KEY=VALUE"]),
    "set with empty part": (["run", "--set", "training..seed=3"], ["expected KEY=VALUE"]),
    "set without value": (["run", "--set", "task.num_samples="], ["no value", "task.num_samples=null"]),
    "set not YAML": (["run", "--set", "method.targets=[a"], ["the value is not YAML"]),
    "set and flag differ": (
        ["run", "--r", "4", "--set", "method.rank=5"],
        ["--set method.rank and --r", "different values"],
    ),
    "set twice": (["run", "--set", "training.seed=1", "--set", "training.seed=2"], ["different values"]),
    "section set to a value": (
        ["run", "--set", "training=3"],
        ["'training' must hold keys and values, not 3"],
    ),
    "method as a word": (["run", "--set", "method=lora"], ["must be a mapping", "'lora'"]),
    "unknown task": (["run", "--task", "e2e"], ["unknown task 'e2e'", "did you mean 'e2e_nlg'", "embedded"]),
    "unknown data set": (
        ["run", "--dataset", "embeded"],
        ["unknown task 'embeded'", "did you mean 'embedded'"],
    ),
    "unknown module as task": (["run", "--task", "no.such"], ["unknown task 'no.such'"]),
    "unknown method": (
        ["run", "--set", "method.name=loar"],
        ["unknown method 'loar'", "did you mean 'lora'"],
    ),
    "unknown strategy": (
        ["run", "--phase_strategy", "mlp-attn"],
        ["unknown strategy 'mlp-attn'", "early->late"],
    ),
    "strategy eaten by the shell": (
        ["run", "--phase_strategy", "both-"],
        ["the shell takes the >", "both-mlp-attn"],
    ),
    "unknown preset": (
        ["run", "--preset", "e2e_atention"],
        ["unknown preset", "did you mean 'e2e_attention'"],
    ),
    "preset as file": (["run", "e2e_mlp"], ["no config file e2e_mlp", "--preset e2e_mlp"]),
    "no config file": (["run", "no.yaml"], ["there is no config file no.yaml"]),
    "folder as config file": (["run", "model"], ["the config file model is a folder"]),
    "config file not YAML": (["run", "broken.yaml"], ["broken.yaml, line 3 is not YAML"]),
    "config file not a mapping": (["run", "list.yaml"], ["list.yaml must hold keys and values"]),
    "empty config file": (["run", "empty.yaml"], ["empty.yaml must hold keys and values"]),
    "all problems of a file at once": (
        ["run", "typos.yaml"],
        [
            "typos.yaml: unknown key 'training.max_step' (did you mean 'training.max_steps'?)",
            "unknown key 'training.lr' (did you mean 'training.learning_rate'?)",
            "unknown key 'method.rnk' (did you mean 'method.rank'?)",
            "unknown key 'traning' (did you mean 'training'?)",
            "'task.max_length': must be greater than or equal to 8 (given: 1)",
        ],
    ),
    "strategy and phases": (["run", "both.yaml"], ["schedule.strategy or schedule.phases, not both"]),
    "method and adapters": (["run", "two.yaml"], ["'method' (one adapter) or 'adapters' (a list), not both"]),
    "a section that is a value": (["run", "section.yaml"], ["'training' must hold keys and values, not 5"]),
    "a flag over a section that is a value": (
        ["run", "section.yaml", "--seed", "1"],
        ["'training' must hold keys and values, not 5"],
    ),
    "phase end after the run": (
        ["run", "--max_steps", "30", "--dynamic_lora", "--phase1_end", "30"],
        ["phase1_end 30 does not fit", "30 steps"],
    ),
    "phase ends out of order": (
        ["run", "--max_steps", "30", "--phase1_end", "20", "--phase2_end", "10"],
        ["phase2_end 10 does not fit", "after 20"],
    ),
    "third end with two phases": (
        ["run", "--phase_strategy", "early-late", "--phase2_end", "20"],
        ["'early->late' has 2 phases", "phase2_end has no meaning"],
    ),
    "phase end without phases": (
        ["run", "--set", "schedule.strategy=null", "--phase1_end", "20"],
        ["phase1_end and phase2_end need schedule.strategy"],
    ),
    "run too short for its phases": (["run", "--max_steps", "2"], ["does not fit", "2 steps"]),
    "phases that do not add up": (
        ["run", "--set", "schedule.phases=[{groups: [mlp], steps: 5}, {groups: [attention], steps: 3}]"],
        ["the phases cover 8 steps but the run has 420"],
    ),
    "open phase in the middle": (["run", "open.yaml"], ["only the last phase may be open"]),
    "phase with an unknown key": (
        ["run", "--set", "schedule.phases=[{group: [mlp]}]"],
        ["'schedule.phases.0.group'", "did you mean 'groups'"],
    ),
    "missing data folder": (
        ["run", "--data-dir", "nowhere"],
        ["there is no data folder nowhere", "--data-dir"],
    ),
    "data folder is a file": (["run", "--data-dir", "file"], ["the data folder file is a file"]),
    "missing model folder": (["run", "--model", "./nowhere"], ["there is no model folder ./nowhere"]),
    "model folder without a model": (["run", "--model", "model"], ["model holds no config.json"]),
    "model is a file": (["run", "--model", "./file"], ["'./file' is a file"]),
    "output folder below a file": (["run", "--output_dir", "file/runs"], ["cannot be written", "is a file"]),
    "output folder not writable": (
        ["run", "--output_dir", "/proc/runs"],
        ["output folder /proc/runs cannot be"],
    ),
    "three places at once": (
        ["plan", "--model", "./nowhere", "--data_dir", "nowhere", "--output_dir", "file"],
        ["no model folder", "no data folder", "output folder"],
    ),
    "run name that is a path": (
        ["run", "--experiment_name", "a/b"],
        ["output.name", "one plain folder name"],
    ),
    "no targets": (["run", "--set", "method.targets=[]"], ["method.targets", "at least one target"]),
    "resume with other settings": (
        ["run", "--resume", "last", "--r", "4", "--preset", "embedded"],
        ["--resume goes on with the run's own settings", "--r", "--preset embedded"],
    ),
    "count too small": (["evaluate", "last", "--num_samples", "0"], ["--num_samples: 0 is too small"]),
    "evaluate an unknown task": (["evaluate", "last", "--task", "e2e"], ["unknown task 'e2e'"]),
    "evaluate without data": (["evaluate", "last", "--data_dir", "nowhere"], ["no data folder nowhere"]),
    "generate without a prompt": (["generate", "last"], ["--prompt", "--file", "required"]),
    "missing prompt file": (
        ["generate", "last", "--file", "no.txt"],
        ["the prompt file no.txt cannot be read"],
    ),
    "prompt file without prompts": (["generate", "last", "--file", "prompts.txt"], ["holds no prompts"]),
    "unknown kind with a name": (["list", "tsks", "x"], ["'tsks'", "did you mean 'tasks'"]),
    "unknown kind": (["list", "tsks"], ["'tsks'", "did you mean 'tasks'"]),
    "page that there is not": (["list", "config", "--markdown"], ["there is: flags, peft_types"]),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("bad_input")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    before = sorted(folder.rglob("*"))
    given = commands([arguments for arguments, _ in CASES.values()], folder)
    left = {path.name for path in set(folder.rglob("*")) - set(before)}
    assert left == {".given.json", ".taken.json"}, "a refused command leaves nothing behind"
    return dict(zip(CASES, given, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_message(case: str, answers: dict[str, Answer]) -> None:
    answer, needles = answers[case], CASES[case][1]
    assert answer.code == 2, answer.err
    assert answer.out == ""
    for needle in needles:
        assert needle in answer.err
    first, *more = answer.err.rstrip("\n").split("\n")
    assert first.startswith("peftlab: error: ")
    assert all(line.startswith("  ") for line in more), "one message; further lines belong to it"
    assert "Traceback" not in answer.err
    assert "pydantic" not in answer.err.lower()
    assert answer.loaded == ()


def test_no_problem_is_said_twice(answers: dict[str, Answer]) -> None:
    assert answers["value out of range"].err.count("\n") == 1
    assert answers["unknown method"].err.count("\n") == 1


@pytest.mark.parametrize("switch", ["flag", "environment"])
def test_traceback_on_request(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftlab.cli import main

    monkeypatch.setenv("PEFTLAB_DEBUG", "1" if switch == "environment" else "0")
    printed: list[str] = []
    monkeypatch.setattr("traceback.print_exc", lambda: printed.append("traceback"))
    assert main(["run", "no.yaml", *(["--traceback"] if switch == "flag" else [])]) == 2
    assert printed == ["traceback"]


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    answer = command(["run", "no.yaml"], tmp_path)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "peftlab: error: there is no config file no.yaml\n"
    assert "torch" not in answer.loaded
