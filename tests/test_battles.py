import json

import numpy as np
import pyarrow as pa
import pytest
from builders import from_columns
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import (
    AUGMENTATIONS,
    BATTLE_FEATURES,
    OUTCOMES,
    SCRIPTS,
    TEACHER_COLUMNS,
    build_table,
    count_characters,
    data_fingerprint,
    detect_scripts,
    is_labelled,
    outcomes,
    select_labelled,
    store,
    swap,
    swap_randomly,
    teacher_probabilities,
    validate,
    weights,
    with_column,
)
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError


def battles_of(count=3, **columns):
    """Return battles a, b, tie, a, b, ... whose every cell tells its row and side."""
    winners = np.eye(3)[np.arange(count) % 3]
    given = {
        "id": [f"id{row}" for row in range(count)],
        "prompt": [[f"prompt {row}", "and then?"] for row in range(count)],
        "response_a": [[f"first {row}", "x"] for row in range(count)],
        "response_b": [[f"second {row}", "y"] for row in range(count)],
        "model_a": [f"model-a{row}" for row in range(count)],
        "model_b": [f"model-b{row}" for row in range(count)],
        **dict(zip(OUTCOMES, winners.T.tolist(), strict=True)),
    }
    return from_columns(given | columns, "made")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
turns = st.tuples(texts, texts).map(list)
outcome = st.tuples(*[st.integers(0, 9)] * 3).filter(any).map(lambda shares: np.array(shares) / sum(shares))
rows = st.lists(st.tuples(turns, turns, turns, texts, texts, outcome), min_size=1, max_size=5)


def battles_drawn(drawn):
    names = ("prompt", "response_a", "response_b", "model_a", "model_b")
    columns = {name: [row[place] for row in drawn] for place, name in enumerate(names)}
    columns |= dict(zip(OUTCOMES, np.stack([row[5] for row in drawn]).T.tolist(), strict=True))
    return from_columns({"id": [str(row) for row in range(len(drawn))], **columns}, "drawn")


@settings(deadline=None, max_examples=30)
@given(rows)
def test_swap_twice_is_identity(drawn):
    battles = battles_drawn(drawn)
    assert swap(swap(battles)).to_dict() == battles.to_dict()


@settings(deadline=None, max_examples=30)
@given(rows)
def test_swap_exchanges_responses_models_and_outcomes_only(drawn):
    battles = battles_drawn(drawn)
    before, after = battles.to_dict(), swap(battles).to_dict()
    exchanged = ["response", "model", "winner_model"]
    for stem in exchanged:
        assert after[f"{stem}_a"] == before[f"{stem}_b"]
        assert after[f"{stem}_b"] == before[f"{stem}_a"]
    for name in before:
        if name.rpartition("_")[0] not in exchanged:
            assert after[name] == before[name]


def test_swap_keeps_columns_their_order_and_types():
    swapped = swap(battles_of())
    assert swapped.column_names == list(BATTLE_FEATURES)
    assert swapped.features == BATTLE_FEATURES


def test_swap_exchanges_outcome_columns_and_leaves_ties():
    assert outcomes(swap(battles_of())).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_swap_of_unlabelled_battles_stays_unlabelled():
    battles = battles_of(**{name: [None] * 3 for name in OUTCOMES})
    assert not is_labelled(swap(battles))


def test_swap_follows_selected_rows():
    picked = battles_of(6).select([4, 1])
    assert swap(picked)["response_a"][:] == [["second 4", "y"], ["second 1", "y"]]


def test_swap_randomly_keeps_rows_and_gives_each_as_it_is_or_swapped():
    battles = battles_of(60)
    thrown = swap_randomly(battles, seed=3)
    assert thrown["id"][:] == battles["id"][:]
    for row, as_given, swapped in zip(thrown, battles, swap(battles), strict=True):
        assert row in (as_given, swapped)


def test_swap_randomly_is_deterministic_by_seed():
    battles = battles_of(60)
    once, again, other = (swap_randomly(battles, seed)["model_a"][:] for seed in (1, 1, 2))
    assert once == again
    assert once != other


@pytest.mark.parametrize("seed", range(3))
def test_swap_randomly_swaps_about_half(seed):
    thrown = swap_randomly(battles_of(4000), seed)
    share = np.mean([model.startswith("model-b") for model in thrown["model_a"]])
    assert abs(share - 0.5) < 0.032  # four standard deviations of a fair coin


@pytest.mark.parametrize("name", ["none", "both"])
def test_only_random_augmentation_changes_battles(name):
    battles = battles_of(4)
    assert AUGMENTATIONS[name](battles, 0).to_dict() == battles.to_dict()
    assert AUGMENTATIONS["random"](battles, 0).to_dict() == swap_randomly(battles, 0).to_dict() != battles.to_dict()


def test_outcomes_are_float64_in_the_order_a_b_tie():
    array = outcomes(battles_of(4))
    assert array.dtype == np.float64
    assert array.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]


def test_outcomes_of_unlabelled_battles_are_nan():
    array = outcomes(battles_of(**{name: [None] * 3 for name in OUTCOMES}))
    assert array.shape == (3, 3)
    assert array.dtype == np.float64
    assert np.isnan(array).all()


def test_outcomes_do_not_depend_on_the_format_of_the_data_set():
    battles = battles_of()
    np.testing.assert_array_equal(outcomes(battles.with_format("numpy")), outcomes(battles))


def test_weights_are_float32_and_1_unless_given():
    assert weights(battles_of()).dtype == np.float32
    assert weights(battles_of()).tolist() == [1, 1, 1]
    assert weights(battles_of(weight=[0.5, 2, 0])).tolist() == [0.5, 2, 0]


def test_is_labelled_tells_battles_with_outcomes_from_those_without():
    assert is_labelled(battles_of())
    assert not is_labelled(battles_of(**{name: [None] * 3 for name in OUTCOMES}))
    assert not is_labelled(battles_of().select([]))


ROW = {"id": "1", "prompt": ["p"], "response_a": ["a"], "response_b": ["b"]}
"""The least that a battle has."""


def test_from_rows_fills_what_is_absent():
    assert build_table([ROW]).to_pylist() == [
        {
            **ROW,
            **{"model_a": "", "model_b": "", **dict.fromkeys([*OUTCOMES, *TEACHER_COLUMNS])},
            **{"weight": 1.0, "source": "", "group": -1, "fold": -1},
        }
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {name: [None] * 3 for name in OUTCOMES},
        {"winner_model_a": [0.2, 0, 0], "winner_model_b": [0.5, 1, 0], "winner_tie": [0.3, 0, 1]},
        {"winner_model_a": [0.9995, 0, 0], "winner_model_b": [0, 1, 0], "winner_tie": [0, 0, 1]},
    ],
    ids=["hard", "unlabelled", "soft", "within the tolerance"],
)
def test_validate_returns_good_battles_unchanged(columns):
    battles = battles_of(**columns)
    assert validate(battles, "file.csv") is battles


BAD = {
    "duplicate id": ({"id": ["x", "y", "x"]}, "row 3", ["column 'id'", "'x'", "row 1"]),
    "response_a turns": (
        {"response_a": [["1", "2"], ["1"], ["1", "2"]]},
        "row 2",
        ["column 'response_a'", "1 turn"],
    ),
    "response_b turns": (
        {"response_b": [["1", "2"]] * 2 + [["1"] * 3]},
        "row 3",
        ["column 'response_b'", "3 turns"],
    ),
    "sum above 1": ({"winner_model_a": [1.0, 0, 1]}, "row 3", [*OUTCOMES, "1, 0, 1"]),
    "sum below 1": ({"winner_model_b": [0.0, 0.99, 0]}, "row 2", [*OUTCOMES, "0, 0.99, 0"]),
    "negative": (
        {"winner_model_a": [1.0, -1, 0], "winner_tie": [0.0, 1, 1]},
        "row 2",
        [*OUTCOMES, "-1, 1, 1"],
    ),
    "NaN in one cell": (
        {"winner_tie": [0, float("nan"), 1]},
        "row 2",
        ["column 'winner_tie'", "missing, NaN or infinite"],
    ),
    "null in one cell": (
        {"winner_model_b": [0, 1, None]},
        "row 3",
        ["column 'winner_model_b'", "missing, NaN or infinite"],
    ),
    "null in one column": ({"winner_tie": [None] * 3}, "row 1", ["column 'winner_tie'", "missing, NaN or infinite"]),
    "infinite": (
        {"winner_model_a": [float("inf"), 0, 0]},
        "row 1",
        ["column 'winner_model_a'", "missing, NaN or infinite"],
    ),
}


@pytest.mark.parametrize(("columns", "row", "fragments"), BAD.values(), ids=BAD)
def test_validate_names_where_row_and_column(columns, row, fragments):
    with pytest.raises(InputError) as caught:
        validate(battles_of(**columns), "file.csv")
    message = str(caught.value)
    assert message.startswith(f"file.csv: {row}, ")
    assert all(fragment in message for fragment in fragments)
    assert "\n" not in message


def test_validate_names_the_first_bad_row_of_a_chunked_table():
    battles = concatenate_datasets([battles_of(4), swap(battles_of(4))])
    with pytest.raises(InputError, match=r"^here: row 5, column 'id': 'id0' was already used in row 1"):
        validate(battles, "here")


def test_validate_counts_rows_as_selected():
    battles = battles_of(4, winner_tie=[0.0, 0, 1, 1]).select([3, 0])
    with pytest.raises(InputError, match=r"^here: row 1, "):
        validate(battles, "here")


def test_validate_refuses_an_empty_table():
    with pytest.raises(InputError, match=r"^file.csv: no battles"):
        validate(Dataset.from_dict({name: [] for name in BATTLE_FEATURES}, features=BATTLE_FEATURES), "file.csv")


@pytest.mark.parametrize(
    "columns",
    [
        {"id": ["a", None, "b"]},
        {"prompt": [["1", "2"], None, ["1", "2"]]},
        {"response_a": [["1", "2"], ["1", None], ["1", "2"]]},
        {"prompt": [[]] * 3, "response_a": [[]] * 3, "response_b": [[]] * 3},
    ],
    ids=["null id", "null prompt", "null turn", "no turns"],
)
def test_validate_refuses_cells_that_later_stages_cannot_read(columns):
    with pytest.raises(InputError):
        validate(battles_of(**columns), "data set")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder of stored battles, not there yet."""
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "battles"


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def numbered(count):
    return [{**ROW, "id": str(number)} for number in range(count)]


def test_stored_battles_are_the_tables_one_after_the_other(cache):
    battles = store([build_table(numbered(5)[:2]), build_table(numbered(5)[2:])], "file")
    assert battles.to_list() == build_table(numbered(5)).to_pylist()
    assert battles.features == BATTLE_FEATURES


def test_stored_battles_are_one_file_named_by_the_fingerprint(cache):
    battles = store([build_table(numbered(2))], "file")
    assert [entry["filename"] for entry in battles.cache_files] == [str(cache / f"{battles._fingerprint}.arrow")]
    assert files_in(cache) == [f"{battles._fingerprint}.arrow"]


def test_same_battles_are_stored_once_and_have_one_fingerprint(cache):
    once, again = (store([build_table(numbered(3))], "file") for _ in range(2))
    assert once._fingerprint == again._fingerprint
    assert len(files_in(cache)) == 1


def test_other_battles_have_another_file_and_fingerprint(cache):
    some, more = (store([build_table(numbered(count))], "file") for count in (2, 3))
    assert some._fingerprint != more._fingerprint
    assert len(files_in(cache)) == 2


def test_same_battles_out_of_csv_and_parquet_are_stored_once(cache, tmp_path, frame):
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame.to_parquet(tmp_path / "train.parquet")
    csv, parquet = (read_battles(tmp_path / f"train.{ending}") for ending in ("csv", "parquet"))
    assert csv._fingerprint == parquet._fingerprint
    assert len(files_in(cache)) == 1


def test_battles_stay_readable_when_the_same_are_stored_again(cache):
    first = store([build_table(numbered(2))], "file")
    store([build_table(numbered(2))], "file")
    assert first["id"][:] == ["0", "1"]


def test_nothing_stays_of_battles_that_are_refused(cache):
    with pytest.raises(InputError, match=r"^file: row 2, column 'id'"):
        store([build_table([ROW, ROW])], "file")
    assert files_in(cache) == []


def test_nothing_stays_where_a_row_is_refused_on_the_way(cache):
    def tables():
        yield build_table(numbered(2))
        raise InputError("file: row 3: bad")

    with pytest.raises(InputError, match=r"^file: row 3: bad$"):
        store(tables(), "file")
    assert files_in(cache) == []


def test_nothing_stays_of_a_file_with_a_bad_row(cache, tmp_path, frame):
    frame.loc[30, "response_a"] = "[5]"
    frame.to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(InputError, match="row 31, column 'response_a'"):
        read_battles(tmp_path / "train.csv")
    assert files_in(cache) == []


def test_storing_no_battles_is_refused_and_leaves_nothing(cache):
    with pytest.raises(InputError, match=r"^file: no battles"):
        store([build_table([])], "file")
    assert files_in(cache) == []


def test_cache_folder_that_cannot_be_written_is_refused_in_one_line(cache, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("rewardmodel.battles.ArrowWriter", refuse)
    with pytest.raises(InputError) as caught:
        store([build_table(numbered(1))], "file")
    reason = (
        "cannot be written ([Errno 13] Permission denied); set REWARDMODEL_CACHE to a writable folder with free space"
    )
    assert str(caught.value) == f"{cache}: {reason}"


def test_cache_folder_that_is_a_file_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        store([build_table(numbered(1))], "file")


TAUGHT = {"teacher_model_a": [0.5, None, 0.1], "teacher_model_b": [0.3, None, 0.7], "teacher_tie": [0.2, None, 0.2]}
HALF_LABELLED = {
    "winner_model_a": [None, 1.0, None],
    "winner_model_b": [None, 0.0, None],
    "winner_tie": [None, 0.0, None],
}


def test_a_teachers_probabilities_are_nan_where_there_are_none_and_swap_with_the_responses():
    battles = battles_of(**TAUGHT)
    expected = np.array([[0.5, 0.3, 0.2], [np.nan] * 3, [0.1, 0.7, 0.2]])
    np.testing.assert_array_equal(teacher_probabilities(battles), expected)
    np.testing.assert_array_equal(teacher_probabilities(swap(battles)), expected[:, [1, 0, 2]])
    assert np.isnan(teacher_probabilities(battles_of())).all()


def test_battles_without_an_outcome_may_stand_among_others_if_a_teacher_predicted_them():
    battles = battles_of(**HALF_LABELLED, **TAUGHT)
    assert validate(battles, "mixed") is battles
    assert not is_labelled(battles)
    assert is_labelled(battles.select([1]))
    assert select_labelled(battles)["id"][:] == ["id1"]
    with pytest.raises(
        InputError, match=r"mixed: row 1, column 'winner_model_a': missing, NaN or infinite; label every battle"
    ):
        validate(battles_of(**HALF_LABELLED), "mixed")


@pytest.mark.parametrize(
    ("name", "values"),
    [("teacher_tie", [0.4, None, 0.2]), ("teacher_tie", [None] * 3), ("teacher_model_a", [-0.5, None, 0.1])],
)
def test_a_teachers_probabilities_that_are_none_are_refused(name, values):
    with pytest.raises(InputError, match=r"^soft: row 1, columns teacher_model_a, teacher_model_b, teacher_tie: "):
        validate(battles_of(**{**TAUGHT, name: values}), "soft")


def test_a_column_is_replaced_in_its_place():
    battles = with_column(battles_of(), "fold", np.array([3, 4, 5]))
    assert battles.features == BATTLE_FEATURES
    assert battles.column_names == list(BATTLE_FEATURES)
    assert battles["fold"][:] == [3, 4, 5]
    assert battles["id"][:] == battles_of()["id"][:]


def one_turn_battles(count=3, source="made", **columns):
    given = {
        "id": [str(row) for row in range(count)],
        "prompt": [[f"prompt {row}"] for row in range(count)],
        "response_a": [[f"first {row}"] for row in range(count)],
        "response_b": [[f"second {row} für 猫"] for row in range(count)],
        **dict(zip(OUTCOMES, [[1.0] * count, [0.0] * count, [0.0] * count], strict=True)),
    }
    return from_columns(given | columns, source)


def test_fingerprint_is_16_hexadecimal_digits():
    fingerprint = data_fingerprint(one_turn_battles())
    assert len(fingerprint) == 16
    int(fingerprint, 16)


def test_fingerprint_does_not_depend_on_source_group_or_fold():
    same = one_turn_battles(source="another file", group=[4, 5, 6], fold=[0, 1, 2])
    assert data_fingerprint(same) == data_fingerprint(one_turn_battles())


def test_fingerprint_does_not_depend_on_how_the_rows_are_stored():
    battles = one_turn_battles(2500)
    parts = concatenate_datasets([battles.select(range(700)), battles.select(range(700, 2500))])
    backwards = battles.select(range(2499, -1, -1)).select(range(2499, -1, -1))
    expected = data_fingerprint(battles)
    assert data_fingerprint(parts) == expected
    assert data_fingerprint(backwards) == expected
    assert data_fingerprint(battles.with_format("numpy")) == expected


CHANGES = {
    "id": {"id": ["0", "1", "3"]},
    "text": {"response_b": [["second 0 für 猫"], ["second 1 für 猫"], ["second 2 fur 猫"]]},
    "turns": {"prompt": [["prompt 0", ""], ["prompt 1"], ["prompt 2"]]},
    "outcome": {"winner_model_a": [1.0, 1, 0], "winner_tie": [0.0, 0, 1]},
    "no outcomes": {name: [None] * 3 for name in OUTCOMES},
}


@pytest.mark.parametrize("columns", CHANGES.values(), ids=CHANGES)
def test_fingerprint_changes_with_every_id_text_and_outcome(columns):
    assert data_fingerprint(one_turn_battles(**columns)) != data_fingerprint(one_turn_battles())


def test_fingerprint_changes_when_a_and_b_are_exchanged():
    assert data_fingerprint(swap(one_turn_battles())) != data_fingerprint(one_turn_battles())


def test_fingerprint_does_not_depend_on_the_order_of_columns():
    battles = one_turn_battles()
    reordered = battles.select_columns(battles.column_names[::-1])
    assert json.dumps(reordered[0], sort_keys=True) == json.dumps(battles[0], sort_keys=True)
    assert data_fingerprint(reordered) == data_fingerprint(battles)


def test_fingerprint_changes_with_a_teacher_and_only_with_one():
    teacher = dict(zip(TEACHER_COLUMNS, [[0.5] * 3, [0.3] * 3, [0.2] * 3], strict=True))
    other = {**teacher, TEACHER_COLUMNS[0]: [0.3] * 3, TEACHER_COLUMNS[1]: [0.5] * 3}
    assert data_fingerprint(one_turn_battles()) == "ca59d751e27c0b8a"  # as runs have it that know of no teachers
    assert len({data_fingerprint(one_turn_battles(**columns)) for columns in ({}, teacher, other)}) == 3


COLUMN = pa.array([["abc"], ["你好", "ok"], ["при", ""], ["1"], ["", ""]])


def scripts_of(*texts):
    return np.array(SCRIPTS)[detect_scripts(pa.array([[text] for text in texts]))].tolist()


def test_characters_are_counted_over_all_turns():
    assert count_characters(COLUMN).tolist() == [3, 4, 3, 1, 0]


def test_a_slice_of_a_column_has_its_own_characters_and_scripts():
    assert count_characters(COLUMN.slice(1, 2)).tolist() == [4, 3]
    assert (
        detect_scripts(COLUMN.slice(1, 2)).tolist() == detect_scripts(pa.array([["你好", "ok"], ["при", ""]])).tolist()
    )


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, world", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("你好 ok", "Latin"),
        ("你好吗 ok", "Han"),
        ("日本語です", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("שלום", "Hebrew"),
        ("สวัสดี", "Thai"),
        ("Καλημέρα", "Greek"),
        ("ամենաշատ", "other"),
        ("12 + 30 = ?", "none"),
        ("", "none"),
    ],
)
def test_the_script_is_the_one_of_most_letters(text, script):
    assert scripts_of(text) == [script]


def test_no_battles_have_no_scripts():
    empty = pa.array([], pa.list_(pa.string()))
    assert detect_scripts(empty).tolist() == count_characters(empty).tolist() == []
