import csv

import numpy as np
import pandas as pd
import pytest
from builders import from_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES, swap
from rewardmodel.errors import InputError
from rewardmodel.predictions import (
    PROBABILITIES,
    REWARDS,
    apply_rules,
    average_probabilities,
    average_tables,
    build_predictions,
    check_sample,
    has_both_orders,
    predicted,
    read_labels,
    read_predictions,
    rule_probabilities,
    true_outcomes,
    write_predictions,
    write_submission,
)

SUBMISSION_HEADER = "id,winner_model_a,winner_model_b,winner_tie"
IDS = ["007", "1e5", "a,b", "x"]


def battles_of(ids=IDS, labelled=True):
    columns = {"id": ids, **{name: [["text"]] * len(ids) for name in ("prompt", "response_a", "response_b")}}
    if labelled:
        columns |= dict(zip(OUTCOMES, np.eye(3)[np.arange(len(ids)) % 3].T.tolist(), strict=True))
    return from_columns(columns | {"group": list(range(10, 10 + len(ids)))}, "made")


def probabilities(count, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).dirichlet([1, 1, 1], count).astype(dtype)


def table_of(ids=IDS):
    return build_predictions(battles_of(ids), probabilities(len(ids), 1), probabilities(len(ids), 2))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 20), orders=st.integers(1, 4))
def test_average_is_float64_rows_that_sum_to_1(seed, count, orders):
    mean = average_probabilities([probabilities(count, seed + order) for order in range(orders)])
    assert mean.dtype == np.float64
    assert mean.shape == (count, 3)
    np.testing.assert_allclose(mean.sum(axis=1), 1, atol=1e-15)


def test_average_is_the_mean():
    first, second = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.75, 0.0]])
    assert average_probabilities([first, second]).tolist() == [[0.375, 0.5, 0.125]]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_average_does_not_depend_on_which_order_comes_first(seed):
    first, second = probabilities(5, seed), probabilities(5, seed + 1)
    np.testing.assert_array_equal(average_probabilities([first, second]), average_probabilities([second, first]))


def test_average_of_half_precision_is_computed_in_double():
    half = np.array([[1e-4, 0.5, 0.5]], dtype=np.float16)
    assert average_probabilities([half, half])[0, 0] == pytest.approx(
        float(half[0, 0]) / half[0].astype(float).sum(), rel=1e-12
    )


def test_table_has_its_columns_in_order():
    start = ["id", "group", "source", "model_a", "model_b", *OUTCOMES, *PROBABILITIES]
    orders = [[f"{order}_{name}" for name in PROBABILITIES] for order in ("ab", "ba")]
    texts = {"turns", "script", "prompt_chars", "response_a_chars", "response_b_chars"}
    columns = list(table_of())
    assert columns[: len(start) + 6] == [*start, *orders[0], *orders[1]]
    assert texts <= set(columns[len(start) + 6 :]) <= texts | {"prompt", "response_a", "response_b"}
    assert not set(orders[1]) & set(build_predictions(battles_of(), probabilities(4), None))


def test_a_table_tells_lengths_turns_and_script_and_the_beginnings_of_labelled_texts():
    texts = {
        "prompt": [["hi", "more"], ["猫"]],
        "response_a": [["a" * 2000, "b"], ["c"]],
        "response_b": [["", ""], ["d"]],
    }
    battles = from_columns({"id": ["1", "2"], **texts, **dict.fromkeys(OUTCOMES, [1 / 3] * 2)}, "made")
    table = build_predictions(battles, probabilities(2), None)
    assert table["turns"].tolist() == [2, 1]
    assert table["script"].tolist() == ["Latin", "Han"]
    assert table["response_a_chars"].tolist() == [2001, 1]
    assert table["response_a"].tolist() == ["a" * 1500, "c"]
    assert table["prompt"].tolist() == ["hi\n\nmore", "猫"]
    unlabelled = from_columns({"id": ["1", "2"], **texts}, "made")
    assert "prompt" not in build_predictions(unlabelled, probabilities(2), None)


def test_table_keeps_rows_ids_groups_and_outcomes_of_the_battles():
    table = table_of()
    assert table["id"].tolist() == IDS
    assert table["group"].tolist() == [10, 11, 12, 13]
    assert true_outcomes(table).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_table_of_unlabelled_battles_has_null_outcomes():
    table = build_predictions(battles_of(labelled=False), probabilities(4), None)
    assert table[list(OUTCOMES)].isna().all(axis=None)
    assert true_outcomes(table).dtype == np.float64


def test_table_predicts_the_average_of_both_orders():
    first, second = probabilities(4, 1), probabilities(4, 2)
    table = build_predictions(battles_of(), first, second)
    np.testing.assert_array_equal(predicted(table), average_probabilities([first, second]))
    np.testing.assert_array_equal(predicted(table, "ab"), first)
    np.testing.assert_array_equal(predicted(table, "ba"), second)


def test_table_of_one_order_predicts_that_order():
    first = probabilities(4, dtype=np.float64)
    np.testing.assert_allclose(predicted(build_predictions(battles_of(), first, None)), first, rtol=1e-15)


def test_predictions_survive_parquet(tmp_path):
    path = tmp_path / "run" / "predictions.parquet"
    write_predictions(table_of(), path)
    pd.testing.assert_frame_equal(read_predictions(path), table_of())
    assert [file.name for file in path.parent.iterdir()] == ["predictions.parquet"]


@pytest.mark.parametrize("content", [None, b"", b"id,group\n1,2\n"], ids=["missing", "empty", "CSV"])
def test_file_that_is_no_parquet_is_refused(tmp_path, content):
    path = tmp_path / "predictions.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as predictions")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["id", "group", "winner_tie", "p_model_b"])
def test_parquet_that_is_no_predictions_table_is_refused_with_the_column(tmp_path, column):
    path = tmp_path / "other.parquet"
    table_of().drop(columns=column).to_parquet(path)
    with pytest.raises(InputError, match=f"column '{column}' is missing"):
        read_predictions(path)


def test_submission_is_the_id_and_the_three_outcomes_as_given(tmp_path):
    path = tmp_path / "submission.csv"
    table = table_of()
    write_submission(table, path)
    assert path.read_text().splitlines()[0] == SUBMISSION_HEADER
    header, *rows = rows_of(path)
    assert header == SUBMISSION_HEADER.split(",")
    assert [row[0] for row in rows] == IDS
    np.testing.assert_array_equal(np.array([row[1:] for row in rows], float), predicted(table))


def test_submission_is_exactly_these_bytes(tmp_path):
    exact = np.array([[0.5, 0.25, 0.25], [0, 1, 0]])
    write_submission(build_predictions(battles_of(["007", "8"]), exact, None), tmp_path / "submission.csv")
    expected = f"{SUBMISSION_HEADER}\n007,0.5,0.25,0.25\n8,0.0,1.0,0.0\n"
    assert (tmp_path / "submission.csv").read_bytes() == expected.encode()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_submission_rows_sum_to_1_as_they_are_written(tmp_path_factory, seed):
    path = tmp_path_factory.getbasetemp() / "submission.csv"
    ids = [str(row) for row in range(20)]
    write_submission(build_predictions(battles_of(ids), probabilities(20, seed), probabilities(20, seed + 1)), path)
    written = pd.read_csv(path)[list(OUTCOMES)].to_numpy()
    np.testing.assert_allclose(written.sum(axis=1), 1, atol=1e-9)


def test_submission_out_of_a_parquet_file_is_the_same(tmp_path):
    write_predictions(table_of(), tmp_path / "predictions.parquet")
    write_submission(read_predictions(tmp_path / "predictions.parquet"), tmp_path / "second.csv")
    write_submission(table_of(), tmp_path / "first.csv")
    assert (tmp_path / "second.csv").read_bytes() == (tmp_path / "first.csv").read_bytes()


def sample_of(tmp_path, ids, header=SUBMISSION_HEADER):
    path = tmp_path / "sample_submission.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *([name, *["0.3"] * header.count(",")] for name in ids)])
    return path


@pytest.mark.parametrize("ids", [IDS, IDS[::-1]], ids=["same order", "other order"])
def test_sample_with_the_ids_in_any_order_is_taken(tmp_path, ids):
    check_sample(sample_of(tmp_path, ids), IDS)
    check_sample(sample_of(tmp_path, ids), battles_of()["id"])


def test_ids_of_the_sample_are_text_even_where_all_are_numbers(tmp_path):
    check_sample(sample_of(tmp_path, ["007", "8"]), ["007", "8"])
    with pytest.raises(InputError, match="id '007' is not among the battles to predict"):
        check_sample(sample_of(tmp_path, ["007", "8"]), ["7", "8"])


BAD_SAMPLES = {
    "an id more": (SUBMISSION_HEADER, [*IDS, "new"], "id 'new' is not among the battles to predict"),
    "an id less": (SUBMISSION_HEADER, IDS[1:], "id '007' is missing, but is to be predicted"),
    "an id without its zeros": (
        SUBMISSION_HEADER,
        ["7", *IDS[1:]],
        "id '007' is missing, but is to be predicted",
    ),
    "a column less": ("id,winner_model_a,winner_model_b", IDS, "columns "),
    "another order": ("id,winner_model_b,winner_model_a,winner_tie", IDS, "columns "),
    "another column": ("id,winner_model_a,winner_model_b,tie", IDS, "columns "),
    "a column more": (f"{SUBMISSION_HEADER},note", IDS, "columns "),
}


@pytest.mark.parametrize(("header", "ids", "reason"), BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_sample_submission_of_other_columns_or_ids_is_refused_and_nothing_written(tmp_path, header, ids, reason):
    sample = sample_of(tmp_path, ids, header)
    with pytest.raises(InputError) as caught:
        check_sample(sample, IDS)
    assert str(caught.value).startswith(f"{sample}: {reason}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [sample]


def test_a_sample_is_left_as_it_is_whether_it_is_taken_or_refused(tmp_path):
    sample = sample_of(tmp_path, IDS)
    before = sample.read_bytes()
    check_sample(sample, IDS)
    with pytest.raises(InputError):
        check_sample(sample, ["1", "2"])
    assert sample.read_bytes() == before


def test_submission_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    def disk_full(_, path, **__):
        path.write_text("id,")
        raise OSError("no space left on device")

    write_submission(table_of(), tmp_path / "submission.csv")
    before = (tmp_path / "submission.csv").read_bytes()
    monkeypatch.setattr(pd.DataFrame, "to_csv", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_submission(table_of(["1", "2"]), tmp_path / "submission.csv")
    assert (tmp_path / "submission.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["submission.csv"]


def labels_of(tmp_path, *winners):
    path = tmp_path / "sample_submission.csv"
    path.write_text("id,winner\n" + "".join(f"{number},{winner}\n" for number, winner in enumerate(winners)))
    return path


@pytest.mark.parametrize(
    ("winners", "labels", "written"),
    [
        (["model_a", "model_a"], ("model_a", "model_b"), ["model_b", "model_a"]),
        (["model_b", ""], ("model_a", "model_b"), ["model_b", "model_a"]),
        (["model_a", "tie"], ("model_a", "model_b", "tie"), ["tie", "model_a"]),
    ],
)
def test_a_sample_of_winners_is_answered_with_the_likeliest_of_its_labels(tmp_path, winners, labels, written):
    sample = labels_of(tmp_path, *winners)
    check_sample(sample, ["0", "1"])
    assert read_labels(sample) == labels
    table = build_predictions(battles_of(["0", "1"]), np.array([[0.1, 0.3, 0.6], [0.5, 0.1, 0.4]]))
    write_submission(table, tmp_path / "submission.csv", read_labels(sample))
    assert rows_of(tmp_path / "submission.csv") == [["id", "winner"], ["0", written[0]], ["1", written[1]]]


def test_a_sample_of_probabilities_has_no_labels_and_other_labels_are_refused(tmp_path):
    assert read_labels(sample_of(tmp_path, IDS)) is None
    with pytest.raises(InputError, match="winner 'A' is not one of model_a, model_b, tie"):
        check_sample(labels_of(tmp_path, "A"), ["0"])


def test_a_submission_of_battles_that_a_coin_ordered_says_what_was_chosen(tmp_path):
    battles = battles_of(["0", "1", "2"])  # A, B, tie
    table = build_predictions(battles, np.array([[0.1, 0.3, 0.6], [0.5, 0.1, 0.4], [0.25, 0.25, 0.5]]))
    write_submission(table, tmp_path / "submission.csv", tossed=True)
    written = pd.read_csv(tmp_path / "submission.csv", dtype={"id": str})
    assert list(written) == ["id", *OUTCOMES, "chosen", "p_chosen"]
    assert written["chosen"].tolist() == ["model_a", "model_b", "tie"]
    assert written["p_chosen"].tolist() == [0.1, 0.1, 0.5]
    table.loc[0, list(OUTCOMES)] = np.nan
    write_submission(table, tmp_path / "submission.csv", tossed=True)
    unknown = pd.read_csv(tmp_path / "submission.csv", keep_default_na=False).iloc[0]
    assert (unknown["chosen"], unknown["p_chosen"]) == ("", "")


def test_rewards_are_columns_and_their_mean_is_that_of_several_models():
    battles, shares = battles_of(["0", "1"]), np.full((2, 3), 1 / 3)
    tables = [build_predictions(battles, shares, rewards=np.array([[1, 2], [3, 4]]) * scale) for scale in (1.0, 3.0)]
    assert tables[0][list(REWARDS)].to_numpy().tolist() == [[1, 2], [3, 4]]
    assert average_tables(tables, [1, 1])[list(REWARDS)].to_numpy().tolist() == [[2, 4], [6, 8]]
    without = build_predictions(battles, shares)
    assert not {*REWARDS} & {*without}
    assert not {*REWARDS} & {*average_tables([tables[0], without], [1, 1])}


@pytest.mark.parametrize("content", [None, b"", b"id\n\xff\n"], ids=["missing", "empty", "not UTF-8"])
def test_sample_submission_that_cannot_be_read_is_refused(tmp_path, content):
    sample = tmp_path / "sample_submission.csv"
    if content is not None:
        sample.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as a sample submission"):
        check_sample(sample, IDS)


def test_submission_of_reordered_rows_keeps_each_id_with_its_probabilities(tmp_path):
    table = table_of()
    write_submission(table.iloc[::-1], tmp_path / "submission.csv")
    written = pd.read_csv(tmp_path / "submission.csv", dtype=str).set_index("id")
    np.testing.assert_array_equal(written.loc[IDS].to_numpy(float), predicted(table))


def test_id_that_pandas_takes_for_missing_is_an_id(tmp_path):
    check_sample(sample_of(tmp_path, ["NA", "1"]), ["NA", "1"])
    write_submission(table_of(["NA", "1"]), tmp_path / "submission.csv")
    assert [row[0] for row in rows_of(tmp_path / "submission.csv")] == ["id", "NA", "1"]


def numbered(probabilities, rows, **columns):
    """Return predictions of one order, their index the battle's number."""
    table = pd.DataFrame({"id": [f"id{row}" for row in rows], "group": rows, **columns}, index=rows)
    for prefix in ("", "ab_"):
        table[[prefix + name for name in PROBABILITIES]] = np.asarray(probabilities, np.float64)
    return table


def test_the_mean_of_tables_is_the_weighted_one_over_those_that_have_a_battle():
    first = numbered([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], [0, 2], ba_p_tie=0.5)
    second = numbered([[0.3, 0.3, 0.4], [0.1, 0.8, 0.1]], [2, 1])
    table = average_tables([first, second], [3, 1])
    assert table["id"].tolist() == ["id0", "id1", "id2"]
    expected = [[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.225, 0.225, 0.55]]
    for order in ("", "ab"):
        np.testing.assert_allclose(predicted(table, order), expected, atol=1e-12)
    assert "ba_p_tie" not in table
    assert average_tables([first], [7]) is first


def half(seed=2):
    """Return predictions of four battles, the middle two of them in one order alone."""
    ba = probabilities(4, seed)
    ba[1:3] = np.nan
    return build_predictions(battles_of(), probabilities(4, 1), ba)


def test_a_battle_without_the_second_order_is_predicted_by_the_first():
    table = half()
    assert has_both_orders(table).tolist() == [True, False, False, True]
    ab, ba = predicted(table, "ab"), predicted(table, "ba")
    np.testing.assert_array_equal(predicted(table)[1:3], average_probabilities([ab[1:3]]))
    np.testing.assert_array_equal(predicted(table)[[0, 3]], average_probabilities([ab, ba])[[0, 3]])
    one = build_predictions(battles_of(), probabilities(4, 1))
    assert not has_both_orders(one).any()
    np.testing.assert_array_equal(predicted(table)[1:3], predicted(one)[1:3])


def test_the_mean_has_an_order_of_a_battle_where_all_have_it():
    first, second = half(), table_of()
    table = average_tables([first, second], [1.0, 3.0])
    assert has_both_orders(table).tolist() == [True, False, False, True]
    np.testing.assert_allclose(predicted(table), predicted(first) / 4 + predicted(second) * 3 / 4)
    expected = predicted(first, "ba") / 4 + predicted(second, "ba") * 3 / 4
    np.testing.assert_allclose(predicted(table, "ba"), expected)


PAIRS = [
    (["yes"], ["yes"]), (["yes "], ["\nyes"]), (["yes"], ["Yes"]), ([""], [" \n"]),
    (["yes"], [" "]), (["", ""], ["a", ""]), (["yes", ""], ["no", "no"]),
]  # fmt: skip
"""Responses that are the same, but for white space, but for a capital; both empty; B empty; A empty; neither."""

TIE, A, B, NONE = [0.05, 0.05, 0.9], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [np.nan] * 3


def pairs():
    a, b = zip(*PAIRS, strict=True)
    prompt = [["?"] * len(turns) for turns in a]
    columns = {"id": [str(row) for row in range(len(a))], "prompt": prompt, "response_a": a, "response_b": b}
    return from_columns(columns, "made")


@pytest.mark.parametrize(
    ("same", "empty", "expected"),
    [
        (None, None, [NONE] * 7),
        (0.9, None, [TIE, TIE, NONE, TIE, NONE, NONE, NONE]),
        (None, 0.8, [NONE, NONE, NONE, NONE, A, B, NONE]),
        (0.9, 0.8, [TIE, TIE, NONE, TIE, A, B, NONE]),
    ],
)
def test_rules_speak_of_same_and_of_empty_responses(same, empty, expected):
    found = rule_probabilities(pairs(), same, empty)
    np.testing.assert_allclose(found, expected, atol=1e-15)
    np.testing.assert_array_equal(rule_probabilities(swap(pairs()), same, empty), found[:, [1, 0, 2]])


def test_rules_take_the_place_of_what_is_stated_in_the_end_alone(caplog):
    caplog.set_level("INFO", "rewardmodel")
    table = table_of()
    before = table.copy()
    found = apply_rules(table, np.array([NONE, TIE, NONE, A]))
    np.testing.assert_array_equal(predicted(found), [predicted(table)[0], TIE, predicted(table)[2], A])
    for order in ("ab", "ba"):
        np.testing.assert_array_equal(predicted(found, order), predicted(table, order))
    assert "2 of 4 battles are predicted by a rule" in caplog.text
    pd.testing.assert_frame_equal(table, before)
