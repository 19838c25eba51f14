"""`peftlab inspect` as a person runs it: one model, a run beside its base, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
import whole_runs
from peftlab.cli import main
from peftlab.figures import canvas
from peftlab.files import verify_folder
from peftlab.inspection import survey

TEXT = "the cat sits on a mat and a dog runs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some tiny models and a finished run."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny_models.save_model(folder / "t5", "t5")
    tiny_models.save_model(folder / "bert", "bert")
    values = whole_runs.make_values(
        folder, evaluation={"enabled": False, "num_samples": None}, training={"max_steps": 4, "validation_rows": 2},
        method={"name": "lora", "rank": 4, "targets": "attention"}, schedule={"strategy": None},
    )  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(values))
    assert main(["run", str(folder / "run.yaml"), "--experiment_name", "tuned"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse charts, and no prediction of memory: both have tests of their own."""
    monkeypatch.setattr(canvas, "DPI", 40)
    monkeypatch.setattr(survey, "training_memory", lambda *_: {"note": "left out"})


def inspect(place: Path, *arguments: str, folder: str = "out") -> Path:
    """Run the command in this process; the new folder."""
    before = set((place / folder).iterdir()) if (place / folder).exists() else set()
    given = [
        *arguments,
        "--output",
        str(place / folder),
        "--device",
        "cpu",
        "--output_dir",
        str(place / "runs"),
    ]
    assert main(["inspect", *given]) == 0
    (made,) = set((place / folder).iterdir()) - before
    return made


def document(folder: Path) -> dict:
    return json.loads((folder / "inspection.json").read_text())


def test_an_encoder_decoder_with_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = inspect(
        place, str(place / "t5"), "--text", TEXT, "--decoder_text", "a bird flies", "--layers", "1"
    )
    assert capsys.readouterr().out.strip() == str(made / "inspection.html")
    seen = document(made)
    assert [r["stack"] for r in seen["readings"]] == ["encoder", "decoder"]
    maps = [name for r in seen["readings"] for a in r["attention"] for name in a["maps"]]
    assert maps == [f"{name}.layer_1.text_0" for name in ("encoder.self", "decoder.self", "decoder.cross")]
    assert all((made / "arrays" / f"{name}.npy").is_file() for name in maps)
    page = (made / "inspection.html").read_text()
    assert "cross attention" in page
    assert "keys and values" in page


def test_a_run_beside_its_base(place: Path) -> None:
    (run,) = (place / "runs").iterdir()
    made = inspect(place, str(place / "model"), run.name, "--text", TEXT, folder="pairs")
    assert made.name == f"model-and-{run.name}"
    compared = json.loads((made / "comparison.json").read_text())
    assert compared["similarity"]["words"] == 10
    diagonal = [compared["similarity"]["all_dimensions"][i][i] for i in (0, 1)]
    assert all(0.8 < value < 1 for value in diagonal)  # four steps of training change little, not nothing
    assert document(made / "a")["adapter"] is None
    adapter = document(made / "b")
    assert adapter["adapter"]["method"] == "lora"
    assert adapter["shares"]["total"]["adapter_parameters"] == adapter["adapter"]["counts"]["parameters"]
    page = (made / "inspection.html").read_text()
    assert "lora, rank 4" in page
    assert "How alike the layers are" not in page  # it stands in the chart
    assert page.count('<svg class="map"') == 2


def test_the_structure_alone_reads_no_weights(place: Path) -> None:
    folder = place / "weightless"
    folder.mkdir()
    (folder / "config.json").write_text((place / "bert" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((place / "bert" / name).read_text())
    made = inspect(place, str(folder), "--no_text", folder="bare")
    assert document(made)["loaded"] is False
    assert "no weights were read" in (made / "inspection.html").read_text()
    page, plots = made / "inspection.html", made / "plots"
    page.unlink()
    [plot.unlink() for plot in plots.iterdir()]
    plots.rmdir()
    verify_folder(made)  # what was collected is as it was written
    again = inspect(place, str(folder), "--no_text", folder="bare")
    assert again.name == f"{made.name}-2"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nothing"], "there is no model folder ./nothing"),
        (["nobody/nothing"], "no model 'nobody/nothing'"),
        (["embedded", "embedded", "embedded"], "inspect looks into one, or compares two"),
        (["embedded", "--text", " "], "--text is empty"),
        (
            ["embedded", "--text", "a", "--decoder_text", "b", "--decoder_text", "c"],
            "2 --decoder_text for 1 --text",
        ),
        (["embedded", "--layers", "0,x"], "'x' is not a whole number"),
        (["embedded", "--layers", "0,4"], "'embedded' has no layer 4; its layers are 0 to 3"),
        (["embedded", "--layers", "-1"], "layers count from 0"),
        (["embedded", "--no_text", "--layers", "0"], "--layers has no effect with --no_text"),
        (["embedded", "--no_text", "--decoder_text", "a"], "--decoder_text has no effect with --no_text"),
        (["embedded", "--text", "word " * 600], "the model reads 512; give another --text"),
        (["embedded", "--device", "abacus"], "'abacus' is not a device"),
        (["last"], "there is no run"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("peftlab: error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["inspect", "embedded", "--output", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written (--output)" in capsys.readouterr().err


def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    for arguments in (["a", "b", "c"], ["embedded", "--text", ""], ["embedded", "--layers", "x"]):
        code = (
            "import sys; from peftlab.cli import main; code = main(sys.argv[1:]);"
            " print(code, [m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "inspect", *arguments], cwd=tmp_path, env=whole_runs.environment(),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "2 []"


def test_a_model_that_sees_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers as T

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    T.ViTModel(T.ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path / "vit")
    output = ["--output", str(tmp_path / "out")]
    assert main(["inspect", str(tmp_path / "vit"), *output]) == 2
    assert "reads no text; look at its structure alone with --no_text" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "vit"), "--no_text", *output]) == 0
