"""`peftlab together`: what is read of its command line, and what is refused there."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.cli import main, make_parser
from peftlab.commands.together import read_resumed, read_together
from peftlab.errors import ConfigError, InputError


def write(folder: Path, name: str, text: str = "training: {max_steps: 5}\n") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(*arguments: str) -> dict[str, object]:
    return dict(read_together(make_parser("together").read(list(arguments)), lambda note: None))


def test_one_run_for_each_config_and_what_is_set_in_all(tmp_path: Path) -> None:
    one, other = write(tmp_path, "a.yaml"), write(tmp_path, "b.yaml", "training: {seed: 3}\n")
    found = read(one, other, "--set", "training.batch_size=2", "--output_dir", str(tmp_path / "out"))
    assert list(found) == [one, other]
    for config in found.values():
        assert config.training.batch_size == 2
        assert config.output.directory == tmp_path / "out"
    assert [config.training.seed for config in found.values()] == [42, 3]


def test_one_run_for_each_value(tmp_path: Path) -> None:
    one = write(tmp_path, "a.yaml")
    found = read(one, "--each", "method.rank=[2, 4]", "--each", "training.learning_rate=[0.1, 0.2]")
    assert list(found) == [
        f"{one} method.rank=2, training.learning_rate=0.1",
        f"{one} method.rank=4, training.learning_rate=0.2",
    ]
    assert [config.adapters[0].settings["rank"] for config in found.values()] == [2, 4]
    assert [config.training.learning_rate for config in found.values()] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--each", "training.seed=3"], r"--each training\.seed: expected a list"),
        (["--each", "training.seed=[1, 2]", "--each", "method.rank=[1]"], r"seed has 2, method\.rank has 1"),
        (["--each", "training.sede=[1, 2]"], r"training\.sede"),
        (["b.yaml", "--each", "training.seed=[1, 2]"], r"--each makes several runs of one config"),
    ],
)
def test_values_that_do_not_fit_are_refused(more: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, "a.yaml"), *more)


def test_no_config_and_settings_beside_resume_are_refused() -> None:
    with pytest.raises(InputError, match=r"name the configs of the runs"):
        read()
    parsed = make_parser("together").read(["--set", "training.seed=1", "--resume", "A", "B"])
    with pytest.raises(ConfigError, match=r"--resume goes on .* --set training\.seed=1 cannot be given too"):
        read_resumed(parsed, lambda reference, directory: Path(reference))
    parsed = make_parser("together").read(["--resume", "A", "A"])
    with pytest.raises(InputError, match=r"the run A is named more than once"):
        read_resumed(parsed, lambda reference, directory: Path(reference))


def test_a_config_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["together", str(tmp_path / "none.yaml"), str(tmp_path / "none.yaml")]) == 2
    assert "there is no config file" in capsys.readouterr().err
    assert main(["together", "--help"]) == 0
    assert "--resume runs/A runs/B" in capsys.readouterr().out
