import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from datetime import date, timedelta
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from rewardmodel.config.schema import Source
from rewardmodel.data.formats import read_battles
from rewardmodel.data.raw_rows import PEEKED_ROWS
from rewardmodel.data.readers import COMPRESSIONS, READERS
from rewardmodel.data.sources import open_rows
from rewardmodel.errors import InputError

BATTLES = [
    {
        **{"id": "b1", "model_a": "gpt", "model_b": "llama", "prompt": ["Hi", "And 猫?"]},
        **{"response_a": ["Hello", "ここ"], "response_b": ["Hey", ""]},
        **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    },
    {
        **{"id": "b2", "model_a": "llama", "model_b": "gpt", "prompt": ['say "a, b"\n😀']},
        **{"response_a": ["a, b\r\n"], "response_b": ["\u2028"]},
        **{"winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
    },
]
LINES = "".join(f"{json.dumps(row)}\n" for row in BATTLES)
"""The battles as JSON Lines."""


def as_csv(rows, delimiter=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows
    )
    return file.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_zst(content):
    file = pa.BufferOutputStream()
    with pa.CompressedOutputStream(file, "zstd") as packed:
        packed.write(content)
    return file.getvalue().to_pybytes()


def as_zip(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def write(folder, content, name):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message_of(source, **arguments):
    with pytest.raises(InputError) as caught:
        read_battles(source, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def without_source(battles):
    return battles.remove_columns("source").to_dict()


SAME = {
    "battles.csv": as_csv(BATTLES),
    "battles.jsonl": LINES,
    "battles.ndjson": LINES,
    "battles.json": json.dumps(BATTLES, indent=1),
    "battles.tsv": as_csv(BATTLES, "\t"),
    "battles.csv.gz": gzip.compress(as_csv(BATTLES)),
    "battles.jsonl.bz2": bz2.compress(LINES.encode()),
    "battles.json.xz": lzma.compress(json.dumps(BATTLES).encode()),
    "battles.tsv.ZST": as_zst(as_csv(BATTLES, "\t")),
    "battles.parquet.gz": gzip.compress(as_parquet(BATTLES)),
    "battles.parquet.zst": as_zst(as_parquet(BATTLES)),
    "battles.parquet": as_parquet(BATTLES),
    "csv.zip": as_zip({"battles.csv": as_csv(BATTLES)}),
    "jsonl.zip": as_zip({"folder/battles.jsonl": LINES}, zipfile.ZIP_LZMA),
    "parquet.zip": as_zip({"battles.parquet": as_parquet(BATTLES)}, zipfile.ZIP_BZIP2),
    "gz.zip": as_zip({"battles.csv.gz": gzip.compress(as_csv(BATTLES))}),
    "stored.zip": as_zip({"readme.txt": "hello", "battles.json": json.dumps(BATTLES)}, zipfile.ZIP_STORED),
}
"""The two battles in every kind of file."""

MISNAMED = {
    "lines.json": LINES,
    "list.jsonl": json.dumps(BATTLES, indent=1),
    "semicolons.csv": b"\xef\xbb\xbf" + as_csv(BATTLES, ";"),
    "tabs.csv": as_csv(BATTLES, "\t"),
}
"""The two battles in files whose content is not quite what the ending says."""


def test_every_ending_has_a_file_in_these_tests():
    assert {end.lower() for name in SAME for end in Path(name).suffixes} == {*READERS, *COMPRESSIONS}


@pytest.mark.parametrize("name", [*SAME, *MISNAMED])
def test_every_kind_of_file_gives_the_same_battles(tmp_path, name):
    battles = read_battles(write(tmp_path, (SAME | MISNAMED)[name], name))
    for given, read in zip(BATTLES, battles, strict=True):
        assert {column: read[column] for column in given} == given


@pytest.mark.parametrize("name", SAME)
def test_source_is_the_name_of_the_file_that_holds_the_battles(tmp_path, name):
    assert read_battles(write(tmp_path, SAME[name], name))["source"][:] == ["battles"] * 2


@pytest.mark.parametrize(("role", "read"), [("train", "train-1"), ("test", "test-1")])
def test_zip_of_the_competition_gives_the_file_of_the_role(tmp_path, role, read):
    members = {f"{name}.csv": as_csv([{**BATTLES[0], "id": f"{name}-1"}]) for name in ("test", "train")}
    path = write(tmp_path, as_zip({**members, "sample_submission.csv": "id,winner_tie\n1,1\n"}), "competition.zip")
    assert read_battles(path, role=role)["id"][:] == [read]


def test_zip_of_two_files_of_other_names_is_refused_and_they_are_named(tmp_path):
    path = write(tmp_path, as_zip({"one.csv": "", "two.jsonl": "", "notes.txt": ""}), "both.zip")
    message = message_of(path)
    assert message.startswith(
        f"{path}: not clear which file in it to read: one.csv, two.jsonl; keep one, call one of them train"
    )


def test_error_in_a_zip_names_the_file_within(tmp_path):
    path = write(tmp_path, as_zip({"in/train.jsonl": LINES + "{"}), "battles.zip")
    assert message_of(path).startswith(f"{path}/in/train.jsonl: line 3: not JSON")


def marked_encrypted(content):
    packed = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of the local and the central header
        packed[packed.index(mark) + place] |= 1
    return bytes(packed)


WHOLE = as_zip({"battles.csv": as_csv(BATTLES)}, zipfile.ZIP_STORED)
ZIPS = {
    "no bytes": (b"", "File is not a zip file"),
    "text": (b"id,prompt\n", "File is not a zip file"),
    "cut": (WHOLE[:-30], "File is not a zip file"),
    "no file": (as_zip({}), "not clear which file in it to read: none has a known ending"),
    "other files only": (
        as_zip({"a.txt": "", "b/c.md": ""}),
        "not clear which file in it to read: none has a known ending",
    ),
    "zip in it": (as_zip({"train.zip": WHOLE}), "not clear which file in it to read: none has a known ending"),
    "changed byte": (WHOLE.replace(b"llama", b"lLama"), "Bad CRC-32"),
    "encrypted": (marked_encrypted(WHOLE), "is encrypted, password required"),
}


@pytest.mark.parametrize(("content", "fragment"), ZIPS.values(), ids=ZIPS)
def test_bad_zip_is_refused_in_one_line(tmp_path, content, fragment):
    path = write(tmp_path, content, "battles.zip")
    message = message_of(path)
    assert message.startswith(str(path))
    assert fragment in message


def test_bad_lzma_data_in_a_zip_is_refused_in_one_line(tmp_path):
    content = bytearray(as_zip({"battles.csv": as_csv(BATTLES) * 20}, zipfile.ZIP_LZMA))
    content[80:120] = b"\xff" * 40
    assert "cannot be read further" in message_of(write(tmp_path, bytes(content), "battles.zip"))


def test_zip_made_on_a_mac_has_one_file(tmp_path):
    members = {"battles.jsonl": LINES, "__MACOSX/._battles.jsonl": b"\x00\x05\x16\x07"}
    assert len(read_battles(write(tmp_path, as_zip(members), "battles.zip"))) == 2


FILES = {
    "jsonl, cut": ("b.jsonl", LINES[:-9], "line 2: not JSON"),
    "jsonl, a list": ("b.jsonl", LINES + "[1]\n", "row 3: not an object; give one JSON object per battle"),
    "jsonl, a text": ("b.jsonl", '"x"\n', "row 1: not an object"),
    "jsonl, no line": ("b.jsonl", "", "the file is empty"),
    "jsonl, blank lines": ("b.jsonl", "\n \n", "the file is empty"),
    "jsonl, an object without keys": ("b.jsonl", "{}\n", "the file is empty"),
    "jsonl, latin-1": ("b.jsonl", LINES.encode() + b'{"id": "f\xfcr"}\n', "line 3: byte 0xfc is not UTF-8"),
    "jsonl, utf-16": ("b.jsonl", LINES.encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    "jsonl, deep": ("b.jsonl", '{"id": ' + "[" * 9999, "line 1: not JSON"),
    "json, an object": (
        "b.json",
        '{"a": 1, "b": "x"}',
        "one JSON object, not a list of objects, one per battle; none of",
    ),
    "json, two lists": ("b.json", '{"a": [{}], "b": [{}]}', "several of its keys hold lists of objects: a, b; keep"),
    "json, columns": ("b.json", '{"prompt": {"0": "q"}}', "to_json(orient='records')"),
    "gz, cut": ("b.csv.gz", gzip.compress(as_csv(BATTLES))[:-12], "is the file complete?"),
    "xz, text": ("b.csv.xz", as_csv(BATTLES), "is the file complete?"),
    "zst, text": ("b.csv.zst", as_csv(BATTLES), "is the file complete?"),
    "gz, unknown": ("b.xlsx.gz", b"", "unknown file ending '.xlsx'; known: .csv, .tsv"),
    "json, a list of lists": ("b.json", "[[1]]", "row 1: not an object"),
    "json, cut": ("b.json", json.dumps(BATTLES)[:-1], "not JSON"),
    "json, no bytes": ("b.json", "", "not JSON"),
    "json, no battles": ("b.json", "[]", "the file is empty"),
    "json, latin-1": ("b.json", b'[{"id": "f\xfcr"}]', "not UTF-8; save the file as UTF-8"),
    "parquet, cut": ("b.parquet", as_parquet(BATTLES)[:-20], "is the file complete?"),
    "parquet, no bytes": ("b.parquet", b"", "is the file complete?"),
    "parquet, text": ("b.parquet", as_csv(BATTLES), "is the file complete?"),
    "csv, utf-16": ("b.csv", as_csv(BATTLES).decode().encode("utf-16"), "header: byte 0xff is not UTF-8"),
    "csv, broken header": ("b.csv", b"id,pr\xe9mpt\n", "header: byte 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "fragment"), FILES.values(), ids=FILES)
def test_bad_file_is_refused_in_one_line_that_says_where(tmp_path, name, content, fragment):
    path = write(tmp_path, content, name)
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert fragment in message, message


def test_parquet_without_rows_has_no_battles(tmp_path):
    table = pa.Table.from_pylist(BATTLES)[:0]
    pq.write_table(table, tmp_path / "b.parquet")
    assert "no battles" in message_of(tmp_path / "b.parquet")


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    table = pa.table([["1"], ["2"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "b.parquet")
    assert "column 'prompt' occurs twice; keep one of them" in message_of(tmp_path / "b.parquet")


def test_parquet_column_that_nobody_reads_may_hold_anything(tmp_path):
    table = pa.Table.from_pylist(BATTLES)
    days = pa.array([2**31 - 1] * 2, pa.int32()).cast(pa.date32())  # no date of Python's
    pq.write_table(table.append_column("tstamp", days), tmp_path / "b.parquet")
    assert len(read_battles(tmp_path / "b.parquet")) == 2


@pytest.mark.parametrize("key", ["data", "rows"])
def test_battles_under_a_key_of_a_json_file_are_read(tmp_path, key):
    whole = {"version": "1", "about": {"by": "us"}, "labels": ["a"], key: BATTLES}
    assert read_battles(write(tmp_path, json.dumps(whole), "b.json"))["id"][:] == ["b1", "b2"]


@pytest.mark.parametrize(("role", "name"), [("train", "b1"), ("test", "b2")])
def test_battles_under_the_key_of_the_role_are_read(tmp_path, role, name):
    whole = {"train": BATTLES[:1], "test": BATTLES[1:]}
    assert read_battles(write(tmp_path, json.dumps(whole), "b.json"), role=role)["id"][:] == [name]


def test_one_battle_is_a_json_file(tmp_path):
    assert read_battles(write(tmp_path, json.dumps(BATTLES[0], indent=1), "b.json"))["id"][:] == ["b1"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.csv", 'id,"pro\nmpt",response_a,response_b\n'),
        ("b.jsonl", '{"pro\\nmpt": 1}\n'),
        ("b.zip", as_zip({"a\nb.csv": "", "c.csv": ""})),
    ],
    ids=["csv", "jsonl", "zip"],
)
def test_message_about_a_name_with_a_newline_is_one_line(tmp_path, name, content):
    message_of(write(tmp_path, content, name))


@pytest.mark.parametrize("name", ["b.csv", "b.jsonl", "b.json"])
def test_byte_order_mark_is_passed_over(tmp_path, name):
    content = {"b.csv": as_csv(BATTLES), "b.jsonl": LINES.encode(), "b.json": json.dumps(BATTLES).encode()}[name]
    assert read_battles(write(tmp_path, b"\xef\xbb\xbf" + content, name))["id"][:] == ["b1", "b2"]


def test_lines_of_json_end_at_newlines_only(tmp_path):
    rows = [{**BATTLES[0], "model_a": "one\u2028two\x85three"}]
    path = write(tmp_path, json.dumps(rows[0], ensure_ascii=False) + "\r\n", "b.jsonl")
    assert read_battles(path)["model_a"][:] == ["one\u2028two\x85three"]


def test_blank_lines_are_counted_in_the_log(tmp_path, caplog):
    path = write(tmp_path, LINES.replace("\n", "\n\n"), "b.jsonl")
    assert len(read_battles(path)) == 2
    assert [record.getMessage() for record in caplog.records] == [f"{path}: 2 blank lines skipped"]


def test_row_of_a_json_lines_file_is_counted_without_blank_lines(tmp_path):
    path = write(tmp_path, "\n" + LINES + json.dumps({**BATTLES[0], "prompt": [3]}), "b.jsonl")
    assert "row 3, column 'prompt'" in message_of(path)


def many(count):
    return [{**BATTLES[0], "id": str(number)} for number in range(count)]


def test_late_column_of_json_lines_is_refused_with_its_row(tmp_path):
    rows = many(PEEKED_ROWS + 5)
    rows[PEEKED_ROWS + 2]["weight"] = 2
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "b.jsonl")
    message = message_of(path)
    assert message.startswith(
        f"{path}: row {PEEKED_ROWS + 3}, column 'weight': none of the first {PEEKED_ROWS} rows has it"
    )


def test_late_column_that_nobody_reads_is_passed_over(tmp_path):
    rows = many(PEEKED_ROWS + 5)
    rows[PEEKED_ROWS + 2]["note"] = "x"
    assert len(read_battles(write(tmp_path, "\n".join(map(json.dumps, rows)), "b.jsonl"))) == PEEKED_ROWS + 5


def test_column_that_only_some_of_the_first_rows_have_is_read(tmp_path):
    rows = many(3)
    rows[2]["weight"] = 2
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "b.jsonl")
    assert "row 1, column 'weight'" in message_of(path)
    rows[0]["weight"] = rows[1]["weight"] = 0.5
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "b.jsonl")
    assert read_battles(path)["weight"][:] == [0.5, 0.5, 2]


def test_rows_are_numbered_from_1_and_columns_are_those_of_the_header(tmp_path):
    with open_rows(Source(str(write(tmp_path, "a,b\n1,2\n3,4\n", "b.csv"))), "train", {"a", "b"}) as raw:
        assert raw.columns == ["a", "b"]
        assert list(raw.rows) == [(1, {"a": "1", "b": "2"}), (2, {"a": "3", "b": "4"})]


def test_columns_of_json_lines_are_gathered_from_the_first_rows(tmp_path):
    with open_rows(Source(str(write(tmp_path, '{"a": 1}\n{"b": 2, "a": 3}\n', "b.jsonl"))), "train", {"a", "b"}) as raw:
        assert raw.columns == ["a", "b"]
        assert list(raw.rows) == [(1, {"a": 1}), (2, {"b": 2, "a": 3})]


def test_file_is_closed_after_reading(tmp_path):
    path = write(tmp_path, SAME["csv.zip"], "csv.zip")
    with open_rows(Source(str(path)), "train", {"a", "b"}) as raw:
        assert next(raw.rows)[0] == 1
    with pytest.raises(InputError, match="cannot be read further"):
        list(raw.rows)


def test_file_that_may_not_be_opened_is_refused_in_one_line(tmp_path, monkeypatch):
    path = write(tmp_path, LINES, "b.jsonl")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert message_of(path).startswith(f"{path}: ")


def test_path_that_is_too_long_is_no_file():
    assert "no such file" in message_of("x" * 5000)


@pytest.fixture
def hub(monkeypatch):
    """Return the list of calls of `load_dataset`, which gives the battles."""
    calls = []

    def load_dataset(path, name=None, **arguments):
        calls.append((path, name, arguments))
        return Dataset.from_list(BATTLES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_id_is_loaded_as_its_main_train_split(hub):
    assert read_battles("lmarena-ai/some-battles")["id"][:] == ["b1", "b2"]
    assert hub == [("lmarena-ai/some-battles", None, {"split": "train", "revision": "main"})]


def test_role_is_the_split_of_a_hub_id(hub):
    read_battles("owner/name", role="test")
    assert hub == [("owner/name", None, {"split": "test", "revision": "main"})]


def test_subset_split_and_revision_are_passed_to_the_hub(hub):
    read_battles(Source("owner/name", subset="hard", split="raw", revision="abc123"), role="test")
    assert hub == [("owner/name", "hard", {"split": "raw", "revision": "abc123"})]


def test_battles_of_the_hub_are_named_by_the_data_set(hub):
    assert read_battles("owner/name")["source"][:] == ["name"] * 2


@pytest.mark.parametrize("path", ["owner/name.csv", "./owner/name", "a/b/c", "name", "", "http://x/y"])
def test_what_is_no_hub_id_never_reaches_the_hub(hub, path):
    assert message_of(path) == f"{path}: no such file; give the path of a battles file, a hub id, or 'sample'"
    assert hub == []


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), ValueError("no\nnetwork"), KeyError("no\nnetwork")])
def test_error_of_the_hub_is_one_line_that_says_what_to_mend(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = message_of("owner/name")
    assert message.startswith("owner/name: no such file, and the hub gave no data set (")
    assert message.endswith("give the path of a file, or fix path, subset, split or revision")
    assert "network" in message


def test_hub_cannot_be_reached_offline():
    assert message_of("rewardmodel-tests/absent").startswith("rewardmodel-tests/absent: no such file, and the hub")


@pytest.mark.parametrize("build", [pd.DataFrame, Dataset.from_list], ids=["DataFrame", "Dataset"])
def test_table_in_memory_is_read_like_a_file(tmp_path, build):
    from_file = read_battles(write(tmp_path, LINES, "b.jsonl"))
    assert without_source(read_battles(build(BATTLES))) == without_source(from_file)


def test_data_set_in_another_format_is_read_as_it_is():
    assert read_battles(Dataset.from_list(BATTLES).with_format("numpy"))["prompt"][0] == ["Hi", "And 猫?"]


def test_columns_of_a_data_frame_that_are_numbers_are_refused_in_one_line():
    assert message_of(pd.DataFrame([[1, 2]])).startswith("data frame: column 'prompt' is missing")


def test_parquet_of_many_types_is_read_alike(tmp_path):
    texts = [["p"], ["q", None]]
    table = pa.table(
        {
            "id": pa.array([7, 8], pa.int16()),
            "prompt": pa.array([["p"], ["q", "r"]], pa.large_list(pa.large_string())),
            "response_a": pa.array(texts, pa.list_(pa.string())),
            "response_b": pa.array([["b"], ["c", "d"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
            "model_a": pa.array(["m", None]).dictionary_encode(),
            "p_b": pa.array(np.array([0.25, 1], np.float16)),
            "weight": pa.array([1, 2], pa.decimal128(5, 1)),
            "note": pa.array([timedelta(1), None]),
            "day": pa.array([date(2024, 1, 1)] * 2),
        }
    )
    pq.write_table(table, tmp_path / "b.parquet")
    battles = read_battles(tmp_path / "b.parquet")
    assert battles["id"][:] == ["7", "8"]
    assert battles["prompt"][:] == [["p"], ["q", "r"]]
    assert battles["response_a"][:] == [["p"], ["q", ""]]
    assert battles["response_b"][:] == [["b"], ["c", "d"]]
    assert battles["model_a"][:] == ["m", ""]
    assert battles["winner_model_b"][:] == [0.25, 1]
    assert battles["weight"][:] == [1, 2]
