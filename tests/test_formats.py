import csv
import io
import json
import logging
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel import formats
from rewardmodel.battles import FEATURES, OUTCOMES, is_labelled, outcomes, weights
from rewardmodel.errors import InputError
from rewardmodel.formats import read_battles

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
    assert battles.features == FEATURES
    assert is_labelled(battles)
    assert outcomes(battles).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert battles[0] == {
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
    assert warnings_of(caplog) == [("rewardmodel.formats", logging.WARNING, f"{path}: 4 null turns read as empty")]


@pytest.mark.parametrize("absent", ["", "  ", "null", "[]"])
def test_missing_response_has_an_empty_turn_a_prompt_turn_and_is_counted(tmp_path, caplog, absent):
    rows = [{**GOOD, "prompt": '["p", "q"]', "response_a": absent, "response_b": '["b", "c"]'}]
    path = write(tmp_path, csv_text(rows))
    assert read_battles(path)["response_a"][0] == ["", ""]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 1 missing texts read as empty turns"]


@pytest.mark.parametrize("absent", ["", "  ", "null", "[]"])
def test_missing_prompt_has_an_empty_turn_a_response_turn_and_is_counted(tmp_path, caplog, absent):
    rows = [{**GOOD, "prompt": absent, "response_a": '["a", "b"]', "response_b": '["c", "d"]'}]
    path = write(tmp_path, csv_text(rows))
    assert read_battles(path)["prompt"][0] == ["", ""]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 1 missing texts read as empty turns"]


def test_battle_without_any_text_has_one_empty_turn_of_each(tmp_path, caplog):
    path = write(tmp_path, f"{HEADER}\n1,,,\n{ROW.replace('1,', '2,', 1)}\n")
    battles = read_battles(path)
    assert [battles[0][name] for name in ("prompt", "response_a", "response_b")] == [[""]] * 3
    assert battles["prompt"][1] == ["p"]
    assert [text for *_, text in warnings_of(caplog)] == [f"{path}: 3 missing texts read as empty turns"]


@pytest.mark.parametrize("absent", [None, float("nan"), pd.NA])
def test_missing_response_of_a_data_frame_is_read_as_empty_and_counted(caplog, absent):
    battles = read_battles(pd.DataFrame([{**GOOD, "response_b": absent}]))
    assert battles["response_b"][0] == [""]
    assert [text for *_, text in warnings_of(caplog)] == ["data frame: 1 missing texts read as empty turns"]


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
    monkeypatch.setattr(formats, "ROWS_A_CHUNK", 3)
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
        ["column 'response_b' is missing", "columns needed: id"],
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
    "JSON number": (f'{HEADER}\n1,"[""p""]",[],5\n', ["row 1, column 'response_b'", "'5' is not a list"]),
    "number in the list": (
        f"{HEADER}\n{ROW}\n2,[7],[],[]\n",
        ["row 2, column 'prompt'", "the turn 7 is not text"],
    ),
    "NaN in the list": (f"{HEADER}\n1,[NaN],[],[]\n", ["row 1, column 'prompt'", "the turn nan is not text"]),
    "list in the list": (f'{HEADER}\n1,"[[""p""]]",[],[]\n', ["row 1, column 'prompt'", "is not text"]),
    "turns of b, without a prompt": (
        f'{HEADER}\n1,[],"[""a"",""b""]","[""b""]"\n',
        ["row 1, column 'response_b'", "1 turns", "has 2"],
    ),
    "column twice": (f"{HEADER},prompt\n{ROW},[]\n", ["column 'prompt' is there twice"]),
    "outcome column twice": (f"{LABELLED},winner_tie\n{ROW},1,0,0,0\n", ["column 'winner_tie' is there twice"]),
    "blank lines only": ("\n\r\n\n", ["the file is empty"]),
    "weight of 0": (f"{HEADER},weight\n{ROW},0\n", ["row 1, column 'weight'", "0.0; give a number above 0"]),
    "negative weight": (
        f"{HEADER},weight\n{ROW},1\n{ROW.replace('1,', '2,', 1)},-0.5\n",
        ["row 2, column 'weight'", "-0.5; give a number above 0"],
    ),
    "infinite weight": (f"{HEADER},weight\n{ROW},inf\n", ["row 1, column 'weight'", "inf"]),
    "nan for a weight": (f"{HEADER},weight\n{ROW},nan\n", ["row 1, column 'weight'", "nan"]),
    "blank weight": (f"{HEADER},weight\n{ROW},\n", ["row 1, column 'weight'", "give a number above 0"]),
    "word for a weight": (f"{HEADER},weight\n{ROW},heavy\n", ["row 1, column 'weight'", "'heavy' is no number"]),
    "turns of a": (
        f'{HEADER}\n1,"[""p""]","[""a"",""b""]",[]\n',
        ["row 1, column 'response_a'", "2 turns", "has 1"],
    ),
    "turns of b": (
        f'{HEADER}\n1,"[""p"",""q""]",[],"[""b""]"\n',
        ["row 1, column 'response_b'", "1 turns", "has 2"],
    ),
    "duplicate ids": (f"{HEADER}\n{ROW}\n{ROW}\n", ["row 2, column 'id'", "'1' was already used in row 1"]),
    "sum": (
        f"{LABELLED}\n{ROW},1,0,1\n",
        ["row 1, columns winner_model_a, winner_model_b, winner_tie", "1, 0, 1"],
    ),
    "negative": (f"{LABELLED}\n{ROW},2,-1,0\n", ["row 1, columns winner_model_a", "2, -1, 0"]),
    "word for an outcome": (
        f"{LABELLED}\n{ROW},yes,0,0\n",
        ["row 1, column 'winner_model_a'", "'yes' is no number"],
    ),
    "nan for an outcome": (f"{LABELLED}\n{ROW},1,0,nan\n", ["row 1, column 'winner_tie'", "no number"]),
    "empty id": (f"{HEADER}\n{ROW}\n{ROW.replace('1,', ' ,', 1)}\n", ["row 2, column 'id'", "empty"]),
    "too few fields": (f"{HEADER}\n{ROW}\n2,x\n", ["row 2 (line 3)", "2 fields", "header has 4"]),
    "too many fields": (f"{HEADER}\n{ROW},,\n", ["row 1 (line 2)", "6 fields", "header has 4"]),
    "line after a long field": (f'{HEADER}\n1,"[""p\n\n""]",[],[]\n2\n', ["row 2 (line 5)", "1 fields"]),
    "open quote": (f"{HEADER}\n{ROW[:-1]}\n", ["line 2", "check the quotes"]),
    "text after a quote": (f'{HEADER}\n{ROW}\n"2"x,[],[],[]\n', ["line 3", "check the quotes"]),
    "latin-1": (f"{HEADER}\n1,für,,\n".encode("latin-1"), [f"byte {len(HEADER) + 4} is not UTF-8"]),
    "partly labelled": (
        f"{LABELLED}\n{ROW},1,0,0\n{ROW.replace('1,', '2,', 1)},,,\n",
        ["row 2, column 'winner_model_a': no number; label every battle of a file, or none"],
    ),
    "partly labelled row": (
        f"{LABELLED}\n{ROW},1,0,0\n{ROW.replace('1,', '2,', 1)},1,,0\n",
        ["row 2, column 'winner_model_b': no number; label every battle of a file, or none"],
    ),
    "one outcome column blank": (
        f"{LABELLED}\n{ROW},1,0,\n",
        ["row 1, column 'winner_tie': no number; label every battle of a file, or none"],
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
    assert battles.features == FEATURES
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
    assert message_of(frame).startswith("data frame: column 'prompt' is there twice")


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
    assert message_of(path) == f"{path}: no format has the ending '.xlsx'; known: {', '.join(formats.READERS)}"


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_missing_file_or_folder_is_refused(tmp_path, name):
    assert message_of(tmp_path / name).startswith(f"{tmp_path / name}: no such file")


def test_empty_data_frame_is_refused():
    assert message_of(pd.DataFrame([GOOD])[:0]).startswith("data frame: no battles")


def test_partly_labelled_data_frame_names_the_row_and_column():
    rows = [{**GOOD, **dict(zip(OUTCOMES, [1, 0, 0], strict=True))}, {**GOOD, "id": "2"}]
    assert message_of(pd.DataFrame(rows)).startswith("data frame: row 2, column 'winner_model_a': no number")


def test_long_values_are_cut_in_messages(tmp_path):
    path = write(tmp_path, f"{HEADER}\n1,{'x' * 100_000},[],[]\n")
    assert len(message_of(path)) < 200 + len(str(path))


def test_broken_byte_far_into_a_file_is_counted_from_its_start(tmp_path):
    good = "".join(f'{number},"[""p""]",[],[]\n' for number in range(2000)).encode()
    content = HEADER.encode() + b"\n" + good + b"x,\xff,,\n"
    assert f"byte {content.index(0xFF)} is not UTF-8" in message_of(write(tmp_path, content))


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
