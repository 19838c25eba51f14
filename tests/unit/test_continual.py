"""Arms, rows and scores of the continual-learning experiment, and what it refuses to believe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from peftlab.batches import Row
from peftlab.catalog import METHODS, METRICS
from peftlab.continual.answers import EVALUATION, PREDICTIONS, Asked, check_equal_weights, hash_tensors
from peftlab.continual.arms import Arm, make_arms
from peftlab.continual.course import Learned, check_isolated
from peftlab.continual.fixture import ANSWERS, values_of, write_fixture
from peftlab.continual.judging import combine, shared_metrics, spread
from peftlab.continual.lessons import mix_in
from peftlab.errors import ConfigError, EvaluationError, UnknownNameError
from peftlab.experiments.continual import Settings
from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.hybrid import HybridExtension
from peftlab.figures.continual import TaskScores, plot_score_matrix, plot_task_curves
from peftlab.mapping import map_model
from peftlab.seeded_scores import compare_all, gather
from peftlab.settings import validate
from peftlab.task import Example
from peftlab.text_scores import mean_score

KEPT: dict[str, Any] = {"unit": "rate", "higher_is_better": True, "signature": "", "seed": 1}


def rows(count: int, start: int = 0) -> list[Row]:
    return [Row(str(n), [n], [n]) for n in range(start, start + count)]


def asked(folder: Path, label: str, weights: str, answers: list[str]) -> Asked:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"id": str(i), "prediction": a}) + "\n" for i, a in enumerate(answers))
    (folder / PREDICTIONS).write_text(lines, encoding="utf-8")
    (folder / EVALUATION).write_text(json.dumps({"weights": weights, "metrics": {}}), encoding="utf-8")
    return Asked(label, folder, weights, {})


def test_arms_share_what_their_plans_say() -> None:
    arms = {
        arm.name: arm
        for arm in make_arms(["lora", "hybrid"], ["isolated", "joint", "full", "shared_layer"], {"rank": 4})
    }
    assert list(arms) == [
        "lora isolated", "lora joint", "hybrid isolated", "hybrid joint", "hybrid shared layer", "full sequential",
    ]  # fmt: skip
    layer = frozenset({"block.weight"})
    assert not arms["lora isolated"].shares("x.lora_A", layer)
    assert arms["lora joint"].shares("x.lora_A", layer)
    assert arms["full sequential"].shares("anything", layer)
    shared = arms["hybrid shared layer"]
    assert shared.shares("block.weight", layer)
    assert not shared.shares("x.lora_A", layer)
    assert arms["full sequential"].settings == {}
    assert arms["lora joint"].settings == {"rank": 4}


def test_a_plan_without_its_method_and_a_setting_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"add hybrid to methods"):
        make_arms(["lora"], ["shared_layer"], {})
    with pytest.raises(ConfigError, match=r"rank has no effect on new_layer"):
        make_arms(["new_layer"], ["isolated"], {"rank": 4})
    with pytest.raises(ConfigError, match=r"init"):
        make_arms(["lora"], ["sequential"], {"init": "eva"})


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("earlier", [1, 2, 3])
def test_replay_has_the_share_of_old_rows(share: float, earlier: int) -> None:
    old = [rows(40, 1000 * (n + 1)) for n in range(earlier)]
    mixed, count = mix_in(rows(90), old, share=share, seed=1)
    assert count == len(mixed) - 90
    assert count / len(mixed) == pytest.approx(share, abs=0.01)
    of_each = [sum(row in part for row in mixed) for part in old]
    assert max(of_each) - min(of_each) <= 1
    assert mix_in(rows(90), old, share=share, seed=1)[0] == mixed
    assert mix_in(rows(90), old, share=share, seed=2)[0] != mixed


def test_few_old_rows_are_taken_again_and_a_share_of_all_is_refused() -> None:
    mixed, count = mix_in(rows(30), [rows(3, 100)], share=0.5, seed=1)
    assert count == 30
    assert {row.id for row in mixed[30:]} == {"100", "101", "102"}
    with pytest.raises(ConfigError, match=r"between 0 and 1"):
        mix_in(rows(3), [rows(3)], share=1.0, seed=1)


def test_tasks_of_the_fixture_ask_the_same_and_want_another_answer(tmp_path: Path) -> None:
    folders = write_fixture(list(ANSWERS), tmp_path)
    found = {
        label: [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
        for label, folder in folders.items()
    }
    prompts = {tuple(row["prompt"] for row in lines) for lines in found.values()}
    assert len(prompts) == 1
    for place in range(len(found["sentence"])):
        assert len({lines[place]["completion"] for lines in found.values()}) == len(ANSWERS)
    assert values_of("name[A, B], area[park]") == {"name": "A, B", "area": "park"}
    with pytest.raises(UnknownNameError, match=r"prais"):
        write_fixture(["prais"], tmp_path)


def test_a_combination_of_scores_is_their_weighted_sum_over_every_choice_of_examples() -> None:
    one = mean_score("m", [float(i % 2) for i in range(20)], **KEPT)
    two = mean_score("m", [float(i % 5 == 0) for i in range(10)], **KEPT)
    whole = combine([(0, one, 0.5), (1, two, 0.5)], "average")
    assert whole.value == pytest.approx((one.value + two.value) / 2)
    assert whole.rows is not None
    assert whole.value_of is not None
    assert whole.value_of(whole.rows.sum(axis=0)) == pytest.approx(whole.value, abs=1e-12)
    chosen = np.array([0, 1, 2, 5, 20, 25, 25, 29])
    first, second = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    assert whole.value_of(whole.rows[chosen].sum(axis=0)) == pytest.approx(
        (np.mean(first) + np.mean(second)) / 2
    )
    with pytest.raises(EvaluationError, match=r"without examples"):
        whole.value_of(whole.rows[:20].sum(axis=0))


def test_a_corpus_score_stays_one_in_a_combination() -> None:
    bleu = METRICS.load("bleu").score
    examples = [Example(str(i), "s", (f"the cat {i} sat on the old mat",)) for i in range(12)]
    texts = [f"the cat {i} sat on {'the' if i % 3 else 'no'} old mat" for i in range(12)]
    one, two = bleu(texts, examples, seed=1), bleu(texts[:6], examples[:6], seed=1)
    whole = combine([(0, one, 0.5), (1, two, 0.5)], "average of bleu")
    assert whole.rows is not None
    assert whole.value_of is not None
    assert whole.value_of(whole.rows.sum(axis=0)) == pytest.approx((one.value + two.value) / 2)
    first, second = [0, 1, 1, 7], [2, 3]
    chosen = whole.rows[[*first, *(12 + i for i in second)]].sum(axis=0)
    apart = [
        bleu([texts[i] for i in part], [examples[i] for i in part], seed=1).value for part in (first, second)
    ]
    assert whole.value_of(chosen) == pytest.approx(sum(apart) / 2)


def test_a_difference_of_scores_counts_upwards_and_is_compared_over_examples() -> None:
    learned = mean_score("m", [1.0] * 40, **KEPT)
    left = mean_score("m", [0.0] * 40, **KEPT)
    lost = combine([(0, left, 1.0), (0, learned, -1.0)], "backward transfer")
    kept = combine([(0, learned, 1.0), (0, learned, -1.0)], "backward transfer")
    assert (lost.value, kept.value) == (-1.0, 0.0)
    assert lost.higher_is_better
    arms = {"shared": gather([lost] * 3, seed=1), "isolated": gather([kept] * 3, seed=1)}
    (difference,) = compare_all(arms, seed=1, num_resamples=200)
    assert difference.better == "isolated"


def test_equal_weights_that_answer_in_two_ways_are_refused(tmp_path: Path) -> None:
    first = asked(tmp_path / "a", "x", "w", ["one", "two"])
    check_equal_weights([first, asked(tmp_path / "b", "x", "w", ["one", "two"])])
    check_equal_weights([first, asked(tmp_path / "c", "y", "w", ["no", "two"])])
    check_equal_weights([first, asked(tmp_path / "d", "x", "v", ["no", "two"])])
    with pytest.raises(EvaluationError, match=r"answered 1 examples otherwise"):
        check_equal_weights([first, asked(tmp_path / "e", "x", "w", ["no", "two"])])


@pytest.mark.parametrize(("weights", "answers", "what"), [("v", ["a"], "weights"), ("w", ["b"], "answers")])
def test_an_isolated_task_that_changes_is_refused(
    tmp_path: Path, weights: str, answers: list[str], what: str
) -> None:
    def course(later: Asked) -> Learned:
        first, other = (
            asked(tmp_path / later.folder.name / "1", "x", "w", ["a"]),
            asked(tmp_path / later.folder.name / "2", "y", "s", ["-"]),
        )
        return Learned(
            Arm("lora isolated", "isolated", "lora"), 1, tmp_path, ({}, {}), ((first, other), (later, other))
        )

    check_isolated(course(asked(tmp_path / "same", "x", "w", ["a"])))
    with pytest.raises(EvaluationError, match=rf"the {what} of x changed after it was learned"):
        check_isolated(course(asked(tmp_path / "changed", "x", weights, answers)))


def test_a_digest_sees_every_bit_and_name() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert hash_tensors(tensors) == hash_tensors(dict(reversed(tensors.items())))
    changed = {"a": torch.ones(3), "b": torch.tensor([0.0, -0.0])}
    assert hash_tensors(tensors) != hash_tensors(changed)
    assert hash_tensors(tensors) != hash_tensors({"a": tensors["a"], "c": tensors["b"]})


def test_own_and_shared_values_together_are_what_the_extension_shares() -> None:
    """E2's shared layer: values put together by name answer as models that hold the very same tensors."""
    torch.manual_seed(0)
    base = tiny_models.build("llama")
    extension = HybridExtension(
        base, ExtensionConfig(lora_r=2, lora_dropout=0.0, lora_target_modules="attention")
    )
    first = extension.create_hybrid("a")
    second = extension.create_hybrid_from_existing(first, "b")
    from peftlab.extensions.bundles import record_of

    states = []
    for model in (first, second):  # what the second does to the layer, the first state knows nothing of
        record = record_of(model)
        assert record is not None
        with torch.no_grad():
            for parameter in record.attachment.parameters().values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        states.append(record.attachment.tensors())
    ids = torch.arange(3, 9)[None]
    wanted = [model.eval()(input_ids=ids).logits for model in (first, second)]
    method = METHODS.load("hybrid")
    settings = method.Settings(rank=2, alpha=32, dropout=0.0, targets="attention")
    made = method.attach(base, map_model(base), settings, head="causal", seed=5)
    layer = frozenset(made.layers.state())
    arm = Arm("hybrid shared layer", "shared_layer", "hybrid")
    for own, expected in zip(states, wanted, strict=True):
        made.load({name: (states[1] if arm.shares(name, layer) else own)[name] for name in own})
        torch.testing.assert_close(made.model.eval()(input_ids=ids).logits, expected, rtol=0, atol=0)
    made.remove()


def test_the_headline_is_one_that_all_tasks_have(tmp_path: Path) -> None:
    def scored(label: str, *names: str) -> Asked:
        return Asked(label, tmp_path, "w", {name: {"value": 0.0} for name in names})

    several = [scored("a", "bleu", "rouge_l"), scored("b", "rouge_l", "bleu", "x")]
    assert shared_metrics(several, None) == ["bleu", "rouge_l"]
    assert shared_metrics(several, "rouge_l") == ["rouge_l", "bleu"]
    with pytest.raises(ConfigError, match=r"all tasks must be scored by x"):
        shared_metrics(several, "x")
    with pytest.raises(ConfigError, match=r"one metric"):
        shared_metrics([scored("a", "bleu"), scored("b", "x")], None)


def test_a_mean_of_what_is_not_defined_is_not_defined() -> None:
    assert spread([1.0, None]) == (None, None)
    assert spread([2.0]) == (2.0, None)
    mean, interval = spread([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval is not None
    assert interval[0] < 2 < interval[1]
    assert spread([0.9, 1.0, 0.8], within=(0.0, 1.0))[1] == (pytest.approx(0.6516, abs=1e-3), 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": [1, 1]}, r"different seeds"),
        ({"methods": ["full"]}, r"plan full"),
        ({"methods": ["lorra"]}, r"lora"),
        ({"plans": ["isolated", "isolated"]}, r"named twice"),
        ({"plans": ["alone"]}, r"plans"),
        ({"code": "x", "configs": {"a": {}}}, r"one place"),
        ({"eval_samples": 3}, r"eval_samples"),
        ({"factors": [2.0, 1.0]}, r"smallest first"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Settings, values)


def test_one_name_is_a_list_of_one_and_a_number_so_many_seeds() -> None:
    found = validate(Settings, {"methods": "hybrid", "plans": "isolated", "seeds": 2})
    assert (found.methods, found.plans, found.seeds) == (("hybrid",), ("isolated",), (1, 2))


def test_charts_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    none = (None, None)
    arms = [
        TaskScores("lora isolated", ("base", "a", "b"), ("a", "b"), ((0.0, 1.0), (50.0, 1.0), (50.0, 80.0)),
                   (none, ((40.0, 60.0), None), none), (1, 2)),
        TaskScores("lora $joint$", ("base", "all"), ("a", "b"), ((0.0, 1.0), (20.0, 30.0)), (none, none), (1, 1)),
    ]  # fmt: skip
    for draw in (plot_score_matrix, plot_task_curves):
        contents = []
        for number in (1, 2):
            files = draw(arms, tmp_path / f"{number}.png", metric="bleu", unit="0-100")
            assert [file.suffix for file in files] == [".png", ".svg"]
            contents.append([file.read_bytes() for file in files])
        assert contents[0] == contents[1]
        assert b"lora isolated" in contents[0][1]
