"""Frozen blocks run once: the same training to the bit, whatever was kept before, and never on stale states."""

import os
import shutil
from functools import partial

import pytest
import torch
from test_layout import ROWS, rows_of_lengths

import tiny_models
from peftlab.batches import Collator, EpochOrder, PackingCollator
from peftlab.catalog import METHODS
from peftlab.checkpoint import last_good_checkpoint
from peftlab.mapping import map_model
from peftlab.passes import foretell_trunk
from peftlab.schedule import Phase, PhaseSettings
from peftlab.trunk import Trunk, compute_states, find_cut, trunk_key, try_cut
from peftlab.trunk_cache import TrunkCache, make_room, row_digest
from tiny_runs import run, same


def attach(name="llama", num_layers=4, method="lora", dtype=torch.float32, **settings):
    base = tiny_models.build(name, num_layers).to(dtype)
    leaf = METHODS.load(method)
    head = tiny_models.HEADS[name]
    return leaf.attach(base, map_model(base), leaf.Settings(**settings), head=head, seed=1)


def open_trunk(attached, folder, cut, rows=ROWS):
    active = [n for n in attached.parameters() if attached.family.locate(n).layer in (None, *range(cut, 9))]
    tokens = [row.input_ids for row in rows]
    trial = try_cut(attached.model, attached.family, tokens[:3], cut, active, pad_id=0)
    assert not trial.reason
    dtype = next(attached.model.parameters()).dtype
    cache = TrunkCache(folder, trunk_key(attached.model, trial.below, cut), width=trial.width, dtype=dtype)
    return Trunk(attached.model, attached.family, cut, cache, 0, trial.in_tuples)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("collator", [Collator(0, "causal"), PackingCollator()], ids=["padded", "packed"])
def test_a_pass_from_the_cut_equals_the_whole_one(name, collator, tmp_path):
    if name == "opt" and isinstance(collator, PackingCollator):
        pytest.skip("rows of this model are padded")
    attached = attach(name, dtype=torch.float64, dropout=0.0)
    model = attached.model.double()
    kept = open_trunk(attached, tmp_path, 2)
    batch = collator(ROWS)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    whole = model(**inputs, use_cache=False).logits
    ran = []
    model.get_submodule(attached.family.blocks()[0].path).register_forward_hook(lambda *_: ran.append(1))
    kept.fill([row.input_ids for row in ROWS])
    ran.clear()
    with kept.fed(batch):
        cut = model(**inputs, use_cache=False).logits
    assert not ran
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(cut[real], whole[real], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, whole, rtol=0, atol=0)
    kept.cache.close()


def test_states_are_the_same_bits_whoever_the_neighbours_are():
    attached = attach()
    tokens = [row.input_ids for row in rows_of_lengths(*range(3, 16), seed=4)]
    together, _ = compute_states(attached.model, attached.family, tokens, 2, width=16, pad_id=0)
    for row, states in zip(tokens, together, strict=True):
        (alone,), _ = compute_states(attached.model, attached.family, [row], 2, width=16, pad_id=0)
        assert torch.equal(alone, states)


def test_the_cut_lies_below_all_that_trains():
    attached = attach(layers=(2, 3))
    assert find_cut(attached.family, list(attached.parameters())) == (2, "")
    assert find_cut(attached.family, [n for n in attached.parameters() if ".3." in n]) == (3, "")
    assert find_cut(attach().family, list(attach().parameters()))[0] == 0
    new = attach(method="new_layer")
    assert find_cut(new.family, list(new.parameters()))[0] == 4
    assert find_cut(attach("t5").family, [])[1] == "the model has 2 stacks of blocks"


def test_blocks_that_give_more_than_hidden_states_are_refused():
    attached = attach("bloom")
    trial = try_cut(attached.model, attached.family, [ROWS[0].input_ids], 2, [], pad_id=0)
    assert "more than hidden states" in trial.reason


def test_what_trains_below_the_cut_is_found():
    attached = attach(method="full")
    trial = try_cut(
        attached.model, attached.family, [ROWS[0].input_ids], 4, list(attached.parameters()), pad_id=0
    )
    assert "trains and runs below" in trial.reason


def test_dropout_below_the_cut_is_found():
    attached = attach(dropout=0.5)
    torch.nn.init.normal_(next(p for n, p in attached.parameters().items() if "lora_B" in n))
    top = [n for n in attached.parameters() if ".3." in n]
    trial = try_cut(attached.model, attached.family, [ROWS[0].input_ids], 3, top, pad_id=0)
    assert "dropout" in trial.reason


def test_the_key_knows_what_lies_below_and_nothing_else():
    attached = attach()
    top = [n for n in attached.parameters() if ".3." in n]
    trial = try_cut(attached.model, attached.family, [ROWS[0].input_ids], 3, top, pad_id=0)
    before = trunk_key(attached.model, trial.below, 3)
    with torch.no_grad():
        dict(attached.model.named_parameters())[top[0]].add_(1)
    assert trunk_key(attached.model, trial.below, 3) == before
    with torch.no_grad():
        next(p for n, p in attached.parameters().items() if ".0." in n).add_(1)
    assert trunk_key(attached.model, trial.below, 3) != before
    assert trunk_key(attached.model, trial.below, 2) != trunk_key(attached.model, trial.below, 3)


def test_rows_are_read_again_by_the_next_process(tmp_path):
    states = {row_digest([i]): torch.randn(3, 8) for i in range(4)}
    first = TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)
    first.add(states.items())
    beside = TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)
    beside.add([(row_digest([9]), torch.ones(2, 8))])
    beside.close()
    first.add([(row_digest([8]), torch.zeros(1, 8))])
    first.close()
    again = TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)
    assert len(again) == 6
    for digest, values in states.items():
        assert torch.equal(again.read(digest), values)
    assert again.num_bytes == (12 + 2 + 1) * 8 * 4


def test_what_a_kill_left_half_written_is_not_there(tmp_path):
    cache = TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)
    cache.add([(row_digest([1]), torch.randn(3, 8)), (row_digest([2]), torch.randn(3, 8))])
    cache.close()
    (index,) = (tmp_path / "key").glob("index-*.jsonl")
    index.write_text(index.read_text()[:-9])
    assert len(TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)) == 1
    place = '{"row": "x", "start": %d, "tokens": %d}'
    for damaged in (place % (0, 99), place % (-3, 3), "{", "[]", '{"row": "x"}'):
        index.write_text(damaged + "\n")
        assert len(TrunkCache(tmp_path, "key", width=8, dtype=torch.float32)) == 0


def test_the_oldest_caches_make_room(tmp_path):
    for number, name in enumerate(("old", "newer")):
        cache = TrunkCache(tmp_path, name, width=8, dtype=torch.float32)
        cache.add([("a", torch.zeros(100, 8))])
        cache.close()
        os.utime(tmp_path / name / "last_used", (number, number))
    assert make_room(tmp_path, "own", needed=1000, limit=10_000)
    assert {f.name for f in tmp_path.iterdir()} == {"old", "newer"}
    assert make_room(tmp_path, "own", needed=1000, limit=5000)
    assert {f.name for f in tmp_path.iterdir()} == {"newer"}
    assert not make_room(tmp_path, "own", needed=9000, limit=5000)


TOP = {"targets": "both", "dropout": 0.1, "rank": 2, "alpha": 4, "layers": (2, 3)}
ONE_PHASE = {"phases": [PhaseSettings(name="all", groups=("attention", "mlp"))], "num_layers": 4}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trunk"


def train(folder, *, trunk_bytes=10**9, **changes):
    asked = {
        "settings": TOP,
        **ONE_PHASE,
        "trunk_bytes": trunk_bytes,
        "max_steps": 32,
        "validation_steps": 16,
        "save_steps": 8,
    } | changes
    return run(folder, **asked)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_training_on_kept_states_is_training(packed, tmp_path, caches):
    kept = train(tmp_path / "kept", packed=packed)
    (entered,) = kept.told("phase_started")
    assert entered["trunk_blocks"] == 2
    assert entered["trunk_rows_computed"] == entered["trunk_rows"]
    whole = train(tmp_path / "whole", packed=packed, trunk_bytes=0)
    assert "not kept" in whole.told("phase_started")[0]["trunk"]
    for name, tensor in whole.attachment.tensors().items():
        torch.testing.assert_close(kept.attachment.tensors()[name], tensor, rtol=1e-4, atol=1e-6)
    again = train(tmp_path / "again", packed=packed)
    assert again.told("phase_started")[0]["trunk_rows_computed"] == 0, "read from the cache"
    assert same(kept.attachment.tensors(), again.attachment.tensors())


def test_a_run_that_is_cut_ends_the_same_to_the_bit_with_or_without_its_cache(tmp_path, caches):
    whole = train(tmp_path / "whole")
    for number, wiped in enumerate((False, True)):
        folder = tmp_path / f"cut-{number}"
        train(folder, stop_after=12)
        if wiped:
            shutil.rmtree(caches)
        resumed = train(folder, resume=last_good_checkpoint(folder)[0])
        assert (resumed.told("phase_resumed")[0]["trunk_rows_computed"] > 0) is wiped
        assert same(whole.attachment.tensors(), resumed.attachment.tensors())


def test_a_phase_that_opens_lower_layers_begins_at_the_tokens(tmp_path, caches):
    phases = [
        PhaseSettings(name="late", groups=("attention", "mlp"), layers=(2, 3), steps=32),
        PhaseSettings(name="all", groups=("attention", "mlp"), steps=32),
        PhaseSettings(name="last", groups=("attention", "mlp"), layers=(3, 3), steps=32),
    ]
    done = train(tmp_path, settings=None, phases=phases, max_steps=96)
    assert [entered.get("trunk_blocks") for entered in done.told("phase_started")] == [2, None, 3]
    keys = {folder.name for folder in caches.iterdir()}
    assert len(keys) == 2, "the last phase's lower adapters have trained: other states than the first's"


def test_rows_seen_once_and_caches_without_room_are_left_alone(tmp_path, caches):
    seldom = train(tmp_path / "seldom", max_steps=3, validation_steps=3, save_steps=3)
    assert "too seldom" in seldom.told("phase_started")[0]["trunk"]
    full = train(tmp_path / "full", trunk_bytes=100)
    assert "trunk_cache_gigabytes" in full.told("phase_started")[0]["trunk"]


def test_what_will_be_kept_is_said_beforehand():
    attached = attach(layers=(2, 3))
    rows, phase = rows_of_lengths(*[12] * 32), Phase("late", 0, 40, ("attention", "mlp"))
    order = EpochOrder(32, rows_per_step=8, batch_size=8, seed=1)
    told = partial(foretell_trunk, attached.family, list(attached.parameters()), phase, order, (rows, []))
    (note,) = told(bytes_per_token=64, gigabytes=1)
    assert "32 rows below layer 2 are kept on disk, 2.46e-05 GB" in note
    (note,) = told(bytes_per_token=64, gigabytes=1e-6)
    assert "would take" in note
    assert told(bytes_per_token=64, gigabytes=0) == []
    short = Phase("late", 0, 4, ("attention", "mlp"))
    assert not foretell_trunk(
        attached.family,
        list(attached.parameters()),
        short,
        order,
        (rows, []),
        bytes_per_token=64,
        gigabytes=1,
    )
