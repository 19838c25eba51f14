"""The rank log: rows, files that read back, damage that is named, and its charts and section."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import pytest
from run_folder_fixture import fabricate_run

from pages import check_page
from peftlab import figures
from peftlab.errors import DataError, RunError
from peftlab.probe import ProbeContext, Recording
from peftlab.rank_log import RANK_FILE, RANK_SUMMARY_FILE, RankLog, RankPlace, RankRecord, load_rank_log
from peftlab.report import write_report

ROLES = ("attention.query", "mlp.down")
CHARTS = [figures.plot_rank_allocation, figures.plot_rank_heatmap]


def fabricate_ranks(*, layers: int = 3, rows: int = 6, stacks: tuple[str, ...] = ("layers",)) -> RankLog:
    """Twelve ranks of each module that fall to three on average, and one module outside the layers."""
    places = {
        f"{stack}.{layer}.{role}": RankPlace(role, stack, layer)
        for stack in stacks
        for layer in range(layers)
        for role in ROLES
    }
    log = RankLog(places | {"last, with a comma": RankPlace("head")})
    source, left = random.Random(1), dict.fromkeys(log.places, 12)
    for row in range(rows):
        budget = round(len(left) * (3 + 9 * (1 - row / max(1, rows - 1)) ** 3))
        while sum(left.values()) > budget:
            path = source.choice([path for path, rank in left.items() if rank])
            left[path] -= 1
        log.append(1 + 10 * row, budget, left)
    return log


def test_rows_and_their_statistics() -> None:
    log = RankLog({"a": RankPlace("attention.query", "layers", 0), "b": RankPlace("mlp.up", "layers", 1)})
    assert log.summarize()["first"] is None
    log.append(2, 8, {"a": 4, "b": 4})
    log.append(5, 3, {"b": 0, "a": 3})
    assert (log.totals(), log.mean_ranks(), log.lowest(), log.highest()) == ([8, 3], [4, 1.5], [4, 0], [4, 3])
    told = log.summarize()
    assert told["last"] == {"step": 5, "budget": 3, "total": 3, "mean": 1.5, "min": 0, "max": 3}
    assert told["modules"]["b"] == {
        "role": "mlp.up", "stack": "layers", "layer": 1, "first_rank": 4, "last_rank": 0,
    }  # fmt: skip
    with pytest.raises(RunError, match=r"step 5 came after those of step 5"):
        log.append(5, 3, {"a": 3, "b": 0})
    with pytest.raises(RunError, match=r"other modules than the log's: b, c"):
        log.append(6, 3, {"a": 3, "c": 0})
    assert len(log) == 2


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    log = fabricate_ranks()
    log.write(tmp_path)
    header = (tmp_path / RANK_FILE).read_text().splitlines()[0]
    assert header.startswith("step,budget,layers.0.attention.query,layers.0.mlp.down,")
    for source in (tmp_path, tmp_path / RANK_FILE, str(tmp_path)):
        assert load_rank_log(source) == log
    assert RankLog.from_json(json.loads(json.dumps(log.to_json()))) == log
    written = [(tmp_path / name).read_bytes() for name in (RANK_FILE, RANK_SUMMARY_FILE)]
    load_rank_log(tmp_path).write(tmp_path)
    assert written == [(tmp_path / name).read_bytes() for name in (RANK_FILE, RANK_SUMMARY_FILE)]


def test_a_record_goes_on_where_a_checkpoint_was() -> None:
    whole = fabricate_ranks()
    record = RankRecord(whole.places)
    record.restore(json.loads(json.dumps(whole.to_json())), step=21)
    assert record.log.steps == [1, 11, 21]
    for row in range(3, len(whole)):
        record.log.append(
            whole.steps[row], whole.budgets[row], {path: values[row] for path, values in whole.ranks.items()}
        )
    assert record.log == whole
    with pytest.raises(RunError, match=r"other modules than this adapter's"):
        RankRecord({"a": RankPlace("head")}).restore(whole.to_json(), step=21)
    assert not record.wants_gradients(1)
    assert not isinstance(ProbeContext, Recording)


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "not a table": (RANK_FILE, lambda text: "nonsense", "its columns are"),
    "without modules": (RANK_FILE, lambda text: "step,budget\r\n1,2\r\n", "its columns are"),
    "a torn row": (RANK_FILE, lambda text: text[:-6], "has not the 9 cells"),
    "a word for a rank": (RANK_FILE, lambda text: text.replace(",12", ",twelve"), "ValueError"),
    "steps that fall": (RANK_FILE, lambda text: text.replace("\n51,", "\n2,"), "do not rise"),
    "empty": (RANK_FILE, lambda text: "", "its columns are"),
    "no bytes of text": (RANK_FILE, lambda text: "\udcff", "damaged"),
    "a summary that is cut": (RANK_SUMMARY_FILE, lambda text: text[:40], "JSONDecodeError"),
    "a summary of others": (RANK_SUMMARY_FILE, lambda text: text.replace("mlp.down", "mlp.up"), "KeyError"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    file, change, said = DAMAGE[case]
    fabricate_ranks().write(tmp_path)
    path = tmp_path / file
    text = path.read_bytes().decode()
    path.write_bytes(change(text).encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=said) as caught:
        load_rank_log(tmp_path)
    assert file in str(caught.value)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no ranks\.csv, ranks\.summary\.json; a run of a method that"):
        load_rank_log(tmp_path)
    with pytest.raises(DataError, match=r"give a run folder or its ranks\.csv"):
        load_rank_log(tmp_path / "nothing")


@pytest.mark.parametrize("plot", CHARTS, ids=lambda plot: plot.__name__)
def test_charts_draw_every_shape(plot: Any, tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [
        {}, {"rows": 1, "layers": 1}, {"rows": 90, "layers": 48}, {"stacks": ("encoder", "decoder")}, {"layers": 0},
    ]  # fmt: skip
    for shape in shapes:
        height, width, _ = mpl.image.imread(plot(fabricate_ranks(**shape), tmp_path / "a.png")).shape
        assert width >= 1500
        assert height >= 300
    assert plot(RankLog(fabricate_ranks().places), tmp_path / "empty.png").exists()
    run = fabricate_run(tmp_path, steps=24, layers=1)
    fabricate_ranks().write(run.path)
    pictures = {
        plot(source, tmp_path / f"{i}.png").read_bytes()
        for i, source in enumerate([run, run.path, str(run.path), run.path / RANK_FILE])
    }
    assert len(pictures) == 1


def test_the_page_of_a_run_shows_its_ranks(tmp_path: Path) -> None:
    run = fabricate_run(tmp_path, steps=12, layers=1)
    fabricate_ranks().write(run.path)
    page = check_page(write_report(run))
    assert "<h2>Ranks</h2>" in page
    assert "7 modules began with 84 ranks together and ended with 21, in a budget of 21: 3 each" in page
    assert {"rank_allocation.png", "rank_heatmap.png"} <= {path.name for path in run.plots.iterdir()}
    log = RankLog({"a": RankPlace("mlp.up", "layers", 0), "b": RankPlace("mlp.up", "layers", 1)})
    log.append(1, 8, {"a": 4, "b": 4})
    log.write(run.path)
    assert "No rank was taken: 2 modules have 4 each" in write_report(run).read_text()
    log.append(9, 3, {"a": 3, "b": 0})
    log.write(run.path)
    drawn = (run.plots / "rank_allocation.png").read_bytes()
    page = write_report(run).read_text()
    assert (run.plots / "rank_allocation.png").read_bytes() != drawn, "drawn anew"
    assert "1.5 each on average, from 0 to 3. 1 of them has lost all." in page
    (run.path / RANK_FILE).unlink()
    assert "<h2>Ranks</h2>" not in write_report(run).read_text()
