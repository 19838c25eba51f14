"""S1's flags: each sets exactly one config key, and the docs say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.commands.flags import FLAGS, Flag, read_flags, read_strategy, read_targets
from peftlab.commands.listing import list_kind
from peftlab.commands.parsing import given_flags
from peftlab.commands.schema import config_keys
from peftlab.commands.sources import config_from
from peftlab.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"

S1_FLAGS = [  # the list, word for word
    "--dataset",
    "--target",
    "--r",
    "--lora_alpha",
    "--lora_dropout",
    "--batch_size",
    "--grad_accum",
    "--max_steps",
    "--lr",
    "--warmup_steps",
    "--max_length",
    "--seed",
    "--model",
    "--output_dir",
    "--experiment_name",
    "--dynamic_lora",
    "--phase_strategy",
    "--phase1_end",
    "--phase2_end",
    "--log_frequency",
    "--no_layer_norm",
    "--no_eval",
    "--eval_samples",
    "--num_samples",
]

SAMPLES: dict[str, tuple[str, object]] = {
    "model": ("org/other", "org/other"),
    "task": ("embedded", "embedded"),
    "data_dir": ("some/data", "some/data"),
    "method": ("lora", "lora"),
    "num_samples": ("12", 12),
    "max_length": ("64", 64),
    "target": ("mlp_only", "mlp"),
    "r": ("3", 3),
    "lora_alpha": ("7.5", 7.5),
    "lora_dropout": ("0.25", 0.25),
    "max_steps": ("77", 77),
    "batch_size": ("5", 5),
    "grad_accum": ("6", 6),
    "lr": ("3e-3", 3e-3),
    "warmup_steps": ("4", 4),
    "seed": ("9", 9),
    "phase_strategy": ("early-late", "early->late"),
    "phase1_end": ("11", 11),
    "phase2_end": ("55", 55),
    "log_frequency": ("2", 2),
    "eval_samples": ("8", 8),
    "output_dir": ("elsewhere", "elsewhere"),
    "experiment_name": ("mine", "mine"),
}


def _flat(values: object, path: str = "") -> dict[str, object]:
    """A config as dotted keys."""
    if isinstance(values, dict) and values:
        return {
            k: v
            for key, inner in values.items()
            for k, v in _flat(inner, f"{path}.{key}".lstrip(".")).items()
        }
    if path == "adapters":
        adapter = values[0]  # type: ignore[index]
        return {"method.name": adapter["method"], **_flat(adapter["settings"], "method")}
    return {path: values}


def _parsed(arguments: list[str]) -> dict[str, object]:
    from peftlab.cli import make_parser

    args = make_parser("run").read(arguments)
    needed = read_flags(given_flags(args))
    return _flat(config_from(assignments=needed).model_dump(mode="json"))


def test_every_flag_of_s1_is_there() -> None:
    assert set(S1_FLAGS) <= {spelling for flag in FLAGS for spelling in flag.spellings}
    assert {"--task", "--data_dir"} <= {spelling for flag in FLAGS for spelling in flag.spellings}


def test_every_flag_names_a_config_key() -> None:
    known = {key.path for key in config_keys()}
    assert {flag.key for flag in FLAGS} <= known
    spellings = [spelling for flag in FLAGS for spelling in flag.spellings]
    assert len(set(spellings)) == len(spellings)


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.metavar], ids=lambda flag: flag.name)
def test_flag_sets_its_key_and_no_other(flag: Flag) -> None:
    text, value = SAMPLES[flag.name]
    base = ["--task", "embedded", "--max_steps", "100"]
    if flag.name == "model":
        base += ["--phase_strategy", "both-mlp-attn", "--lora_dropout", "0.0"]
        base += ["--lr", "0.008", "--warmup_steps", "20", "--batch_size", "8", "--max_length", "192"]
        # as the embedded preset, which another model leaves
    plain, changed = _parsed(base), _parsed([*base, f"--{flag.name}", text])
    differs = {key for key in plain if plain[key] != changed[key]}
    assert changed[flag.key] == value
    unnamed = {"training.validation_steps", "training.validation_rows"} if flag.name == "model" else set()
    assert differs - unnamed <= {flag.key}


@pytest.mark.parametrize("spelling", ["--lora_alpha", "--lora-alpha"])
@pytest.mark.parametrize("joined", [True, False])
def test_dashes_and_underscores_are_alike(spelling: str, joined: bool) -> None:
    given = [f"{spelling}=3"] if joined else [spelling, "3"]
    assert _parsed(given)["method.alpha"] == 3


def test_dashes_in_values_stay() -> None:
    assert _parsed(["--experiment-name", "a-b-c"])["output.name"] == "a-b-c"


def test_switches() -> None:
    values = _parsed(["--no_layer_norm", "--no-eval", "--checkpointing"])
    assert values["model.gradient_checkpointing"] is True
    assert values["probes.gradient_norms.layers"] is False
    assert values["evaluation.enabled"] is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--task", "e2e_nlg"], None),
        (["--task", "e2e_nlg", "--dynamic_lora"], "both->mlp->attn"),
        (["--task", "e2e_nlg", "--phase_strategy", "early->late"], "early->late"),
        (["--task", "e2e_nlg", "--dynamic_lora", "--phase_strategy", "attn-mlp-both"], "attn->mlp->both"),
        (["--dynamic_lora", "--phase_strategy", "early-late"], "early->late"),
        (["--dynamic_lora"], "both->mlp->attn"),
    ],
)
def test_dynamic_lora_gives_way_to_whatever_says_which_phases(given: list[str], expected: str | None) -> None:
    assert _parsed(given)["schedule.strategy"] == expected


def test_phase_strategy_implies_dynamic_lora() -> None:
    one = _parsed(["--task", "e2e_nlg", "--phase_strategy", "both-mlp-attn"])
    two = _parsed(["--task", "e2e_nlg", "--phase_strategy", "both-mlp-attn", "--dynamic_lora"])
    assert one == two


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("attention_only", "attention_qv"),
        ("mlp_only", "mlp"),
        ("both", "both"),
        ("all", "all"),
        ("attention.query", "attention.query"),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("attention_only,mlp_only", ["attention_qv", "mlp"]),
    ],
)
def test_targets_in_s1_spelling(text: str, targets: object) -> None:
    assert read_targets(text) == targets


def test_strategy_that_the_shell_has_eaten() -> None:
    with pytest.raises(ConfigError, match="shell"):
        read_strategy("both-")


def test_flags_page_is_current() -> None:
    assert (DOCS / "flags.md").read_text(encoding="utf-8") == list_kind("flags", markdown=True) + "\n"


def test_flags_page_has_every_flag_and_key() -> None:
    page = (DOCS / "flags.md").read_text(encoding="utf-8")
    for flag in FLAGS:
        assert f"`--{flag.name}" in page
        assert f"`{flag.key}" in page
