import dataclasses

import pytest
from builders import battle_frame, write_csv

from rewardmodel.config.schema import DataConfig, ModelConfig, Recipe, Source
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.planning.workload import ARENA_BATTLES, read_workload


def test_battles_at_hand_are_tokenised(recipe, backbone):
    workload = read_workload(recipe, backbone("llama"))
    assert (workload.training, workload.validation) == (36, 12)
    assert len(workload.branches) == len(workload.predicted) == 48
    assert {len(row) for row in workload.branches} == {2}
    assert {len(row) for row in workload.predicted} == {3}
    assert max(map(sum, workload.branches)) <= 160
    assert workload.source == "48 of 48 tokenised"


def test_for_want_of_battles_those_of_the_competition_are_taken(backbone):
    recipe = Recipe(data=DataConfig(train="nowhere.csv", folds=20), model=ModelConfig(str(backbone("llama"))))
    workload = read_workload(recipe, backbone("llama"))
    assert workload.training + workload.validation == ARENA_BATTLES
    assert "because the recipe's battles cannot be read (nowhere.csv" in workload.source
    lengths = [sum(row) for row in workload.branches]
    assert max(lengths) == recipe.prompt.max_length
    assert 560 < sum(lengths) / len(lengths) < 650  # 605 were measured at 1,024


def with_data(recipe, **keys):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **keys))


@pytest.mark.parametrize("keys", [{}, {"fold": 1, "folds": 3}, {"folds": 2, "calibration": 0.25, "holdout": 0.25}])
def test_battles_that_only_train_are_counted_as_they_will_be_dealt(keys, recipe, backbone, tmp_path):
    more = battle_frame(40, seed=1)  # 12 of its prompts are the recipe's own
    sources = [recipe.data.train, Source(str(write_csv(more, tmp_path / "more.csv")), validation=False)]
    asked = with_data(recipe, train=sources, **keys)
    parts = split(load_battles(asked.data), asked.data.fold)
    workload = read_workload(asked, backbone("llama"))
    assert (workload.training, workload.validation) == (len(parts.training), len(parts.validation))
    assert workload.validation <= 24 < workload.training
    assert workload.source == "208 of 208 tokenised"


def test_a_limit_and_the_parts_that_never_train_are_counted(recipe, backbone):
    limited = read_workload(with_data(recipe, limit=20), backbone("llama"))
    assert 20 <= limited.training + limited.validation < 24  # whole prompts
    absent = {"train": "nowhere.csv", "folds": 4, "calibration": 0.1, "holdout": 0.1}
    for limit, count in ((None, ARENA_BATTLES), (1000, 1000)):
        workload = read_workload(with_data(recipe, **absent, limit=limit), backbone("llama"))
        assert workload.validation == round(0.2 * count)
        assert workload.training + workload.validation == round(0.8 * count)


def test_what_cannot_be_dealt_is_said(recipe, backbone):
    for keys in ({"folds": 40}, {"train": "nowhere.csv", "folds": 0}):
        with pytest.raises(InputError, match=r"data\.folds: "):
            read_workload(with_data(recipe, **keys), backbone("llama"))
