"""S1's command-line flags: one table, each flag a short spelling of exactly one config key.

The table is all there is: the parser, the help, `peftlab list flags` and `docs/flags.md` are made from it.
Defaults are not in it; the help reads them from `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peftlab.errors import ConfigError, InputError, UnknownNameError
from peftlab.family import SEED_SPELLINGS

DEFAULT_STRATEGY = "both->mlp->attn"
"""What `--dynamic_lora` turns on where nothing else says how the phases go."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One config key set on the command line.

    Attributes:
        key: The dotted config key.
        value: Its value.
        said: What the person wrote, for messages, e.g. "--r" or "--set method.rank".
        soft: Whether it gives way to anything else that says something about the key.
    """

    key: str
    value: Any
    said: str
    soft: bool = False


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        name: Its spelling after the two dashes; dashes inside are accepted for the underscores.
        key: The config key it sets.
        group: The heading it stands under in the help.
        help: What it is for.
        metavar: What its value is called in the help; "" for a switch.
        read: From the text to the value.
        value: What a switch sets the key to.
        alias: A second spelling.
        soft: Whether it gives way to anything else that says something about the key.
    """

    name: str
    key: str
    group: str
    help: str
    metavar: str = ""
    read: Callable[[str], Any] = str
    value: Any = None
    alias: str = ""
    soft: bool = False

    @property
    def spellings(self) -> list[str]:
        """All spellings with underscores, the canonical one first."""
        return [f"--{name}" for name in (self.name, self.alias) if name]


def read_int(text: str) -> int:
    """A whole number.

    Args:
        text: As written.

    Returns:
        The number.

    Raises:
        ConfigError: It is not one.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"'{text}' is not a whole number") from None


def read_float(text: str) -> float:
    """A number.

    Args:
        text: As written, e.g. "2e-4".

    Returns:
        The number.

    Raises:
        ConfigError: It is not one.
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"'{text}' is not a number") from None


def read_targets(text: str) -> str | list[str]:
    """Target groups, roles or module names.

    Args:
        text: One of them in S1's or peftlab's spelling, or several with commas between.

    Returns:
        The canonical name, or a list where there were commas.

    Example:
        >>> read_targets("attention_only")
        'attention_qv'
        >>> read_targets("q_proj,v_proj")
        ['q_proj', 'v_proj']
    """
    names = [SEED_SPELLINGS.get(part.strip(), part.strip()) for part in text.split(",")]
    return names if len(names) > 1 else names[0]


def read_strategy(text: str) -> str:
    """A phase strategy.

    Args:
        text: A strategy in any of its spellings.

    Returns:
        The canonical name.

    Raises:
        ConfigError: No such strategy; says so where the shell has taken the arrow for a redirection.
    """
    from peftlab.schedule import canonical_strategy

    try:
        return canonical_strategy(text)
    except UnknownNameError as error:
        if text.endswith("-"):
            raise ConfigError(
                f"{error}\nthe shell takes the > of an arrow as 'write to a file': put quotes around the"
                f" name, or write {DEFAULT_STRATEGY.replace('->', '-')}"
            ) from None
        raise


_DATA, _ADAPTER, _TRAINING = "model and data", "adapter", "training"
_PHASES, _NORMS, _EVALUATION, _OUTPUT = "phases", "gradient norms", "evaluation", "output"

FLAGS: tuple[Flag, ...] = (
    Flag(
        "model", "model.name", _DATA, "base model: a local folder, a hub name or peftlab/tiny-base", "MODEL"
    ),
    Flag(
        "checkpointing",
        "model.gradient_checkpointing",
        _DATA,
        "compute activations again in the backward pass: less memory, more time",
        value=True,
    ),
    Flag("task", "task.name", _DATA, "task to learn, see `peftlab list tasks`", "TASK", alias="dataset"),
    Flag("data_dir", "task.data_dir", _DATA, "folder with the data set's own files", "DIR"),
    Flag(
        "num_samples", "task.num_samples", _DATA, "training rows to use; all where not given", "N", read_int
    ),
    Flag("max_length", "task.max_length", _DATA, "longest training row in tokens", "TOKENS", read_int),
    Flag(
        "method",
        "method.name",
        _ADAPTER,
        "how the base is made tunable, see `peftlab list methods`; its settings: `peftlab list methods NAME`",
        "METHOD",
    ),
    Flag(
        "target",
        "method.targets",
        _ADAPTER,
        "what is adapted: attention_only, mlp_only, both, all, or see `peftlab list targets`",
        "TARGET",
        read_targets,
    ),
    Flag("r", "method.rank", _ADAPTER, "rank of the adapter", "RANK", read_int),
    Flag("lora_alpha", "method.alpha", _ADAPTER, "scale of the adapter: alpha / rank", "ALPHA", read_float),
    Flag("lora_dropout", "method.dropout", _ADAPTER, "dropout on the adapter's input", "P", read_float),
    Flag("max_steps", "training.max_steps", _TRAINING, "length of the run in optimizer steps", "N", read_int),
    Flag("batch_size", "training.batch_size", _TRAINING, "rows in one forward pass", "N", read_int),
    Flag(
        "grad_accum",
        "training.accumulation_steps",
        _TRAINING,
        "forward passes that make one optimizer step",
        "N",
        read_int,
    ),
    Flag(
        "auto_batch_size",
        "training.auto_batch_size",
        _TRAINING,
        "split a step's rows (batch_size x grad_accum) anew, so that the longest batch fits into memory",
        value=True,
    ),
    Flag("lr", "training.learning_rate", _TRAINING, "peak learning rate", "RATE", read_float),
    Flag("warmup_steps", "training.warmup_steps", _TRAINING, "steps of linear warm-up", "N", read_int),
    Flag("seed", "training.seed", _TRAINING, "root of all random streams", "SEED", read_int),
    Flag(
        "dynamic_lora",
        "schedule.strategy",
        _PHASES,
        f"train in phases; {DEFAULT_STRATEGY} where --phase_strategy, CONFIG or preset do not say which",
        value=DEFAULT_STRATEGY,
        soft=True,
    ),
    Flag(
        "phase_strategy",
        "schedule.strategy",
        _PHASES,
        "train in these phases (--dynamic_lora is implied): both-mlp-attn, attn-mlp-both, both-mlp-both,"
        " early-late; with arrows ('both->mlp->attn') in quotes",
        "STRATEGY",
        read_strategy,
    ),
    Flag(
        "phase1_end",
        "schedule.phase1_end",
        _PHASES,
        "step at which the first phase ends; where not given, the run is divided evenly",
        "STEP",
        read_int,
    ),
    Flag(
        "phase2_end", "schedule.phase2_end", _PHASES, "step at which the second phase ends", "STEP", read_int
    ),
    Flag(
        "log_frequency",
        "probes.gradient_norms.frequency",
        _NORMS,
        "optimizer steps between two measurements",
        "N",
        read_int,
    ),
    Flag(
        "no_layer_norm",
        "probes.gradient_norms.layers",
        _NORMS,
        "measure the groups only, not each layer",
        value=False,
    ),
    Flag("no_eval", "evaluation.enabled", _EVALUATION, "train only: no test outputs, no scores", value=False),
    Flag(
        "eval_samples",
        "evaluation.num_samples",
        _EVALUATION,
        "test examples to score; all where not given",
        "N",
        read_int,
    ),
    Flag("output_dir", "output.directory", _OUTPUT, "folder in which run folders are made", "DIR"),
    Flag(
        "experiment_name",
        "output.name",
        _OUTPUT,
        "start of the run folder's name; made from the config where not given",
        "NAME",
    ),
)
"""Every flag of `peftlab run` and `peftlab plan` that sets a config key, in the order of the help."""


def read_flags(given: Iterable[tuple[Flag, Any]]) -> list[Assignment]:
    """What the flags on a command line set.

    Args:
        given: Each flag with its text, or True for a switch.

    Returns:
        The assignments, in the same order.

    Raises:
        ConfigError: A value cannot be read; names every such flag.
    """
    assignments: list[Assignment] = []
    problems: list[str] = []
    for flag, text in given:
        try:
            value = flag.read(text) if flag.metavar else flag.value
        except InputError as error:
            problems.append(f"--{flag.name}: {error}")
            continue
        assignments.append(Assignment(flag.key, value, f"--{flag.name}", flag.soft))
    if problems:
        raise ConfigError("\n".join(problems))
    return assignments


def markdown_table(default_of: Callable[[str], str]) -> str:
    """The table of flags for the docs.

    Args:
        default_of: The default of a config key as text.

    Returns:
        The page, Markdown.
    """
    lines = [
        "# Flags",
        "",
        "Every flag of `peftlab run` and `peftlab plan` is a short spelling of one config key: `--r 4` is"
        " `--set method.rank=4` is `method: {rank: 4}` in a config file. Dashes and underscores are alike.",
        "",
        "What wins: the defaults < the preset < the config file < the command line. On the command line"
        " `--set` and flags stand side by side; if both set one key to different values, the run is refused.",
        "",
        "The defaults below are those of the config. `peftlab run` without a config file, preset, task or"
        " model starts from the preset `embedded`, which has its own (`peftlab list presets`). Where another method is"
        " named, what the preset or file chose for its own - settings and phases - is left out, which the console says.",
        "",
        "Made by `peftlab list flags --markdown > docs/flags.md`; a test holds it current.",
        "",
        "| flag | config key | default | what it is for |",
        "|---|---|---|---|",
    ]
    for flag in FLAGS:
        spellings = ", ".join(f"`{s}{' ' + flag.metavar if flag.metavar else ''}`" for s in flag.spellings)
        default = default_of(flag.key) if flag.metavar else ""
        lines.append(f"| {spellings} | `{config_part(flag)}` | {default} | {flag.help} |")
    lines += [
        "",
        "## Config files in an editor",
        "",
        "With `# yaml-language-server: $schema=PATH/docs/run-config.schema.json` as the first line of a"
        " config file, editors with a YAML language server complete and check its keys. The schema is written by"
        " `peftlab list schema > docs/run-config.schema.json`.",
    ]
    return "\n".join(lines) + "\n"


def config_part(flag: Flag) -> str:
    """What a flag sets in the config.

    Args:
        flag: The flag.

    Returns:
        Its config key, with the value where the flag is a switch.

    Example:
        >>> config_part(next(f for f in FLAGS if f.name == "no_eval"))
        'evaluation.enabled=false'
    """
    if flag.metavar:
        return flag.key
    return f"{flag.key}={str(flag.value).lower() if isinstance(flag.value, bool) else flag.value}"
