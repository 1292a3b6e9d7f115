import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError


def frame_of(*ids):
    return pd.DataFrame([{"id": name, "prompt": "q", "response_a": "a", "response_b": "b"} for name in ids])


def folder_of(tmp_path, **files):
    for name, frame in files.items():
        frame.to_parquet(tmp_path / f"{name.replace('_', '-')}.parquet")
    return tmp_path


def message_of(source, **arguments):
    with pytest.raises(InputError) as caught:
        read_battles(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    folder = folder_of(tmp_path, train_00001_of_00002=frame_of("3"), train_00000_of_00002=frame_of("1", "2"))
    (folder / "README.md").write_text("about it")
    (folder / ".hidden.parquet").write_text("")
    battles = read_battles(folder)
    assert battles["id"][:] == ["1", "2", "3"]
    assert set(battles["source"][:]) == {folder.name}


@pytest.mark.parametrize(
    ("options", "role", "ids"), [({}, "train", ["1"]), ({}, "test", ["2"]), ({"split": "dev"}, "train", ["3"])]
)
def test_the_files_of_the_split_are_read(tmp_path, options, role, ids):
    folder = folder_of(tmp_path, train_0=frame_of("1"), test_0=frame_of("2"), dev_0=frame_of("3"))
    assert read_battles(Source(str(folder), **options), role=role)["id"][:] == ids


def test_numbered_files_are_shards_whatever_their_names(tmp_path):
    folder_of(tmp_path, **{"0001": frame_of("2"), "0000": frame_of("1")})
    assert read_battles(tmp_path)["id"][:] == ["1", "2"]


def test_shards_may_be_compressed_lines(tmp_path):
    for number in "21":
        frame_of(number).to_json(tmp_path / f"part-{number}.jsonl.gz", orient="records", lines=True)
    assert read_battles(tmp_path)["id"][:] == ["1", "2"]


def test_an_error_in_a_shard_names_it(tmp_path):
    folder_of(tmp_path, a=frame_of("1"), b=frame_of("2").drop(columns="response_b"))
    assert (
        f"{tmp_path / 'b.parquet'}: column 'response_b' is in this file or in a.parquet, but not in both"
        in message_of(tmp_path)
    )
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    assert message_of(tmp_path).startswith(f"{tmp_path / 'b.parquet'}: after row 0: cannot be read")


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["a.csv", "b.parquet"], ["test-0.csv", "dev-0.csv"], ["a.zip"]])
def test_a_folder_in_which_it_is_not_clear_what_to_read_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("")
    shown = ", ".join(sorted(names)) or "it is empty"
    assert message_of(tmp_path).startswith(
        f"{tmp_path}: a folder, in which it is not clear what to read: {shown}; give"
    )


def test_a_saved_data_set_is_read(tmp_path):
    Dataset.from_pandas(frame_of("1", "2")).save_to_disk(tmp_path / "saved")
    assert read_battles(tmp_path / "saved")["id"][:] == ["1", "2"]


def test_a_split_of_saved_data_sets_is_read(tmp_path):
    splits = {name: Dataset.from_pandas(frame_of(name)) for name in ("train", "test", "extra")}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert read_battles(path)["id"][:] == ["train"]
    assert read_battles(path, role="test")["id"][:] == ["test"]
    assert read_battles(Source(path, split="extra"))["id"][:] == ["extra"]
    assert message_of(Source(path, split="more")) == (
        f"{path}: no split 'more' in it; give one as split: train, test, extra"
    )


def test_a_broken_saved_data_set_is_refused_in_one_line(tmp_path):
    (tmp_path / "state.json").write_text("{")
    assert message_of(tmp_path).startswith(f"{tmp_path}: after row 0: cannot be read further (")


def test_a_dictionary_of_data_sets_needs_a_split():
    given = DatasetDict({"train": Dataset.from_pandas(frame_of("1")), "test": Dataset.from_pandas(frame_of("2"))})
    assert message_of(given) == "battles: a DatasetDict of train, test; give one split, like battles['train']"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, "NoneType"),
        (np.zeros(1000), "ndarray"),
        (3, "int"),
        ([["a.csv"]], "list"),
    ],
)
def test_what_is_no_source_of_battles_is_named_by_its_type(given, name):
    assert message_of(given).startswith(f"battles: of type {name}; give a path, a Source, a pandas DataFrame")


@pytest.mark.parametrize(
    ("column", "value", "written"), [("id", 1003.0, "1003"), ("question_id", 7.0, "7"), ("id", 0.5, "0.5")]
)
def test_whole_numbers_that_are_floats_are_ids_without_decimals(column, value, written):
    assert read_battles(frame_of("1").drop(columns="id").assign(**{column: [value]}))["id"][:] == [written]


def test_sources_in_a_list_are_joined_by_commas(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({**frame_of("1").iloc[0], "source": ["lmsys", "ours"]}))
    assert read_battles(tmp_path / "b.jsonl")["source"][:] == ["lmsys, ours"]


@pytest.mark.parametrize(
    ("columns", "names", "hint"),
    [
        (
            {},
            ["question_id"],
            "row 2, column 'question_id': '8' was already used in row 1; give every battle a unique id, ",
        ),
        ({"id": "pair"}, ["pair"], "row 2, column 'pair': '8' was already used in row 1"),
    ],
)
def test_an_id_that_is_used_twice_names_the_files_column_and_how_to_number_rows(tmp_path, columns, names, hint):
    frame = frame_of("8", "8").rename(columns={"id": names[0]})
    frame.to_csv(tmp_path / "b.csv", index=False)
    message = message_of(Source(str(tmp_path / "b.csv"), columns=columns))
    assert hint in message
    ours = "id" if columns else "question_id"
    assert message.endswith(f"or let the rows be numbered with columns: {{{ours}: null}}")
    assert read_battles(Source(str(tmp_path / "b.csv"), columns={ours: None}))["id"][:] == ["1", "2"]
