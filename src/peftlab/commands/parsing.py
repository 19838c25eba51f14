"""Parsing a command line: parsers that raise one clear error, and the arguments that make a config."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from peftlab.commands.flags import FLAGS, Flag, read_int
from peftlab.errors import ConfigError, InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, and takes dashes for underscores in flags."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Args:
            message: What is wrong with it.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{message}; see `{self.prog} --help`")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of one verb.

        Args:
            arguments: What stands after the verb.

        Returns:
            The values.

        Raises:
            InputError: A flag is unknown, or the arguments do not fit.
        """
        known = list(self._option_string_actions)
        values, extra = self.parse_known_args([self._underscored(a, known) for a in arguments])
        if extra:
            first = extra[0].partition("=")[0]
            if first.startswith("-"):
                self.error(f"unknown flag {first}{did_you_mean(first.replace('-', '_'), _canonical(known))}")
            self.error(f"unexpected argument '{first}'")
        return values

    @staticmethod
    def _underscored(argument: str, known: Sequence[str]) -> str:
        """A flag with its dashes turned into underscores, where that makes a known one."""
        name, equals, value = argument.partition("=")
        spelt = f"--{name[2:].replace('-', '_')}"
        return f"{spelt}{equals}{value}" if name.startswith("--") and spelt in known else argument


def _canonical(options: Sequence[str]) -> list[str]:
    """Long flags only, in the form in which suggestions compare them."""
    return [option for option in options if option.startswith("--")]


class RunParser(Parser):
    """The parser of `run` and `plan`: its help reads the defaults from the config."""

    def format_help(self) -> str:
        """The help text, with each flag's default."""
        from peftlab.commands.schema import config_keys

        defaults = {key.path: key.default for key in config_keys()}
        for action in self._actions:
            flag = next((f for f in FLAGS if f.name == action.dest), None)
            if flag is not None:
                default = defaults[flag.key]
                shown = f" (default: {default})" if flag.metavar and default != "null" else ""
                action.help = f"{flag.help}{shown}".replace("%", "%%")
        return super().format_help()


def add_settings(parser: Parser) -> None:
    """Add the arguments that make a config: file, preset, `--set` and S1's flags.

    Args:
        parser: The parser to add them to.
    """
    parser.usage = f"{parser.prog} [CONFIG] [--preset NAME] [--set KEY=VALUE ...] [flags]"
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", type=Path, help="YAML file; any run's config.yaml is one"
    )
    parser.add_argument("--preset", metavar="NAME", help="start from a preset, see `peftlab list presets`")
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any config key, see `peftlab list config` and `peftlab list methods NAME`; again for more keys;"
        " lists are [a, b]",
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        group = groups[flag.group]
        if flag.metavar:
            group.add_argument(*flag.spellings, dest=flag.name, metavar=flag.metavar, help=flag.help)
        else:
            group.add_argument(
                *flag.spellings, dest=flag.name, action="store_const", const=True, help=flag.help
            )


def given_flags(args: argparse.Namespace) -> list[tuple[Flag, Any]]:
    """The flags that stand on a command line.

    Args:
        args: The parsed command line.

    Returns:
        Each flag with its text, True for a switch.
    """
    return [(flag, getattr(args, flag.name)) for flag in FLAGS if getattr(args, flag.name) is not None]


def count(text: str | None, flag: str) -> int | None:
    """A count of at least 1.

    Args:
        text: As written; None where the flag is not given.
        flag: The flag's name, for the message.

    Returns:
        The number, or None.

    Raises:
        ConfigError: It is not a whole number, or less than 1.
    """
    if text is None:
        return None
    try:
        value = read_int(text)
    except ConfigError as error:
        raise ConfigError(f"--{flag}: {error}") from None
    if value < 1:
        raise ConfigError(f"--{flag}: {value} is too small; it must be at least 1")
    return value


_FACTORS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40,
}  # fmt: skip


def read_bytes(text: str | None, flag: str) -> int | None:
    """An amount of memory.

    Args:
        text: As written, e.g. "24GB" (10^9), "24GiB" (2^30), "800 MB"; None where the flag is not given.
        flag: The flag's name, for the message.

    Returns:
        Bytes, or None.

    Raises:
        ConfigError: It is not an amount of memory.

    Example:
        >>> read_bytes("24GB", "memory"), read_bytes("1.5 GiB", "memory")
        (24000000000, 1610612736)
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    factor = _FACTORS.get(found[2]) if found else None
    if found is None or factor is None or not float(found[1]):
        raise ConfigError(f"--{flag}: '{text}' is not an amount of memory; write 24GB or 24GiB")
    return round(float(found[1]) * factor)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Args:
        path: A text file.

    Returns:
        The lines.

    Raises:
        InputError: It cannot be read, or holds none.
    """
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the prompt file {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not prompts:
        raise InputError(f"the prompt file {path} holds no prompts; write one on each line")
    return prompts
