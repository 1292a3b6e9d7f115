import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, write_csv

from rewardmodel.battles import OUTCOMES, TEACHER_COLUMNS, outcomes, swap, teacher_probabilities, with_column
from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.data.teacher import check_teacher, teacher_share, with_soft_outcomes, with_teacher
from rewardmodel.errors import InputError
from rewardmodel.predictions import PROBABILITIES, SEEN_COLUMN, build_predictions, predicted, write_predictions


def soft(count, seed=0):
    return np.random.default_rng(seed).dirichlet([1, 1, 1], count)


@pytest.fixture
def unlabelled(frame):
    return read_battles(frame.drop(columns=list(OUTCOMES)))


@pytest.fixture
def predictions(unlabelled, tmp_path):
    """Return a function that writes a teacher's predictions, changed, and returns the path."""

    def write(change=lambda table: table):
        table = build_predictions(unlabelled, soft(len(unlabelled))).assign(**{SEEN_COLUMN: False})
        write_predictions(change(table), tmp_path / "teacher.parquet")
        return tmp_path / "teacher.parquet"

    return write


def test_battles_get_what_the_teacher_states_whatever_the_order_of_its_rows(unlabelled, predictions):
    path = predictions(lambda table: table.sample(frac=1, random_state=0))
    battles = with_teacher(unlabelled, path)
    np.testing.assert_allclose(teacher_probabilities(battles), soft(len(battles)), atol=1e-12)
    assert battles["id"][:] == unlabelled["id"][:]
    assert np.isnan(outcomes(battles)).all()


def test_ids_are_compared_without_the_name_of_their_source(unlabelled, predictions):
    names = np.array([f"extra/{name}" for name in unlabelled["id"]], dtype=object)
    battles = with_teacher(with_column(unlabelled, "id", names), predictions(), "extra/")
    np.testing.assert_allclose(teacher_probabilities(battles), soft(len(battles)), atol=1e-12)


REFUSED = {
    "seen": (
        lambda table: table.assign(**{SEEN_COLUMN: table["id"].isin(["0030", "0031"])}),
        r"trained on the prompts or responses of 2 of 48 battles \(column 'seen', first '0030'\); predict with a k",
    ),
    "missing": (lambda table: table.drop(index=[7, 9]), "no prediction of battle '0013'; predict the whole file again"),
    "no provenance": (lambda table: table.drop(columns=SEEN_COLUMN), "column 'seen' is missing"),
    "another file": (
        lambda table: table.assign(response_b_chars=table["response_b_chars"] + 1),
        "battle '0000': its texts have other lengths than in the predictions; predict this file",
    ),
    "twice": (lambda table: pd.concat([table, table[3:4]]), "id '0003' occurs twice"),
    "no number": (
        lambda table: table.assign(p_tie=[np.nan, *table["p_tie"][1:]]),
        "row 1, columns teacher_model_a, teacher_model_b, teacher_tie: .*nan are not probabilities",
    ),
    "no probabilities": (lambda table: table.assign(p_tie=2.0), "are not probabilities that sum to 1; predict the"),
    "no predictions": (lambda table: table[["id"]], "column 'group' is missing; give a predictions.parquet"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_predictions_that_cannot_teach_are_refused_in_one_line(fault, unlabelled, predictions):
    change, message = REFUSED[fault]
    path = predictions(change)
    with pytest.raises(InputError, match=message) as caught:
        with_teacher(unlabelled, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_teacher_that_is_not_there_is_refused(unlabelled, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.parquet: cannot be read as predictions"):
        with_teacher(unlabelled, tmp_path / "nowhere.parquet")


def test_sources_are_read_with_their_teachers(frame, predictions, tmp_path):
    hard = write_csv(battle_frame(4, seed=3), tmp_path / "hard.csv")
    alone = write_csv(frame.drop(columns=list(OUTCOMES)), tmp_path / "alone.csv")
    battles = read_battles([str(hard), Source(str(alone), teacher=str(predictions()), limit=10)])
    assert len(battles) == 16 + 12  # whole prompts
    assert np.isnan(teacher_probabilities(battles)[:16]).all()
    place = [int(name[-4:-1]) * 4 + int(name[-1]) for name in battles["id"][16:]]
    np.testing.assert_allclose(teacher_probabilities(battles)[16:], soft(48)[place], atol=1e-12)
    assert np.isnan(outcomes(battles)[16:]).all()
    assert not np.isnan(outcomes(battles)[:16]).any()


def test_battles_to_predict_need_no_teacher(frame, predictions, tmp_path):
    path = write_csv(frame, tmp_path / "test.csv")
    with pytest.raises(InputError, match=r"test\.csv: teacher: used in training only"):
        read_battles(Source(str(path), teacher=str(predictions())), role="test")


def test_the_teacher_stands_for_outcomes_only_where_there_are_none(unlabelled, predictions, frame):
    battles = with_soft_outcomes(with_teacher(unlabelled, predictions()))
    np.testing.assert_array_equal(outcomes(battles), teacher_probabilities(battles))
    votes = read_battles(frame)
    assert with_soft_outcomes(votes) is votes
    both = with_soft_outcomes(with_teacher(votes, predictions()))
    np.testing.assert_array_equal(outcomes(both), outcomes(votes))
    swapped = with_soft_outcomes(swap(with_teacher(unlabelled, predictions())))
    np.testing.assert_array_equal(outcomes(swapped), outcomes(battles)[:, [1, 0, 2]])


def test_separate_objectives_mix_votes_and_teacher_by_their_weights(predictions, frame, unlabelled):
    votes = read_battles(frame)
    both = with_teacher(votes, predictions())
    share = teacher_share(weight_votes=1.0, weight_teacher=3.0)
    assert share == 0.75
    found = outcomes(with_soft_outcomes(both, share))
    np.testing.assert_allclose(found, outcomes(votes) / 4 + teacher_probabilities(both) * 3 / 4)
    np.testing.assert_array_equal(outcomes(with_soft_outcomes(both, 1.0)), teacher_probabilities(both))
    assert with_soft_outcomes(votes, share) is votes
    alone = with_teacher(unlabelled, predictions())
    np.testing.assert_array_equal(outcomes(with_soft_outcomes(alone, share)), teacher_probabilities(alone))
    check_teacher(both, "davidson", reads_teacher=False, share=share)
    with pytest.raises(InputError, match=r"^objective\.weight_votes, objective\.weight_teacher: both are 0"):
        teacher_share(0.0, 0.0)


def test_a_teacher_is_there_for_those_objectives_that_read_it(unlabelled, predictions, frame):
    votes, alone = read_battles(frame), with_teacher(unlabelled, predictions())
    both = with_teacher(votes, predictions())
    check_teacher(both, "distillation", reads_teacher=True)
    check_teacher(alone, "distillation", reads_teacher=True)
    check_teacher(alone, "cross_entropy", reads_teacher=False)
    check_teacher(votes, "cross_entropy", reads_teacher=False)
    with pytest.raises(
        InputError, match=r"^objective\.name: distillation learns from a teacher.*data\.train\[i\]\.teacher"
    ):
        check_teacher(votes, "distillation", reads_teacher=True)
    with pytest.raises(InputError, match=r"^data\.train: the battles of data frame have outcomes and a teacher, but "):
        check_teacher(both, "cross_entropy", reads_teacher=False)


def test_tables_of_a_data_set_keep_their_teacher_among_other_sources(unlabelled, predictions, frame):
    battles = with_teacher(unlabelled, predictions())
    together = read_battles([battles, frame])
    np.testing.assert_array_equal(teacher_probabilities(together)[:48], teacher_probabilities(battles))
    assert together["id"][0] != battles["id"][0]
    assert all(name in together.features for name in TEACHER_COLUMNS)


def test_what_the_table_states_is_what_teaches(unlabelled, predictions):
    table = pd.read_parquet(predictions())
    assert set(PROBABILITIES) <= set(table)
    np.testing.assert_array_equal(teacher_probabilities(with_teacher(unlabelled, predictions())), predicted(table))
