import dataclasses

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, write_csv

from rewardmodel.battles import OUTCOMES, outcomes, teacher_probabilities
from rewardmodel.config.schema import DataConfig, Source
from rewardmodel.data.formats import read_battles
from rewardmodel.data.splits import (
    Parts,
    find_seen_battles,
    fingerprint_parts,
    load_battles,
    split,
    write_training_keys,
)
from rewardmodel.errors import InputError
from rewardmodel.predictions import build_predictions, write_predictions
from rewardmodel.run_folder import RunFolder


@pytest.fixture
def data(recipe) -> DataConfig:
    return recipe.data


def parts_of(data, battles=None, **keys) -> Parts:
    data = dataclasses.replace(data, **keys)
    return split(load_battles(data, battles), data.fold)


def test_whole_prompts_and_one_fold_are_held_out(data):
    parts = parts_of(data)
    assert [len(part) for part in parts] == [36, 12, 0, 0]
    assert not set(parts.training["group"]) & set(parts.validation["group"])
    assert set(parts.validation["fold"]) == {0}


def test_every_battle_is_in_one_part(data, frame):
    parts = parts_of(data, folds=2, calibration=0.25, holdout=0.25)
    ids = [name for part in parts for name in part["id"]]
    assert sorted(ids) == sorted(frame["id"])
    assert [len(part) for part in parts] == [12] * 4


def test_no_prompt_is_in_two_parts(data):
    groups = [set(part["group"]) for part in parts_of(data, folds=2, calibration=0.25, holdout=0.25)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12


def test_calibration_and_holdout_do_not_depend_on_the_fold(data):
    first, second = (parts_of(data, folds=2, fold=fold, calibration=0.25, holdout=0.25) for fold in (0, 1))
    assert first.calibration["id"][:] == second.calibration["id"][:]
    assert first.holdout["id"][:] == second.holdout["id"][:]
    assert first.validation["id"][:] == second.training["id"][:]


def test_a_source_that_only_trains_is_never_held_out(data, tmp_path):
    extra = battle_frame(30, seed=5)
    extra["prompt"] = extra["prompt"].str.replace("question", "riddle")
    for name in ("response_a", "response_b"):
        extra[name] = extra[name].str.replace("answer", "solution of this riddle, at some length, for all to read,")
    extra.to_csv(tmp_path / "extra.csv", index=False)
    parts = parts_of(data, train=[data.train, Source(str(tmp_path / "extra.csv"), validation=False)])
    assert [len(part) for part in parts] == [36 + 120, 12, 0, 0]
    assert set(parts.validation["source"]) == {"train"}


def test_a_battle_that_only_trains_leaves_with_the_held_out_prompt_it_shares_and_is_never_judged(data, frame, tmp_path):
    frame.to_csv(tmp_path / "again.csv", index=False)
    sources = [data.train, Source(str(tmp_path / "again.csv"), validation=False)]
    for fold in range(4):
        parts = parts_of(data, train=sources, fold=fold)
        assert [len(part) for part in parts] == [72, 12, 0, 0]
        assert set(parts.validation["source"]) == {"train"}
        assert not set(parts.training["group"]) & set(parts.validation["group"])
    parts = parts_of(data, train=sources, folds=2, calibration=0.25, holdout=0.25)
    assert [len(part) for part in parts] == [24, 12, 12, 12]


def test_dealing_again_what_was_dealt_changes_nothing(data, frame, tmp_path):
    frame.to_csv(tmp_path / "again.csv", index=False)
    sources = [data.train, Source(str(tmp_path / "again.csv"), validation=False)]
    data = dataclasses.replace(data, train=sources, folds=2, calibration=0.25, holdout=0.25)
    once = load_battles(data)
    assert load_battles(data, once)["fold"][:] == once["fold"][:]


def test_a_limit_keeps_whole_prompts(data):
    parts = parts_of(data, limit=20)
    assert 20 <= len(parts.training) + len(parts.validation) < 24


def test_unlabelled_battles_are_refused(data, frame):
    unlabelled = frame.drop(columns=[name for name in frame if name.startswith("winner")])
    with pytest.raises(InputError, match="has no outcomes"):
        load_battles(data, unlabelled)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fold": 4}, "data.fold: 4, but data.folds makes folds 0 to 3"),
        ({"fold": -1}, "data.fold: -1"),
        ({"limit": 0}, "data.limit: 0; give a positive number"),
        ({"calibration": 1.0}, "data.calibration: 1.0; give a share"),
        ({"calibration": 0.5, "holdout": 0.5}, "data.calibration: 0.5; give a share from 0 to 1 that leaves battles"),
        ({"holdout": -0.1}, "data.holdout: -0.1; give a share"),
        ({"holdout": 0.02}, "data.holdout: 0.02 of 48 battles is less than one prompt"),
        ({"seed": -1}, "data.seed: -1; give a number from 0"),
    ],
)
def test_what_cannot_be_dealt_is_refused(data, keys, message):
    with pytest.raises(InputError, match=message):
        parts_of(data, **keys)


def test_fingerprints_tell_the_parts_apart(data):
    prints = fingerprint_parts(parts_of(data))
    assert prints == fingerprint_parts(parts_of(data))
    assert prints["training"] != prints["validation"]
    assert prints != fingerprint_parts(parts_of(data, seed=1))


@pytest.mark.slow  # reads 50,000 real battles
def test_real_battles_of_all_sources_share_no_group_and_no_part_has_other_outcomes(real_data):
    sources = [str(real_data / "kaggle" / "train.csv"), *map(str, sorted((real_data / "battles").glob("*.parquet")))]
    parts = split(load_battles(DataConfig(train=sources, calibration=0.1, holdout=0.1)), 0)
    groups = [set(part["group"][:]) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups))
    whole = np.concatenate([outcomes(part) for part in parts]).mean(axis=0)
    for part in parts:
        assert np.abs(outcomes(part).mean(axis=0) - whole).max() < 0.02


@pytest.fixture
def taught_source(frame, tmp_path):
    """Return a source of unlabelled battles with a teacher: 12 of prompts that the recipe has, 8 of its own."""
    again, new = frame.head(12).assign(id=[f"again{n}" for n in range(12)]), battle_frame(2, seed=5)
    new["prompt"] = new["prompt"].str.replace("question", "riddle")
    unlabelled = pd.concat([again, new], ignore_index=True).drop(columns=list(OUTCOMES))
    path = write_csv(unlabelled, tmp_path / "unlabelled.csv")
    battles = read_battles(str(path))
    table = build_predictions(battles, np.tile([0.5, 0.3, 0.2], (20, 1))).assign(seen=False)
    write_predictions(table, tmp_path / "soft.parquet")
    return Source(str(path), teacher=str(tmp_path / "soft.parquet"))


def test_battles_without_votes_only_train_and_leave_with_the_held_out_prompt_they_share(data, taught_source):
    for fold in range(4):
        parts = parts_of(data, train=[data.train, taught_source], fold=fold)
        assert set(parts.validation["source"]) == {"train"}
        assert len(parts.validation) == 12
        assert not np.isnan(outcomes(parts.validation)).any()
        alone = np.isnan(outcomes(parts.training)).any(axis=1)
        held_out = len({name for name in parts.validation["id"] if int(name.split("/")[1][:3]) < 3})
        assert alone.sum() == 20 - held_out
        np.testing.assert_allclose(
            teacher_probabilities(parts.training)[alone], np.tile([0.5, 0.3, 0.2], (alone.sum(), 1))
        )
        assert not set(parts.training["group"]) & set(parts.validation["group"])


def test_labelled_battles_are_dealt_as_without_the_others(data, taught_source):
    alone, together = load_battles(data), load_battles(dataclasses.replace(data, train=[data.train, taught_source]))
    assert together["fold"][: len(alone)] == alone["fold"][:]
    assert max(together["fold"][len(alone) :]) < 0


def test_validation_needs_battles_with_outcomes_of_their_own(data, taught_source):
    with pytest.raises(InputError, match=r"^data\.train: no battle has an outcome, so there is nothing to validate on"):
        parts_of(data, train=taught_source)


def test_all_folds_in_turn_validate_every_battle_and_train_on_all_that_train(data):
    data = dataclasses.replace(data, folds=2, calibration=0.25, holdout=0.25)
    battles = load_battles(data)
    every, folds = split(battles, None), [split(battles, fold) for fold in (0, 1)]
    assert sorted(every.validation["id"]) == sorted(name for one in folds for name in one.validation["id"])
    assert every.calibration["id"][:] == folds[0].calibration["id"][:]
    assert fingerprint_parts(every) != fingerprint_parts(folds[0])


def test_a_run_knows_the_groups_again_that_it_trained_on(data, tmp_path):
    battles = load_battles(data)
    runs = [tmp_path / str(fold) for fold in range(4)]
    for fold, run in enumerate(runs):
        write_training_keys(run, split(battles, fold).training)
    keys = np.load(RunFolder(runs[0]).training_keys)
    assert keys.dtype == np.uint64
    assert (np.diff(keys) > 0).all()
    fold = np.array(battles["fold"][:])
    np.testing.assert_array_equal(find_seen_battles(runs, battles), fold != np.arange(4)[:, None])
    RunFolder(runs[1]).training_keys.unlink()
    assert find_seen_battles(runs, battles) is None


def test_pairs_that_were_judged_with_different_winners_are_counted(data, frame, caplog):
    again = (
        frame.iloc[:2].assign(id=["x", "y"]).rename(columns={"response_a": "response_b", "response_b": "response_a"})
    )
    again[["winner_model_a", "winner_model_b", "winner_tie"]] = [[1, 0, 0], [1, 0, 0]]
    before = frame.assign(winner_model_a=1, winner_model_b=0, winner_tie=0)
    load_battles(data, before)
    assert not any("judged several times" in line for line in caplog.messages)
    load_battles(data, pd.concat([before, again]))
    [line] = [line for line in caplog.messages if "judged several times" in line]
    assert line.startswith("judged several times, with different winners: 2 pairs of responses, in 4 battles, like ")
