"""A user's own task and probe, outside the package, by dotted name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import whole_runs
from peftlab.config import build_config
from peftlab.errors import ConfigError, InputError, UnknownNameError
from peftlab.execute import execute

TASK = '''"""Counting."""
from peftlab.task import Example, Splits
PROMPT = "next {source}:"
METRICS = ("bleu",)
def load(data_dir, *, seed):
    made = [Example(id=str(n), source=str(n), references=(str(n + 1),)) for n in range(30)]
    return Splits(made[:20], made[20:25], made[25:])
'''

PROBE = '''"""Counts the steps it was shown."""
import json
from peftlab.settings import Settings as _Settings
class Settings(_Settings):
    every: int = 1
class Counter:
    def __init__(self, every): self.every, self.steps = every, []
    def wants_gradients(self, step): return step % self.every == 0
    def on_gradients(self, reading, *, step, phase): self.steps.append([step, phase, len(reading.norms)])
    def state(self): return self.steps
    def restore(self, state, *, step): self.steps = [s for s in state if s[0] <= step]
    def write(self, folder): (folder / "counter.json").write_text(json.dumps(self.steps))
def start(context, settings): return Counter(settings.every)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "__init__.py").write_text("")
    (tmp_path / "mylab" / "counting.py").write_text(TASK)
    (tmp_path / "mylab" / "counter.py").write_text(PROBE)
    (tmp_path / "mylab" / "empty.py").write_text('"""Nothing."""\n')
    (tmp_path / "mylab" / "broken.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("mylab")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def values(folder: Path, task: str) -> dict[str, object]:
    return whole_runs.make_values(folder, task={"name": task, "data_dir": None}, training={"max_steps": 4})


def test_they_take_part_in_a_run(own: Path) -> None:
    asked = values(own, "mylab.counting") | {"probes": {"mylab.counter": {"every": 2}}}
    run = execute(build_config(asked), show=lambda line: None)
    assert (run.path / "counting_evaluation.json").exists()
    steps = json.loads((run.path / "counter.json").read_text())
    assert [step for step, _, _ in steps] == [2, 4]


def test_what_is_wrong_with_them_is_said(own: Path) -> None:
    with pytest.raises(ConfigError, match="lacks PROMPT, METRICS, load"):
        execute(build_config(values(own, "mylab.empty")))
    with pytest.raises(InputError, match=r"cannot be imported.*no_such_module"):
        execute(build_config(values(own, "mylab.broken")))
    with pytest.raises((ConfigError, UnknownNameError), match=r"unknown task 'mylab\.gone'"):
        build_config(values(own, "mylab.gone"))
