"""The presets: config files in `assets/presets/`, one for each; the folder is the registry."""

from __future__ import annotations

from pathlib import Path

PRESET_FOLDER = Path(__file__).parents[1] / "assets" / "presets"


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def describe_preset(name: str) -> str:
    """The first comment line of a preset.

    Args:
        name: A name from `preset_names`.

    Returns:
        The line without its `#`.
    """
    with (PRESET_FOLDER / f"{name}.yaml").open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()
