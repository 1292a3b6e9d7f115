import dataclasses

import pytest
from builders import battle_frame, write_csv

from rewardmodel.config.schema import DataConfig, ModelConfig, Recipe, Source
from rewardmodel.data.splits import load_battles, split
from rewardmodel.errors import InputError
from rewardmodel.planning.workload import ARENA, read_lengths


def test_battles_at_hand_are_tokenised(recipe, backbone):
    battles = read_lengths(recipe, backbone("llama"))
    assert (battles.training, battles.validation) == (36, 12)
    assert len(battles.branches) == len(battles.predicted) == 48
    assert {len(row) for row in battles.branches} == {2}
    assert {len(row) for row in battles.predicted} == {3}
    assert max(map(sum, battles.branches)) <= 160
    assert battles.source == "48 of 48 tokenised"


def test_for_want_of_battles_those_of_the_competition_are_taken(backbone):
    recipe = Recipe(data=DataConfig(train="nowhere.csv", folds=20), model=ModelConfig(str(backbone("llama"))))
    battles = read_lengths(recipe, backbone("llama"))
    assert battles.training + battles.validation == ARENA
    assert "for want of the recipe's (nowhere.csv" in battles.source
    lengths = [sum(row) for row in battles.branches]
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
    battles = read_lengths(asked, backbone("llama"))
    assert (battles.training, battles.validation) == (len(parts.training), len(parts.validation))
    assert battles.validation <= 24 < battles.training
    assert battles.source == "208 of 208 tokenised"


def test_a_limit_and_the_parts_that_never_train_are_counted(recipe, backbone):
    limited = read_lengths(with_data(recipe, limit=20), backbone("llama"))
    assert 20 <= limited.training + limited.validation < 24  # whole prompts
    absent = {"train": "nowhere.csv", "folds": 4, "calibration": 0.1, "holdout": 0.1}
    for limit, count in ((None, ARENA), (1000, 1000)):
        battles = read_lengths(with_data(recipe, **absent, limit=limit), backbone("llama"))
        assert battles.validation == round(0.2 * count)
        assert battles.training + battles.validation == round(0.8 * count)


def test_what_cannot_be_dealt_is_said(recipe, backbone):
    for keys in ({"folds": 40}, {"train": "nowhere.csv", "folds": 0}):
        with pytest.raises(InputError, match=r"data\.folds: "):
            read_lengths(with_data(recipe, **keys), backbone("llama"))
