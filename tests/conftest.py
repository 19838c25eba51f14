"""What all tests share: no network, no screen, and the reference data beside the repository."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # two workers with two threads each on two cores are many times slower
)

os.environ.setdefault("PEFTLAB_CACHE", tempfile.mkdtemp(prefix="peftlab-tests-"))  # certificates proved here

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of upstream data and official scores; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the reference data in {SHARED_DATA}, which is not part of the repository")
    return SHARED_DATA


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """What all libraries hold is looked through once, and not at every garbage collection of a module."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
