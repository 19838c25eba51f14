"""Bundles as plain peft folders, for places without peftlab."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftlab.attaching.attachment import ADAPTER_FILE
from peftlab.errors import InputError, MethodError
from peftlab.files import CHECKSUMS, new_folder, write_text
from peftlab.folders import OnConflict, choose_folder
from peftlab.model_card import adapter_folders, exported_card
from peftlab.run import RunFolder
from peftlab.store import MANIFEST, read_manifest

_CONFIG_FILE = "adapter_config.json"
_NOT_PEFT: Mapping[str, str] = {
    "new_layer": "peft has no new transformer blocks",
    "hybrid": "peft has no new transformer blocks, and LoRA alone would not answer as the two do",
    "bitfit": "it trains the base's own biases, which is no adapter of peft",
    "full": "it trains the whole model, which is no adapter: its folder is a whole model that transformers loads",
}
"""Methods that peft cannot load, and why."""


def export_adapter(
    source: str | Path,
    *,
    output: str | Path,
    name: str | None = None,
    on_conflict: OnConflict = "refuse",
    runs: str | Path = "runs",
) -> Path:
    """Write a bundle's adapter as a folder that `peft.PeftModel.from_pretrained` loads without peftlab.

    Args:
        source: A bundle's folder, or a run: path, name or "last".
        output: The folder in which the new folder shall lie.
        name: Its name; None is the run's or the bundle's.
        on_conflict: What happens where there is one of this name: "refuse", "version" or "overwrite".
        runs: Where run folders lie.

    Returns:
        The new folder: adapter_config.json, adapter_model.safetensors and a README; with several towers, a folder of each
        name holds the two files of its adapter.

    Raises:
        InputError: There is no such run or bundle, or the name is not safe.
        CheckpointError: The bundle is damaged.
        MethodError: peft cannot load its method; says what does.
        OutputError: The name is there already, or the folder cannot be written.
    """
    bundle, own = _find_bundle(source, Path(runs))
    manifest = read_manifest(bundle)
    _check_known_to_peft(manifest, bundle)
    folder = choose_folder(Path(output).expanduser(), own if name is None else name, on_conflict)
    with new_folder(folder) as aside:
        for adapter in adapter_folders(manifest):
            (aside / adapter).mkdir(exist_ok=True)
            for file in (_CONFIG_FILE, ADAPTER_FILE):
                shutil.copyfile(bundle / adapter / file, aside / adapter / file)
        write_text(aside / "README.md", exported_card(manifest))
    (folder / CHECKSUMS).unlink()  # a plain folder has none
    return folder


def _find_bundle(source: str | Path, runs: Path) -> tuple[Path, str]:
    """A bundle's folder and its name, for a bundle, a run's path, a run's name or "last"."""
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        resolved = folder.resolve()
        return folder, resolved.parent.name if resolved.name == "final_model" else resolved.name
    run = Path(RunFolder.find(str(source), runs.expanduser()).path)
    if not (run / "final_model" / MANIFEST).is_file():
        raise InputError(f"the run {run} has no final model yet; go on with it: peftlab run --resume {run}")
    return run / "final_model", run.name


def _check_known_to_peft(manifest: Mapping[str, Any], bundle: Path) -> None:
    """Refuse what peft cannot load, or would load wrongly."""
    method = manifest["method"]
    reason = _NOT_PEFT.get(method)
    files = [
        Path(adapter) / file for adapter in adapter_folders(manifest) for file in (_CONFIG_FILE, ADAPTER_FILE)
    ]
    if method == "prefix_tuning" and manifest["head"] == "seq2seq":
        reason = (
            "peft 0.21 deals an encoder-decoder's prefix wrongly over the layers, and would answer otherwise"
        )
    elif reason is None and not all((bundle / file).is_file() for file in files):
        reason = f"its method has not written {_CONFIG_FILE} and {ADAPTER_FILE}"
    if reason:
        raise MethodError(
            f"{bundle} ({method}) is not exported: {reason}; peftlab.load({str(bundle)!r}) loads it with its base"
        )
