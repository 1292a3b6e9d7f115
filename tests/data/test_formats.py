import csv
import io
import json
import logging
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, write_csv
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import (
    BATTLE_FEATURES,
    OUTCOMES,
    TEACHER_COLUMNS,
    TEXT_COLUMNS,
    is_labelled,
    outcomes,
    swap,
    weights,
)
from rewardmodel.config.schema import Source
from rewardmodel.data import battle_parser
from rewardmodel.data.folds import TRAIN_ONLY
from rewardmodel.data.formats import FORMATS, read_battles
from rewardmodel.data.readers import COMPRESSIONS, READERS
from rewardmodel.errors import InputError

HEADER = "id,prompt,response_a,response_b"
LABELLED = f"{HEADER},winner_model_a,winner_model_b,winner_tie"
ROW = '1,"[""p""]","[""a""]","[""b""]"'
GOOD = {"id": "1", "prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]'}


def write(tmp_path, content, name="battles.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_text(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def message_of(source):
    with pytest.raises(InputError) as caught:
        read_battles(source)
    return str(caught.value)


def warnings_of(caplog):
    return [(record.name, record.levelno, record.getMessage()) for record in caplog.records]


def test_labelled_competition_file_is_read_as_it_stands(tmp_path):
    content = (
        "id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '0030192,gpt-4,koala-13b,"[""Hi"",""More?""]","[""Hello"",""Yes""]","[""Hey"",""No""]",0,1,0\n'
        '53567,llama,llama,"[""Why?""]","[""So""]","[""Thus""]",0,0,1\n'
    )
    battles = read_battles(write(tmp_path, content))
    assert battles.features == BATTLE_FEATURES
    assert is_labelled(battles)
    assert outcomes(battles).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert battles[0] == {
        **dict.fromkeys(TEACHER_COLUMNS),
        **{
            "id": "0030192",
            "prompt": ["Hi", "More?"],
            "response_a": ["Hello", "Yes"],
            "response_b": ["Hey", "No"],
        },
        **{"model_a": "gpt-4", "model_b": "koala-13b"},
        **{"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        **{"weight": 1, "source": "battles", "group": -1, "fold": -1},
    }


def test_unlabelled_file_has_null_outcomes_and_no_model_names(tmp_path):
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    assert not is_labelled(battles)
    assert [battles[0][name] for name in OUTCOMES] == [None] * 3
    assert (battles[0]["model_a"], battles[0]["model_b"]) == ("", "")


def test_path_may_be_a_string(tmp_path):
    assert read_battles(str(write(tmp_path, f"{HEADER}\n{ROW}\n")))["id"][:] == ["1"]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    plain = f"{HEADER}\n{ROW}\n".encode()
    assert read_battles(write(tmp_path, b"\xef\xbb\xbf" + plain))["id"][:] == ["1"]


def test_windows_line_ends_and_blank_lines_are_no_rows(tmp_path):
    content = f"{HEADER}\n{ROW}\n\n{ROW.replace('1,', '2,', 1)}\n\n".replace("\n", "\r\n")
    assert read_battles(write(tmp_path, content))["id"][:] == ["1", "2"]


def test_unknown_columns_and_column_order_do_not_matter(tmp_path):
    rows = [{"note": "x", **dict(reversed(GOOD.items()))}]
    assert read_battles(write(tmp_path, csv_text(rows))).to_dict() == (
        read_battles(write(tmp_path, csv_text([GOOD]))).to_dict()
    )


def test_newlines_quotes_and_commas_within_turns_survive(tmp_path):
    turns = ['He said "hi",\nthen left.\r\n\tBye', "a, b; \\ 猫 😀"]
    rows = [{**dict.fromkeys(["prompt", "response_a", "response_b"], json.dumps(turns)), "id": 1}]
    assert read_battles(write(tmp_path, csv_text(rows)))["prompt"][0] == turns


def test_raw_newlines_within_json_strings_are_read(tmp_path):
    rows = [{**GOOD, "response_a": '["one\ntwo\tthree"]'}]
    assert read_battles(write(tmp_path, csv_text(rows)))["response_a"][0] == ["one\ntwo\tthree"]


turns = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(texts=turns, ascii_only=st.booleans())
def test_any_text_survives_json_and_csv(tmp_path_factory, texts, ascii_only):
    text = json.dumps(texts, ensure_ascii=ascii_only)
    rows = [{"id": "1", "prompt": text, "response_a": text, "response_b": text}]
    path = write(tmp_path_factory.getbasetemp(), csv_text(rows), "any.csv")
    assert read_battles(path)["response_b"][0] == texts


def test_null_turns_are_read_as_empty_and_counted_in_the_log(tmp_path, caplog):
    rows = [
        {**GOOD, "prompt": '["p", "q"]', "response_a": '[null, "a"]', "response_b": "[null, null]"},
        {**GOOD, "id": 2, "prompt": "[null]"},
    ]
    path = write(tmp_path, csv_text(rows))
    battles = read_battles(path)
    assert battles["response_a"][0] == ["", "a"]
    assert battles["response_b"][0] == ["", ""]
    assert battles["prompt"][1] == [""]
    assert warnings_of(caplog) == [("rewardmodel.data.formats", logging.WARNING, f"{path}: 4 null turns read as empty")]


@pytest.mark.parametrize("absent", ["", "  ", "null", "[]"])
def test_missing_response_has_an_empty_turn_a_prompt_turn_and_is_counted(tmp_path, caplog, absent):
    rows = [{**GOOD, "prompt": '["p", "q"]', "response_a": absent, "response_b": '["b", "c"]'}]
    path = write(tmp_path, csv_text(rows))
    assert read_battles(path)["response_a"][0] == ["", ""]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 1 missing text read as empty"]


@pytest.mark.parametrize("absent", ["", "  ", "null", "[]"])
def test_missing_prompt_has_an_empty_turn_a_response_turn_and_is_counted(tmp_path, caplog, absent):
    rows = [{**GOOD, "prompt": absent, "response_a": '["a", "b"]', "response_b": '["c", "d"]'}]
    path = write(tmp_path, csv_text(rows))
    assert read_battles(path)["prompt"][0] == ["", ""]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 1 missing text read as empty"]


def test_battle_without_any_text_has_one_empty_turn_of_each(tmp_path, caplog):
    path = write(tmp_path, f"{HEADER}\n1,,,\n{ROW.replace('1,', '2,', 1)}\n")
    battles = read_battles(path)
    assert [battles[0][name] for name in ("prompt", "response_a", "response_b")] == [[""]] * 3
    assert battles["prompt"][1] == ["p"]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 3 missing texts read as empty"]


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA])
def test_missing_response_of_a_data_frame_is_read_as_empty_and_counted(caplog, absent):
    battles = read_battles(pd.DataFrame([{**GOOD, "response_b": absent}]))
    assert battles["response_b"][0] == [""]
    assert [text for *_, text in warnings_of(caplog)] == ["data frame: 1 missing text read as empty"]


def test_lone_surrogate_is_replaced_and_counted(tmp_path, caplog):
    rows = [{**GOOD, "response_a": r'["cut \ud83d"]', "response_b": r'["\ude00 off"]'}]
    path = write(tmp_path, csv_text(rows))
    battles = read_battles(path)
    assert battles["response_a"][0] == ["cut \N{REPLACEMENT CHARACTER}"]
    assert battles["response_b"][0] == ["\N{REPLACEMENT CHARACTER} off"]
    assert [text.partition(": ")[2] for *_, text in warnings_of(caplog)] == [
        "2 turns with broken characters, replaced by \N{REPLACEMENT CHARACTER}"
    ]


def test_surrogate_pair_is_one_character_and_no_repair(tmp_path, caplog):
    rows = [{**GOOD, "response_a": r'["\ud83d\ude00"]'}]
    assert read_battles(write(tmp_path, csv_text(rows)))["response_a"][0] == ["😀"]
    assert not caplog.records


def test_surrogate_halves_of_a_data_frame_are_joined():
    frame = pd.DataFrame([{**GOOD, "response_a": ["\ud83d\ude00"]}])
    assert read_battles(frame)["response_a"][0] == ["😀"]


def test_soft_outcomes_are_kept(tmp_path):
    rows = [{**GOOD, "winner_model_a": "0.25", "winner_model_b": ".5", "winner_tie": "2.5e-1"}]
    assert outcomes(read_battles(write(tmp_path, csv_text(rows)))).tolist() == [[0.25, 0.5, 0.25]]


def test_rows_of_several_chunks_keep_their_order_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(battle_parser, "ROWS_PER_TABLE", 3)
    rows = [{**GOOD, "id": str(number)} for number in range(1, 8)]
    assert read_battles(write(tmp_path, csv_text(rows)))["id"][:] == list("1234567")
    rows[6]["id"] = "2"
    assert "row 7, column 'id': '2' was already used in row 2" in message_of(write(tmp_path, csv_text(rows)))


@pytest.mark.parametrize("as_lists", [False, True])
def test_data_frame_is_read_like_a_file(tmp_path, as_lists):
    row = {**GOOD, "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    from_file = read_battles(write(tmp_path, csv_text([row])))
    texts = {name: json.loads(row[name]) for name in ("prompt", "response_a", "response_b")} if as_lists else {}
    from_frame = read_battles(pd.DataFrame([{**row, **texts, "id": 1}]))
    assert from_frame.remove_columns("source").to_dict() == from_file.remove_columns("source").to_dict()


def test_data_frame_out_of_parquet_is_read(tmp_path):
    texts = {name: [["one", "two"]] for name in ("prompt", "response_a", "response_b")}
    pd.DataFrame({"id": ["7"], **texts}).to_parquet(tmp_path / "frame.parquet")
    battles = read_battles(pd.read_parquet(tmp_path / "frame.parquet"))
    assert battles["response_b"][0] == ["one", "two"]


def test_data_frame_rows_are_counted_from_1_whatever_its_index():
    frame = pd.DataFrame([GOOD, {**GOOD, "response_a": "[3]"}], index=[70, 80])
    assert message_of(frame).startswith("data frame: row 2, column 'response_a': the turn 3 is not text")


def test_data_set_of_battles_is_returned_as_it_is(tmp_path):
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    assert read_battles(battles) is battles


def test_data_set_is_validated(tmp_path):
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    assert message_of(battles.select([0, 0])).startswith("data set: row 2, column 'id'")


def test_data_set_of_other_types_is_cast(tmp_path):
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    numbered = battles.remove_columns("id").add_column("id", [1])
    assert read_battles(numbered)[0] == battles[0]


def test_data_set_with_only_the_columns_of_the_competition_is_read(tmp_path):
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    assert read_battles(battles.select_columns(HEADER.split(",")))["id"][:] == ["1"]


BAD_FILES = {
    "missing column": (
        "id,prompt,response_a\n1,x,y\n",
        ["column 'response_b' is missing", "competition: prompt, response_a, response_b; "],
    ),
    "misspelt column": (
        f"{HEADER.replace('prompt', 'promt')}\n{ROW}\n",
        ["column 'prompt' is missing", "'promt'?"],
    ),
    "misspelt outcome": (
        f"{LABELLED.replace('winner_tie', 'winer_tie')}\n{ROW},1,0,0\n",
        ["column 'winner_tie' is missing", "'winer_tie'?"],
    ),
    "one outcome column": (f"{HEADER},winner_tie\n{ROW},1\n", ["column 'winner_model_a' is missing"]),
    "empty file": ("", ["the file is empty"]),
    "header only": (f"{HEADER}\n", ["no battles"]),
    "no JSON": (
        f"{HEADER}\n{ROW}\n2,hello,[],[]\n",
        ["row 2, column 'prompt'", "'hello' is not a JSON list"],
    ),
    "cut JSON": (
        f'{HEADER}\n1,"[""p""]","[""a","[]"\n',
        ["row 1, column 'response_a'", "is not a JSON list"],
    ),
    "JSON text": (f'{HEADER}\n1,"[""p""]","""a""",[]\n', ["row 1, column 'response_a'", "is not a list"]),
    "JSON object": (f'{HEADER}\n1,"{{""p"": 1}}",[],[]\n', ["row 1, column 'prompt'", "is not a list"]),
    "JSON number": (f'{HEADER}\n1,"[""p""]",[],5\n', ["row 1, column 'response_b'", ": 5 is not a list"]),
    "number in the list": (
        f"{HEADER}\n{ROW}\n2,[7],[],[]\n",
        ["row 2, column 'prompt'", "the turn 7 is not text"],
    ),
    "NaN in the list": (f"{HEADER}\n1,[NaN],[],[]\n", ["row 1, column 'prompt'", "the turn nan is not text"]),
    "list in the list": (f'{HEADER}\n1,"[[""p""]]",[],[]\n', ["row 1, column 'prompt'", "is not text"]),
    "turns of b, without a prompt": (
        f'{HEADER}\n1,[],"[""a"",""b""]","[""b""]"\n',
        ["row 1, column 'response_b'", "1 turn, ", "has 2"],
    ),
    "column twice": (f"{HEADER},prompt\n{ROW},[]\n", ["column 'prompt' occurs twice"]),
    "outcome column twice": (f"{LABELLED},winner_tie\n{ROW},1,0,0,0\n", ["column 'winner_tie' occurs twice"]),
    "blank lines only": ("\n\r\n\n", ["the file is empty"]),
    "weight of 0": (f"{HEADER},weight\n{ROW},0\n", ["row 1, column 'weight'", "0.0; give a number above 0"]),
    "negative weight": (
        f"{HEADER},weight\n{ROW},1\n{ROW.replace('1,', '2,', 1)},-0.5\n",
        ["row 2, column 'weight'", "-0.5; give a number above 0"],
    ),
    "infinite weight": (f"{HEADER},weight\n{ROW},inf\n", ["row 1, column 'weight'", "inf"]),
    "nan for a weight": (f"{HEADER},weight\n{ROW},nan\n", ["row 1, column 'weight'", "nan"]),
    "blank weight": (f"{HEADER},weight\n{ROW},\n", ["row 1, column 'weight'", "give a number above 0"]),
    "word for a weight": (f"{HEADER},weight\n{ROW},heavy\n", ["row 1, column 'weight'", "'heavy' is not a number"]),
    "turns of a": (
        f'{HEADER}\n1,"[""p""]","[""a"",""b""]",[]\n',
        ["row 1, column 'response_a'", "2 turns", "has 1"],
    ),
    "turns of b": (
        f'{HEADER}\n1,"[""p"",""q""]",[],"[""b""]"\n',
        ["row 1, column 'response_b'", "1 turn, ", "has 2"],
    ),
    "duplicate ids": (f"{HEADER}\n{ROW}\n{ROW}\n", ["row 2, column 'id'", "'1' was already used in row 1"]),
    "sum": (
        f"{LABELLED}\n{ROW},1,0,1\n",
        ["row 1, columns winner_model_a, winner_model_b, winner_tie", "1, 0, 1"],
    ),
    "negative": (f"{LABELLED}\n{ROW},2,-1,0\n", ["row 1, columns winner_model_a", "2, -1, 0"]),
    "word for an outcome": (
        f"{LABELLED}\n{ROW},yes,0,0\n",
        ["row 1, column 'winner_model_a'", "'yes' is not a number"],
    ),
    "nan for an outcome": (f"{LABELLED}\n{ROW},1,0,nan\n", ["row 1, column 'winner_tie'", "NaN"]),
    "empty id": (f"{HEADER}\n{ROW}\n{ROW.replace('1,', ' ,', 1)}\n", ["row 2, column 'id'", "empty"]),
    "too few fields": (f"{HEADER}\n{ROW}\n2,x\n", ["row 2 (line 3)", "2 fields", "header has 4"]),
    "too many fields": (f"{HEADER}\n{ROW},,\n", ["row 1 (line 2)", "6 fields", "header has 4"]),
    "line after a long field": (f'{HEADER}\n1,"[""p\n\n""]",[],[]\n2\n', ["row 2 (line 5)", "1 fields"]),
    "open quote": (f"{HEADER}\n{ROW[:-1]}\n", ["line 2", "check the quotes"]),
    "text after a quote": (f'{HEADER}\n{ROW}\n"2"x,[],[],[]\n', ["line 3", "check the quotes"]),
    "latin-1": (f"{HEADER}\n1,für,,\n".encode("latin-1"), ["row 1, column 'prompt': byte 0xfc is not UTF-8; save"]),
    "partly labelled": (
        f"{LABELLED}\n{ROW},1,0,0\n{ROW.replace('1,', '2,', 1)},,,\n",
        ["row 2, column 'winner_model_a': missing, NaN or infinite; label every battle of a file, or none"],
    ),
    "partly labelled row": (
        f"{LABELLED}\n{ROW},1,0,0\n{ROW.replace('1,', '2,', 1)},1,,0\n",
        ["row 2, column 'winner_model_b': missing, NaN or infinite; label every battle of a file, or none"],
    ),
    "one outcome column blank": (
        f"{LABELLED}\n{ROW},1,0,\n",
        ["row 1, column 'winner_tie': missing, NaN or infinite; label every battle of a file, or none"],
    ),
}


@pytest.mark.parametrize(("content", "fragments"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_in_one_line_that_names_file_row_and_column(tmp_path, content, fragments):
    path = write(tmp_path, content)
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


def test_file_whose_outcome_cells_are_all_blank_is_unlabelled(tmp_path):
    battles = read_battles(write(tmp_path, f"{LABELLED}\n{ROW},,,\n{ROW.replace('1,', '2,', 1)},,,\n"))
    assert not is_labelled(battles)
    assert np.isnan(outcomes(battles)).all()


def test_weights_are_read(tmp_path):
    rows = [{**GOOD, "weight": "0.25"}, {**GOOD, "id": "2", "weight": "3"}]
    battles = read_battles(write(tmp_path, csv_text(rows)))
    assert battles.features == BATTLE_FEATURES
    assert weights(battles).tolist() == [0.25, 3]
    frame = pd.DataFrame(rows).astype({"weight": float})
    assert weights(read_battles(frame)).tolist() == [0.25, 3]
    data_set = battles.select_columns([*HEADER.split(","), "weight"])
    assert weights(read_battles(data_set)).tolist() == [0.25, 3]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), None])
def test_weight_of_a_data_frame_or_a_data_set_is_above_0_and_finite(tmp_path, weight):
    frame = pd.DataFrame([{**GOOD, "weight": 1.0}, {**GOOD, "id": "2", "weight": weight}])
    assert message_of(frame).startswith("data frame: row 2, column 'weight': ")
    battles = read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n"))
    weighted = battles.remove_columns("weight").add_column("weight", [weight])
    assert message_of(weighted).startswith("data set: row 1, column 'weight': ")


def test_other_columns_may_be_there_twice(tmp_path):
    assert read_battles(write(tmp_path, f"{HEADER},note,note\n{ROW},x,y\n"))["id"][:] == ["1"]


def test_data_frame_with_a_column_twice_is_refused():
    frame = pd.DataFrame([[*GOOD.values(), "[]"]], columns=[*GOOD, "prompt"])
    assert message_of(frame).startswith("data frame: column 'prompt' occurs twice")


@pytest.mark.parametrize("before", ["\n", "\r\n\r\n", "\ufeff\n"])
def test_blank_lines_before_the_header_are_skipped(tmp_path, before):
    path = write(tmp_path, f"{before}{HEADER}\n{ROW}\n")
    assert read_battles(path)["id"][:] == ["1"]
    lines = before.count("\n")
    path = write(tmp_path, f"{before}{HEADER}\n{ROW}\n2\n")
    assert f"row 2 (line {lines + 3})" in message_of(path)


@pytest.mark.parametrize("name", ["battles.CSV", "battles.Csv"])
def test_ending_may_be_in_any_case(tmp_path, name):
    assert read_battles(write(tmp_path, f"{HEADER}\n{ROW}\n", name))["id"][:] == ["1"]


def test_unknown_ending_is_refused_and_the_known_named(tmp_path):
    path = write(tmp_path, f"{HEADER}\n{ROW}\n", "battles.xlsx")
    assert message_of(path) == (
        f"{path}: unknown file ending '.xlsx'; known: {', '.join(READERS)}, and these compressed: "
        f"{', '.join(COMPRESSIONS)}"
    )


def test_missing_file_is_refused(tmp_path):
    assert message_of(tmp_path / "absent.csv").startswith(f"{tmp_path / 'absent.csv'}: no such file")


def test_empty_data_frame_is_refused():
    assert message_of(pd.DataFrame([GOOD])[:0]).startswith("data frame: no battles")


def test_partly_labelled_data_frame_names_the_row_and_column():
    rows = [{**GOOD, **dict(zip(OUTCOMES, [1, 0, 0], strict=True))}, {**GOOD, "id": "2"}]
    assert message_of(pd.DataFrame(rows)).startswith(
        "data frame: row 2, column 'winner_model_a': missing, NaN or infinite"
    )


def test_long_values_are_cut_in_messages(tmp_path):
    path = write(tmp_path, f"{HEADER}\n1,{'x' * 100_000},[],[]\n")
    assert len(message_of(path)) < 200 + len(str(path))


def test_broken_byte_far_into_a_file_is_named_by_its_row_and_column(tmp_path):
    good = "".join(f'{number},"[""p""]",[],[]\n' for number in range(2000)).encode()
    content = HEADER.encode() + b"\n" + good + b"x,\xff,,\n"
    assert "row 2001, column 'prompt': byte 0xff is not UTF-8" in message_of(write(tmp_path, content))


def test_message_about_an_id_with_a_newline_is_one_line():
    assert "\n" not in message_of(pd.DataFrame([{**GOOD, "id": "a\nb"}] * 2))


def test_deeply_nested_json_is_refused_like_any_other(tmp_path):
    path = write(tmp_path, f"{HEADER}\n1,{'[' * 100_000},[],[]\n")
    assert "row 1, column 'prompt'" in message_of(path)


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA])
def test_missing_outcomes_of_every_battle_of_a_data_frame_are_no_labels(absent):
    frame = pd.DataFrame([{**GOOD, **dict.fromkeys(OUTCOMES, absent)}])
    assert not is_labelled(read_battles(frame))


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA])
def test_missing_model_of_a_data_frame_is_empty_and_missing_id_is_refused(absent):
    frame = pd.DataFrame([{**GOOD, "model_a": "m"}, {**GOOD, "id": "2", "model_a": absent}])
    assert read_battles(frame)["model_a"][:] == ["m", ""]
    assert "row 2, column 'id': empty" in message_of(frame.assign(id=["1", absent]))


def texts_of(battle):
    return [battle[name] for name in TEXT_COLUMNS]


def outcome_of(battle):
    return [battle[name] for name in OUTCOMES]


def test_battles_without_ids_are_numbered_from_1():
    frame = pd.DataFrame([GOOD, GOOD]).drop(columns="id")
    assert read_battles(frame)["id"][:] == ["1", "2"]


def test_file_of_plain_strings_has_one_turn_each(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path, csv_text([{"id": 1, "prompt": "Hi\nyou", "response_a": "[a", "response_b": ""}]))
    assert texts_of(read_battles(path)[0]) == [["Hi\nyou"], ["[a"], [""]]
    assert f"{path}: texts are plain strings (not JSON lists), read as one turn each" in caplog.messages


PLAIN = dict.fromkeys(TEXT_COLUMNS, "plain")
PRINTED = {"prompt": "['p', 'q']", "response_a": """['a', "b's"]""", "response_b": "['c', None]"}


@pytest.mark.parametrize("lists", [1, 9], ids=["first plain", "first lists"])
def test_rows_of_lists_and_of_plain_texts_are_read_as_what_they_are_and_counted(tmp_path, caplog, lists):
    rows = [{**GOOD, "id": number, **PRINTED} for number in range(lists)]
    rows += [{**GOOD, "id": number, **PLAIN} for number in range(lists, 10)]
    path = write(tmp_path, csv_text(rows))
    battles = read_battles(path)
    assert texts_of(battles[0]) == [["p", "q"], ["a", "b's"], ["c", ""]]
    assert texts_of(battles[9]) == [["plain"]] * 3
    kinds = ("lists of turns", "plain texts") if lists == 1 else ("plain texts", "lists of turns")
    assert f"{path}: 1 row of {kinds[0]} among rows of {kinds[1]}" in caplog.messages


@pytest.mark.parametrize("prompt", ["[1, 2]", "[[]]", "[a]"])
def test_a_plain_row_of_other_lists_is_text(tmp_path, prompt):
    rows = [{**GOOD, **PLAIN, "id": number} for number in range(3)]
    rows.append({**GOOD, "id": 3, "prompt": prompt, "response_a": "[2]", "response_b": "[1]"})
    assert texts_of(read_battles(write(tmp_path, csv_text(rows)))[3]) == [[prompt], ["[2]"], ["[1]"]]


def test_one_plain_text_in_a_row_of_lists_is_refused(tmp_path):
    rows = [{**GOOD, "id": 1, "prompt": "plain"}, *({**GOOD, "id": number} for number in (2, 3))]
    assert "row 1, column 'prompt': 'plain' is not a JSON list" in message_of(write(tmp_path, csv_text(rows)))


def test_lists_as_numpy_prints_them_are_refused(tmp_path):
    rows = [{**GOOD, "prompt": "['one' 'two']", "response_a": "['a' 'b']", "response_b": "['c' 'd']"}]
    message = message_of(write(tmp_path, csv_text(rows)))
    assert "row 1, column 'prompt': \"['one' 'two']\" is not a JSON list; it is a list as numpy prints it" in message
    assert "write it with json.dumps" in message


def test_plain_answers_may_look_like_json_lists(tmp_path):
    rows = [{"id": number, **dict.fromkeys(TEXT_COLUMNS, "plain")} for number in range(9)]
    rows[4]["response_a"] = '["red", "blue"]'
    assert read_battles(write(tmp_path, csv_text(rows)))["response_a"][4] == ['["red", "blue"]']


def test_a_chosen_answer_may_be_json_of_its_own():
    row = {"prompt": "give me JSON", "chosen": '[{"a": 1}]', "rejected": "no"}
    battle = read_battles(pd.DataFrame([row]))[0]
    assert sorted([battle["response_a"], battle["response_b"]]) == [['[{"a": 1}]'], ["no"]]


def test_a_winner_counts_where_the_outcome_columns_are_empty():
    row = {**GOOD, **dict.fromkeys(OUTCOMES), "winner": "model_b"}
    assert outcomes(read_battles(pd.DataFrame([row]))).tolist() == [[0, 1, 0]]


VOTES = {
    **{"model_a": [1, 0, 0], "model_b": [0, 1, 0], "tie": [0, 0, 1]},
    **{"tie (bothbad)": [0, 0, 1], "both_bad": [0, 0, 1], "bothbad": [0, 0, 1], "both bad": [0, 0, 1]},
    **{"A": [1, 0, 0], "b": [0, 1, 0], " Model_A ": [1, 0, 0], "": [None] * 3},
}


@pytest.mark.parametrize(("winner", "outcome"), VOTES.items(), ids=VOTES)
def test_winner_names_the_outcome(winner, outcome):
    assert outcome_of(read_battles(pd.DataFrame([{**GOOD, "winner": winner}]))[0]) == outcome


@pytest.mark.parametrize("winner", ["gpt-4", "0", "1", "True", "nan", "model_0", "tie (perhaps)"])
def test_unknown_winner_is_refused_and_the_known_named(winner):
    message = message_of(pd.DataFrame([{**GOOD, "winner": winner}]))
    assert message.startswith(
        f"data frame: row 1, column 'winner': '{winner}' is not an outcome by name; say what each"
    )
    assert f'outcomes, {{"{winner}": …}}, with model_a, model_b or tie; known by name: model_a, model_b, tie' in message


@pytest.mark.parametrize(("column", "value"), [("winner", "model_a"), ("p_b", 0.5)])
def test_partly_labelled_file_names_the_column_that_it_has(column, value):
    frame = pd.DataFrame([{**GOOD, column: value}, {**GOOD, "id": "2", column: None}])
    assert f"row 2, column '{column}'" in message_of(frame)


@pytest.mark.parametrize(
    ("p", "outcome"), [(0, [1, 0, 0]), ("0.25", [0.75, 0.25, 0]), (1.0, [0, 1, 0]), (None, [None] * 3)]
)
def test_p_b_is_the_probability_that_b_is_better(p, outcome):
    assert outcome_of(read_battles(pd.DataFrame([{**GOOD, "p_b": p}]))[0]) == outcome


@pytest.mark.parametrize("p", [-0.1, 1.1, "nan", "inf"])
def test_p_b_that_is_no_probability_is_refused(p):
    assert "row 1, column 'p_b': " in message_of(pd.DataFrame([{**GOOD, "p_b": p}]))


def test_judge_goes_before_votes():
    rows = [{**GOOD, "p_b": 0.25, "winner": "tie", **dict(zip(OUTCOMES, [1, 0, 0], strict=True))}]
    assert outcome_of(read_battles(pd.DataFrame(rows))[0]) == [0.75, 0.25, 0]


def test_probabilities_go_before_the_name_of_the_winner():
    rows = [{**GOOD, "winner": "model_b", **dict(zip(OUTCOMES, [0.5, 0.25, 0.25], strict=True))}]
    assert outcome_of(read_battles(pd.DataFrame(rows))[0]) == [0.5, 0.25, 0.25]


def said(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def parts(*messages):
    """Return messages as the arena-140k set has them."""
    return [{**one, "content": [{"type": "text", "text": one["content"], "image": None}]} for one in messages]


def test_arena_33k_is_read():
    """Columns of lmsys/chatbot_arena_conversations."""
    row = {
        **{"question_id": "58210e39b3fd4441a2bd4a518bb44c2d", "model_a": "chatglm-6b", "model_b": "koala-13b"},
        **{"winner": "model_b", "judge": "arena_user_973", "turn": 1, "anony": True, "language": "English"},
        **{"conversation_a": said("What?", "This."), "conversation_b": said("What?", "That.")},
        **{"tstamp": 1682351591.1322, "toxic_chat_tag": {"roberta-large": {"flagged": False}}},
    }
    [battle] = read_battles(pd.DataFrame([row]))
    assert (battle["id"], battle["model_a"], battle["model_b"]) == (row["question_id"], "chatglm-6b", "koala-13b")
    assert texts_of(battle) == [["What?"], ["This."], ["That."]]
    assert outcome_of(battle) == [0, 1, 0]


def test_arena_55k_is_read():
    """Columns of lmarena-ai/arena-human-preference-55k: those of the competition."""
    row = {**GOOD, "model_a": "x", "model_b": "y", **dict(zip(OUTCOMES, [0, 0, 1], strict=True))}
    assert outcome_of(read_battles(pd.DataFrame([row]))[0]) == [0, 0, 1]


def test_arena_100k_is_read():
    """Columns of lmarena-ai/arena-human-preference-100k."""
    row = {
        **{"question_id": "c4b9", "model_a": "m1", "model_b": "m2", "winner": "tie (bothbad)", "is_code": False},
        **{"conversation_a": said("q1", "a1", "q2", "a2"), "conversation_b": said("q1", "b1", "q2", "b2")},
    }
    [battle] = read_battles(pd.DataFrame([row]))
    assert texts_of(battle) == [["q1", "q2"], ["a1", "a2"], ["b1", "b2"]]
    assert (battle["id"], outcome_of(battle)) == ("c4b9", [0, 0, 1])


def test_arena_140k_is_read(tmp_path):
    """Columns of lmarena-ai/arena-human-preference-140k, contents in parts, out of Parquet."""
    row = {
        **{"id": "aa-01", "model_a": "m1", "model_b": "m2", "winner": "both_bad", "evaluation_order": 1},
        **{"conversation_a": parts(*said("q", "a")), "conversation_b": parts(*said("q", "b"))},
        **{"conv_metadata": {"turns": 1}, "language": "pl"},
    }
    pd.DataFrame([row]).to_parquet(tmp_path / "arena.parquet")
    [battle] = read_battles(tmp_path / "arena.parquet")
    assert texts_of(battle) == [["q"], ["a"], ["b"]]
    assert (battle["id"], outcome_of(battle)) == ("aa-01", [0, 0, 1])


def test_images_of_an_arena_conversation_are_left_out_and_counted(caplog):
    question = {
        "role": "user",
        "content": [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is it?"}],
    }
    rows = [{name: [question, *said(name, first="assistant")] for name in FORMATS["conversations"].needs}]
    assert read_battles(pd.DataFrame(rows))["prompt"][0] == ["What is it?"]
    assert [text for *_, text in warnings_of(caplog)] == ["data frame: 2 parts of messages, not text (image), left out"]


S = {"role": "system", "content": "S"}
EMPTY = {"role": "assistant", "content": ""}
CONVERSATIONS = {
    "system message": ([S, *said("q", "a")], ["S\n\nq"], ["a"]),
    "system message before the second turn": ([*said("q", "a"), S, *said("r", "b")], ["q", "S\n\nr"], ["a", "b"]),
    "two user messages": ([*said("q"), *said("r", "a")], ["q\n\nr"], ["a"]),
    "two assistant messages": ([*said("q", "a"), *said("b", first="assistant")], ["q"], ["a\n\nb"]),
    "assistant first": (said("hello", "q", "a", first="assistant"), ["", "q"], ["hello", "a"]),
    "no last answer": (said("q", "a", "r"), ["q", "r"], ["a", ""]),
    "empty answer": ([*said("q"), EMPTY, *said("r", "b")], ["q", "r"], ["", "b"]),
}


@pytest.mark.parametrize(("conversation", "prompt", "response"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversation_becomes_rounds(conversation, prompt, response):
    frame = pd.DataFrame([{"conversation_a": conversation, "conversation_b": conversation}])
    assert texts_of(read_battles(frame)[0]) == [prompt, response, response]


@pytest.mark.parametrize(
    ("conversation", "prompt"),
    [
        ([S, *said("hello", "q", "a", first="assistant")], ["S", "q"]),
        ([*said("q"), S, *said("a", first="assistant")], ["q\n\nS"]),
    ],
    ids=["assistant first", "between question and answer"],
)
def test_system_message_is_said_once(conversation, prompt):
    frame = pd.DataFrame([{"conversation_a": conversation, "conversation_b": conversation}])
    assert read_battles(frame)["prompt"][0] == prompt


@pytest.mark.parametrize(
    "other",
    [said("Q", "a"), said("q", "a", "r", "a"), [S, *said("q", "a")], []],
    ids=["text", "more", "system", "none"],
)
def test_conversations_of_differing_user_turns_are_refused(other):
    message = message_of(pd.DataFrame([{"conversation_a": said("q", "a"), "conversation_b": other}]))
    assert message.startswith("data frame: row 1, column 'conversation_b': its user turns differ")


def test_conversations_are_read_out_of_csv(tmp_path):
    row = {"conversation_a": json.dumps(said("q", "a")), "conversation_b": json.dumps(said("q", "b"))}
    assert texts_of(read_battles(write(tmp_path, csv_text([row])))[0]) == [["q"], ["a"], ["b"]]


HUMAN = "\n\nHuman: "
ASSISTANT = "\n\nAssistant: "
PREFERENCES = {
    "texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ["q"], ["good"], ["bad"]),
    "messages": (
        {
            **{"prompt": said("q"), "chosen": said("good", first="assistant")},
            **{"rejected": said("bad", first="assistant")},
        },
        *(["q"], ["good"], ["bad"]),
    ),
    "rounds before": (
        {
            **{"prompt": said("q", "a", "r"), "chosen": said("good", first="assistant")},
            **{"rejected": said("bad", first="assistant")},
        },
        *(["q", "r"], ["a", "good"], ["a", "bad"]),
    ),
    "implicit prompt": (
        {"chosen": said("q", "a", "r", "good"), "rejected": said("q", "a", "r", "bad")},
        *(["q", "r"], ["a", "good"], ["a", "bad"]),
    ),
    "UltraFeedback": (
        {"prompt": "q", "chosen": said("q", "good"), "rejected": said("q", "bad"), "score_chosen": 8.5},
        *(["q"], ["good"], ["bad"]),
    ),
    "a prompt with other white space": (
        {"prompt": "q\n", "chosen": said("q", "good"), "rejected": said("q", "bad")},
        *(["q"], ["good"], ["bad"]),
    ),
    "hh-rlhf": (
        {
            "chosen": f"{HUMAN}q{ASSISTANT}a{HUMAN}r{ASSISTANT}good",
            "rejected": f"{HUMAN}q{ASSISTANT}a{HUMAN}r{ASSISTANT}bad",
        },
        *(["q", "r"], ["a", "good"], ["a", "bad"]),
    ),
    "system message": (
        {
            **{"prompt": [S, *said("q")], "chosen": said("good", first="assistant")},
            **{"rejected": said("bad", first="assistant")},
        },
        *(["S\n\nq"], ["good"], ["bad"]),
    ),
    "null prompt": (
        {"prompt": None, "chosen": said("q", "good"), "rejected": said("q", "bad")},
        *(["q"], ["good"], ["bad"]),
    ),
}


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), PREFERENCES.values(), ids=PREFERENCES)
def test_preference_is_a_battle_that_the_chosen_response_wins(row, prompt, chosen, rejected):
    [battle] = read_battles(pd.DataFrame([row]))
    assert battle["prompt"] == prompt
    placed = {"response_a": [1, 0, 0], "response_b": [0, 1, 0]}
    won = next(name for name in placed if battle[name] == chosen)
    assert outcome_of(battle) == placed[won]
    assert battle[({*placed} - {won}).pop()] == rejected


@pytest.mark.parametrize("prompt", [[S, *said("q")], [S]])
def test_system_message_of_the_prompt_stays_where_the_conversation_is_whole(prompt):
    row = {"prompt": prompt, "chosen": said("q", "good"), "rejected": said("q", "bad")}
    assert read_battles(pd.DataFrame([row]))["prompt"][0] == ["S\n\nq"]


BAD_PREFERENCES = {
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "row 1, column 'chosen': no prompt"),
    "no chosen": ({"prompt": "q", "chosen": None, "rejected": "bad"}, "row 1, column 'chosen': empty"),
    "no rejected": ({"prompt": "q", "chosen": "good", "rejected": []}, "row 1, column 'rejected': empty"),
    "two prompts": (
        {"chosen": said("q", "good"), "rejected": said("r", "bad")},
        "row 1, column 'rejected': its user turns differ from those of chosen",
    ),
    "number": ({"prompt": "q", "chosen": 5, "rejected": 4}, "row 1, column 'chosen': 5 is not a list; write a text"),
    "one column": ({"prompt": "q", "chosen": "good"}, "column 'rejected' is missing"),
}


@pytest.mark.parametrize(("row", "fragment"), BAD_PREFERENCES.values(), ids=BAD_PREFERENCES)
def test_bad_preference_is_refused(row, fragment):
    assert message_of(pd.DataFrame([row])).startswith(f"data frame: {fragment}")


def preferences(count=1):
    return pd.DataFrame(
        {
            **{"id": [str(number) for number in range(count)], "prompt": [f"q{number}" for number in range(count)]},
            **{"chosen": ["good"] * count, "rejected": ["bad"] * count},
            **{"chosen_model": ["winner"] * count, "rejected_model": ["loser"] * count},
        }
    )


def test_coin_puts_about_half_of_the_chosen_second():
    second = np.mean([text == ["good"] for text in read_battles(preferences(4000))["response_b"]])
    assert abs(second - 0.5) < 0.032  # four standard deviations of a fair coin


def test_outcome_and_models_follow_the_coin():
    for battle in read_battles(preferences(50)):
        first = battle["response_a"] == ["good"]
        assert outcome_of(battle) == ([1, 0, 0] if first else [0, 1, 0])
        assert [battle["model_a"], battle["model_b"]] == (["winner", "loser"] if first else ["loser", "winner"])


def test_coin_depends_on_the_seed():
    once, again, other = (read_battles(preferences(50), seed=seed)["model_a"][:] for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_coin_depends_on_no_order_and_no_id():
    frame = preferences(50)
    turned = frame.iloc[::-1].assign(id=frame["id"].tolist())
    assert read_battles(turned)["model_a"][::-1] == read_battles(frame)["model_a"][:]


def test_reward_bench_is_read():
    row = {
        **{"prompt": "q", "chosen": "good", "rejected": "bad", "chosen_model": "big", "rejected_model": "small"},
        **{"subset": "alpacaeval-easy", "id": 30},
    }
    [battle] = read_battles(pd.DataFrame([row]))
    assert (battle["id"], battle["source"]) == ("30", "alpacaeval-easy")
    assert {battle["model_a"], battle["model_b"]} == {"big", "small"}


def test_source_of_a_row_goes_before_its_subset_and_the_name_of_the_file(tmp_path):
    rows = [{**GOOD, "id": n, "source": a, "subset": b} for n, (a, b) in enumerate([("x", "y"), ("", "y"), ("", "")])]
    assert read_battles(write(tmp_path, csv_text(rows), "mine.csv"))["source"][:] == ["x", "y", "mine"]


OTHER = {"key": "7", "question": '["p"]', "one": '["a"]', "two": '["b"]', "winner": "model_b"}
NAMES = {"id": "key", "prompt": "question", "response_a": "one", "response_b": "two"}


def test_columns_of_other_names_are_mapped(tmp_path):
    [battle] = read_battles(Source(str(write(tmp_path, csv_text([OTHER]))), columns=NAMES))
    assert (battle["id"], texts_of(battle), outcome_of(battle)) == ("7", [["p"], ["a"], ["b"]], [0, 1, 0])


def test_column_that_is_mapped_to_null_is_not_there(tmp_path):
    path = str(write(tmp_path, csv_text([OTHER])))
    assert not is_labelled(read_battles(Source(path, columns={**NAMES, "winner": None})))


def test_mapping_takes_the_place_of_a_column_of_that_name(tmp_path):
    path = str(write(tmp_path, csv_text([GOOD])))
    swapped = Source(path, columns={"response_a": "response_b", "response_b": "response_a"})
    assert texts_of(read_battles(swapped)[0]) == [["p"], ["b"], ["a"]]


def test_mapped_columns_may_be_those_of_preference_data(tmp_path):
    path = write(tmp_path, csv_text([{"instruction": "q", "better": "good", "worse": "bad"}]))
    columns = {"prompt": "instruction", "chosen": "better", "rejected": "worse"}
    assert read_battles(Source(str(path), columns=columns))["prompt"][0] == ["q"]


MAPPINGS = {
    "ours": ({"promt": "question"}, "columns.promt: unknown column (did you mean 'prompt'?); known: "),
    "theirs": (
        {"prompt": "qestion"},
        "columns.prompt: the file has no column 'qestion' (did you mean 'question'?); it has",
    ),
    "nothing near": (
        {"prompt": "zzz"},
        "columns.prompt: the file has no column 'zzz'; it has: key, question, one, two",
    ),
}


@pytest.mark.parametrize(("columns", "fragment"), MAPPINGS.values(), ids=MAPPINGS)
def test_wrong_mapping_is_refused_and_the_nearest_name_is_said(tmp_path, columns, fragment):
    path = write(tmp_path, csv_text([OTHER]))
    assert message_of(Source(str(path), columns=columns)).startswith(f"{path}: {fragment}")


def test_mapped_column_that_is_there_twice_is_refused(tmp_path):
    path = write(tmp_path, "id,question,question,response_a,response_b\n1,[],[],[],[]\n")
    assert "column 'question' occurs twice" in message_of(Source(str(path), columns={"prompt": "question"}))


def test_format_may_be_named(tmp_path):
    path = str(write(tmp_path, csv_text([{**GOOD, "chosen": "x", "rejected": "y"}])))
    assert texts_of(read_battles(Source(path, format="competition"))[0]) == [["p"], ["a"], ["b"]]
    assert "column 'conversation_a' is missing" in message_of(Source(path, format="conversations"))
    assert "format: no format 'preferences' (did you mean 'preference'?)" in message_of(
        Source(path, format="preferences")
    )


def test_ids_of_several_sources_begin_with_the_name_of_the_source(tmp_path):
    paths = [write(tmp_path, csv_text([GOOD]), name) for name in ("one.csv", "two.csv")]
    battles = read_battles(paths)
    assert battles["id"][:] == ["one/1", "two/1"]
    assert battles["source"][:] == ["one", "two"]


def test_sources_of_the_same_stem_are_named_by_their_paths(tmp_path):
    (tmp_path / "x").mkdir()
    paths = [write(tmp_path, csv_text([GOOD]), name) for name in ("a.csv", "x/a.csv")]
    assert read_battles(paths)["id"][:] == [f"{path}/1" for path in paths]


def test_source_that_is_given_twice_is_numbered(tmp_path):
    path = write(tmp_path, csv_text([GOOD]))
    assert read_battles([path, path])["id"][:] == [f"{path}#1/1", f"{path}#2/1"]


def test_sources_may_be_of_several_formats_and_kinds(tmp_path):
    path = write(tmp_path, csv_text([{**GOOD, "winner": "tie"}]), "arena.csv")
    assert read_battles([str(path), preferences(1), Source(str(path))])["id"][:] == [
        f"{path}#1/1",
        "table/0",
        f"{path}#3/1",
    ]


def test_labelled_and_unlabelled_sources_do_not_mix(tmp_path):
    paths = [
        write(tmp_path, csv_text([{**GOOD, "winner": "tie"}]), "one.csv"),
        write(tmp_path, csv_text([GOOD]), "two.csv"),
    ]
    assert message_of(paths).startswith(
        "one + two: row 2, column 'winner_model_a': missing, NaN or infinite; label every battle"
    )


def test_list_without_sources_is_refused_in_one_line():
    message_of([])


def test_ids_of_several_data_sets_of_battles_begin_with_their_names():
    battles = read_battles(pd.DataFrame([GOOD]))
    assert read_battles([battles, swap(battles)])["id"][:] == ["table#1/1", "table#2/1"]


@pytest.mark.parametrize(("column", "value"), [("weight", "heavy"), ("prompt", 5)])
def test_data_set_of_battles_with_a_column_of_another_type_is_refused_in_one_line(column, value):
    battles = read_battles(pd.DataFrame([GOOD])).remove_columns(column).add_column(column, [value])
    assert message_of(battles).startswith("data set: ")


def test_weight_of_a_source_multiplies_the_weights_of_its_rows(tmp_path):
    paths = [
        write(tmp_path, csv_text([{**GOOD, "weight": "0.5"}]), "a.csv"),
        write(tmp_path, csv_text([GOOD]), "b.csv"),
    ]
    assert weights(read_battles([Source(str(path), weight=3) for path in paths])).tolist() == [1.5, 3]


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_weight_of_a_source_is_above_0(tmp_path, weight):
    path = write(tmp_path, csv_text([GOOD]))
    assert message_of(Source(str(path), weight=weight)).startswith(f"{path}: weight: {weight}; give a number above 0")


def grouped(prompts=10, each=4):
    count = prompts * each
    rows = [{**GOOD, "id": number, "prompt": json.dumps([f"p{number % prompts}"])} for number in range(count)]
    return csv_text(rows)


def test_limit_draws_whole_prompt_groups(tmp_path):
    source = Source(str(write(tmp_path, grouped())), limit=9)
    prompts = [prompt for [prompt] in read_battles(source)["prompt"]]
    assert len(prompts) == 12
    assert all(prompts.count(prompt) == 4 for prompt in prompts)


def test_limit_draws_by_the_seed(tmp_path):
    source = Source(str(write(tmp_path, grouped())), limit=9)
    once, again, other = (read_battles(source, seed=seed)["id"][:] for seed in (0, 0, 1))
    assert once == again
    assert once != other


def test_limit_above_the_number_of_battles_keeps_all(tmp_path):
    assert len(read_battles(Source(str(write(tmp_path, grouped())), limit=99))) == 40


def test_limit_of_0_is_refused(tmp_path):
    path = write(tmp_path, grouped())
    assert message_of(Source(str(path), limit=0)).startswith(f"{path}: limit: 0; give a positive number")


def test_battles_that_must_not_be_held_out_are_marked(tmp_path):
    paths = [write(tmp_path, csv_text([GOOD]), name) for name in ("one.csv", "two.csv")]
    battles = read_battles([str(paths[0]), Source(str(paths[1]), validation=False)])
    assert battles["fold"][:] == [-1, TRAIN_ONLY]


def test_swapped_file_is_the_swapped_battles(tmp_path):
    row = {**GOOD, "model_a": "x", "model_b": "y", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    names = {"response": None, "model": None, "winner_model": None}
    other = {f"{stem}_{side}": row[f"{stem}_{'b' if side == 'a' else 'a'}"] for stem in names for side in "ab"}
    battles, swapped = (read_battles(pd.DataFrame([one])) for one in (row, {**row, **other}))
    assert swapped.to_dict() == swap(battles).to_dict()


@pytest.fixture(scope="module")
def sample():
    return read_battles("sample")


def grades(battles):
    return np.array([[int(row[name].removeprefix("grade-")) for name in ("model_a", "model_b")] for row in battles])


def test_sample_to_train_on_is_labelled_and_the_one_to_predict_is_not(sample):
    assert is_labelled(sample)
    assert not is_labelled(read_battles("sample", role="test"))


def test_sample_has_at_least_80_prompts_of_at_least_4_answers(sample):
    answers = defaultdict(set)
    for row in sample:
        answers[tuple(row["prompt"])] |= {tuple(row["response_a"]), tuple(row["response_b"])}
    assert len(answers) >= 80
    assert min(map(len, answers.values())) >= 4


def test_sample_favours_no_position(sample):
    share_a, share_b, _ = outcomes(sample).mean(axis=0)
    assert abs(share_a - share_b) <= 0.03


def test_sample_outcome_is_the_order_of_the_grades_and_ties_are_equal_grades(sample):
    better = np.sign(np.diff(grades(sample), axis=1)[:, 0])  # 1 where B has the higher grade
    np.testing.assert_array_equal(outcomes(sample), np.stack([better < 0, better > 0, better == 0], axis=1))


def test_sample_is_not_won_by_length(sample):
    lengths = np.array([[sum(map(len, row[name])) for name in ("response_a", "response_b")] for row in sample])
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    decided = (outcomes(sample)[:, 2] == 0) & (longer != 0)
    won = np.where(longer > 0, outcomes(sample)[:, 0], outcomes(sample)[:, 1])[decided]
    assert 0.40 <= won.mean() <= 0.60


def test_sample_to_predict_shares_no_prompt_with_the_one_to_train_on(sample):
    test_prompts = set(map(tuple, read_battles("sample", role="test")["prompt"]))
    assert not test_prompts & set(map(tuple, sample["prompt"]))


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_columns_that_are_not_read_are_named(kind, tmp_path, caplog):
    frame = pd.DataFrame([{"question": "q", "chosen": "a", "rejected": "b", "margin": 2, "turn": 1, "input": "x"}])
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    with caplog.at_level(logging.INFO, "rewardmodel"):
        read_battles(Source(str(path), columns={"prompt": "question"}))
    unread = [line for line in caplog.messages if "not read" in line]
    assert unread == [f"{path}: columns that are not read: margin, turn, input"]


def test_the_advice_for_a_missing_column_is_for_whoever_gave_the_battles(tmp_path):
    frame = battle_frame(1).rename(columns={"response_b": "second"})
    path = write_csv(frame, tmp_path / "battles.csv")
    for battles, role, advice in (
        (frame, "test", "rename it in the table"),
        (Dataset.from_pandas(frame), "train", "rename it in the table"),
        (path, "train", "map it with data.train.columns in a recipe, in Python with Source(path, columns={…})"),
        (path, "test", "map it with data.test.columns in a recipe, in Python with Source(path, columns={…})"),
    ):
        with pytest.raises(InputError) as caught:
            read_battles(battles, role=role)
        assert str(caught.value).endswith(advice)
