"""`peftlab run` without arguments: the gain is real."""

from __future__ import annotations

from pathlib import Path

import pytest

import whole_runs
from peftlab.run import RunFolder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_base_learns_the_embedded_task(tmp_path: Path) -> None:
    done = whole_runs.peftlab("run", "--output_dir", str(tmp_path / "runs"), folder=tmp_path, timeout=880)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = list((tmp_path / "runs").iterdir())
    run = RunFolder(folder)
    before, after = (run.summary()["scores"][when] for when in ("before", "after"))
    assert before["bleu"] > 0
    assert before["rouge_l"] > 0
    assert after["bleu"] >= 40
    assert after["bleu"] >= 3 * before["bleu"]
    assert after["value_coverage"] >= 0.9
    assert [phase["name"] for phase in run.summary()["phases"]] == ["both", "mlp", "attention"]
    assert all(phase["proved"] for phase in run.summary()["phases"])
    assert run.preflight["rows"]["train"]["truncated"] == 0
    assert run.preflight["rows"]["test"] >= 100
