"""LoRA on families of the map: a joint pass has the gradients of each run alone, or is refused with a reason."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import transformers

from peftlab.commands.families import MEASURED

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from joint_families import FLOOR, try_family

KEPT = json.loads(FLOOR.read_text(encoding="utf-8"))
SAMPLE = ("bart", "falcon", "gemma2", "gpt_neox", "mamba", "mistral", "opt", "qwen2", "t5")
LONG = os.environ.get("PEFTLAB_LONG") == "1"
same_library = pytest.mark.skipif(
    transformers.__version__ != json.loads(MEASURED.read_text(encoding="utf-8"))["versions"]["transformers"],
    reason="the floor was measured on another release of transformers",
)


@same_library
@pytest.mark.parametrize("model_type", sorted(KEPT) if LONG else SAMPLE)
def test_a_family_gives_what_was_found(model_type: str) -> None:
    assert try_family(model_type).split(":")[0] == KEPT[model_type].split(":")[0]


def test_no_family_is_wrong_and_every_other_has_its_reason() -> None:
    assert not [name for name, found in KEPT.items() if found.startswith("wrong")]
    assert all(found == "equal" or ": " in found for found in KEPT.values())
    assert sum(found.startswith("equal") for found in KEPT.values()) >= LEAST


LEAST = 50
"""Families whose runs share a base."""
