"""The cache of loaded models: what leaves when, that it died, and who holds it where it did not."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from command_line import environment
from torch import nn

from peftlab.errors import ModelError, UnknownNameError
from peftlab.memory.holders import NOT_OF_PYTHON
from peftlab.model_cache import ModelCache

SIDE = 64
BYTES = 4 * 2 * (SIDE * SIDE + SIDE)


pytestmark = pytest.mark.usefixtures("quick_collection")


def load(side: int = SIDE) -> nn.Module:
    return nn.Sequential(nn.Linear(side, side), nn.Linear(side, side))


def test_the_least_recently_used_leaves_first() -> None:
    cache = ModelCache(limit_models=2)
    first = cache.get("a", load)
    cache.get("b", load)
    assert cache.get("a", lambda: pytest.fail("it is there")) is first
    cache.get("c", load)
    assert list(cache) == ["a", "c"]
    assert [report.name for report in cache.evicted] == ["b"]
    assert cache.evicted[0].died
    assert len(cache) == 2
    assert "b" not in cache


def test_a_limit_of_bytes_is_of_measured_weights() -> None:
    cache = ModelCache(limit_bytes=2 * BYTES)
    cache.get("a", load)
    cache.get("b", load)
    assert cache.sizes() == {"a": BYTES, "b": BYTES}
    cache.get("c", load)
    assert list(cache) == ["b", "c"]
    with pytest.raises(ModelError, match=r"'large' takes [\d,]+ bytes and the cache may hold 66,560"):
        cache.get("large", lambda: load(2 * SIDE))
    assert list(cache) == ["b", "c"], "nothing leaves for what cannot be held"


def test_room_is_made_before_loading_where_the_size_is_known() -> None:
    cache = ModelCache(limit_bytes=BYTES)
    cache.get("a", load)
    there: list[list[str]] = []

    def loading() -> nn.Module:
        there.append(list(cache))
        return load()

    cache.get("b", loading, expected_bytes=BYTES)
    assert there == [[]]
    assert list(cache) == ["b"]


def test_shared_weights_are_counted_once() -> None:
    def tied() -> nn.Module:
        model = load()
        model[1].weight = model[0].weight  # type: ignore[index]
        return model

    cache = ModelCache()
    cache.get("tied", tied)
    assert cache.sizes() == {"tied": BYTES - 4 * SIDE * SIDE}


class Keeper:
    """Holds things as attributes."""

    net: Any = None


def _as_variable(model: nn.Module) -> Any:
    return model


def _as_attribute(model: nn.Module) -> Any:
    keeper = Keeper()
    keeper.net = model
    return keeper


def _as_part(model: nn.Module) -> Any:
    keeper = Keeper()
    keeper.net = {"layers": [model[1]]}  # type: ignore[index]
    return keeper


def _as_view_of_a_weight(model: nn.Module) -> Any:
    keeper = Keeper()
    keeper.net = model[0].weight.detach()[:3]  # type: ignore[index]
    return keeper


def _in_a_closure(model: nn.Module) -> Any:
    def answer() -> nn.Module:
        return model

    return answer


def _in_a_traceback(model: nn.Module) -> Any:
    try:
        raise ValueError
    except ValueError as error:
        return error


def _in_a_module(model: nn.Module) -> Any:
    sys.modules["of_a_person"] = types.ModuleType("of_a_person")
    sys.modules["of_a_person"].kept = model  # type: ignore[attr-defined]


def _in_a_graph(model: nn.Module) -> Any:
    return model(torch.ones(1, SIDE, requires_grad=True)).sum()


@pytest.mark.parametrize(
    ("hold", "holder"),
    [
        (_as_variable, "variable 'outside' of test_who_holds_it_is_told (test_model_cache.py:"),
        (_as_attribute, "attribute 'net' of a test_model_cache.Keeper"),
        (_as_part, "attribute 'net' of a test_model_cache.Keeper"),
        (_as_view_of_a_weight, "attribute 'net' of a test_model_cache.Keeper"),
        (_in_a_closure, "function test_model_cache._in_a_closure.<locals>.answer"),
        (_in_a_traceback, "variable 'model' of _in_a_traceback (test_model_cache.py:"),
        (_in_a_module, "variable 'kept' of module of_a_person"),
        (_in_a_graph, NOT_OF_PYTHON),
    ],
)
def test_who_holds_it_is_told(hold: Callable[[nn.Module], Any], holder: str) -> None:
    cache = ModelCache()
    outside = hold(cache.get("held", load))  # noqa: F841 - it holds, until here ends
    report = cache.unload("held")
    assert not report.died
    assert any(name.startswith(holder) for name in report.holders), report.holders
    assert "held" not in cache
    assert holder in str(report)
    sys.modules.pop("of_a_person", None)


def test_telling_leaves_nothing_behind() -> None:
    cache = ModelCache()
    model = cache.get("held", load)
    alive = weakref.ref(model)
    assert not cache.unload("held").died
    del model
    gc.collect()
    assert alive() is None, "a copy of this function's variables would hold it"


def test_cycles_hold_nothing() -> None:
    def cyclic() -> nn.Module:
        model = load()
        model.itself = [model]  # type: ignore[assignment]
        return model

    cache = ModelCache()
    cache.get("cyclic", cyclic)
    report = cache.unload("cyclic")
    assert report.died
    assert report.holders == ()


def test_an_unknown_name() -> None:
    cache = ModelCache()
    cache.get("llama", load)
    with pytest.raises(UnknownNameError, match=r"unknown loaded model 'lama' \(did you mean 'llama'\?\)"):
        cache.unload("lama")
    assert [report.name for report in cache.clear()] == ["llama"]


_MEASURE = """
import json, torch
from torch import nn
from peftlab.model_cache import ModelCache

beside = []
def load():
    layers = []
    for number in range(2400):  # of 64 KiB each: glibc takes them from its heap, where what is allocated between them stays
        layers.append(nn.Linear(128, 128, bias=False))
        if number % 8 == 0:
            beside.append(torch.ones(64))
    return nn.Sequential(*layers)

cache, shares = ModelCache(), []
for _ in range(2):
    model = cache.get("model", load)
    model(torch.ones(1, 128))
    del model
    report = cache.unload("model")
    shares.append([report.died, report.weights_bytes, report.loading_bytes, report.given_back])
print(json.dumps(shares))
"""


def test_what_loading_took_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    for died, weights, loading, given_back in (first, second):
        assert died
        assert weights == 2400 * 128 * 128 * 4
        assert loading > 0.9 * weights
        assert given_back >= 0.95
