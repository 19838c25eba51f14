"""The ranks of a whole AdaLoRA run: recorded from start to end, the same after a break, and shown on its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import whole_runs
from peftlab.attaching.allocation import AllocatedAttachment
from peftlab.config import build_config
from peftlab.errors import RunError
from peftlab.execute import execute
from peftlab.rank_log import RANK_FILE, RANK_SUMMARY_FILE, load_rank_log
from peftlab.run import RunFolder

METHOD = {"name": "adalora", "initial_rank": 4, "target_rank": 2, "interval_steps": 2}


def start(folder: Path, name: str) -> RunFolder:
    values: dict[str, Any] = whole_runs.make_values(
        folder, training={"save_steps": 3}, output={"directory": str(folder / name)}
    )
    values |= {"method": METHOD, "evaluation": {"enabled": False}}
    del values["schedule"]
    return execute(build_config(values), show=lambda line: None)


def test_ranks_are_recorded_also_across_a_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(tmp_path, "whole")
    log = load_rank_log(whole.path)
    assert log.steps == [0, 2, 4, 6, 8, 12], "the start, each allocation, and the last step"
    assert log.totals() == log.budgets == [56, 45, 33, 28, 28, 28]
    assert {place.role for place in log.places.values()} >= {"attention.query", "mlp.down"}
    saved = load_file(whole.path / "final_model" / "adapter_model.safetensors")
    sizes = [tensor.shape[0] for name, tensor in saved.items() if "lora_E" in name]
    assert sorted(sizes) == sorted(values[-1] for values in log.ranks.values())
    assert "<h2>Ranks</h2>" in whole.report.read_text()
    kept = AllocatedAttachment.after_step

    def breaks(self: AllocatedAttachment, step: int) -> None:
        kept(self, step)
        if step == 8:
            raise RunError("the power failed")

    with monkeypatch.context() as patched:
        patched.setattr(AllocatedAttachment, "after_step", breaks)
        with pytest.raises(RunError, match="power failed"):
            start(tmp_path, "broken")
    (folder,) = (tmp_path / "broken").iterdir()
    assert not (folder / RANK_FILE).exists()
    execute(build_config({}), resume=folder, show=lambda line: None)
    for name in (RANK_FILE, RANK_SUMMARY_FILE):
        assert (folder / name).read_bytes() == (whole.path / name).read_bytes()
