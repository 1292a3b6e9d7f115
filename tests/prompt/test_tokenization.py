import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from builders import battle_frame, make_tokenizer, write_csv
from datasets import Dataset

from rewardmodel.battles import OUTCOMES, TEACHER_COLUMNS, outcomes, swap, with_column
from rewardmodel.config.schema import PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.errors import InputError
from rewardmodel.prompt.encoder import EncodedSequence, PromptEncoder
from rewardmodel.prompt.tokenization import (
    MODEL_COLUMNS,
    TOKEN_ROW_FEATURES,
    measure_row_retention,
    pack_sequences,
    shared_token_fraction,
    tokenize,
)

PROMPT = PromptConfig(max_length=160)


@pytest.fixture(scope="module")
def battles(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARDMODEL_CACHE", str(tmp_path_factory.mktemp("battles")))
        return read_battles(battle_frame())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder that tokenised rows are kept in, empty at first."""
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def test_rows_keep_the_order_and_the_count_of_battles(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    texts = [battles[name][:] for name in ("prompt", "response_a", "response_b")]
    encoded = list(PromptEncoder(tokenizer, PROMPT)(*texts))
    assert len(rows) == len(battles)
    assert rows["input_ids"][:] == [row.input_ids.tolist() for row in encoded]
    assert rows["segment_ids"][:] == [row.segment_ids.tolist() for row in encoded]
    assert rows["full"][:] == [list(row.full) for row in encoded]
    assert rows["kept"][:] == [list(row.kept) for row in encoded]
    assert rows["length"][:] == [len(row.input_ids) for row in encoded]
    assert np.array_equal(np.array(rows["labels"][:]), outcomes(battles))


def test_rows_follow_a_selection_of_battles(battles, tokenizer):
    backwards = battles.select(range(len(battles) - 1, -1, -1))
    rows = tokenize(battles, tokenizer, PROMPT)
    assert tokenize(backwards, tokenizer, PROMPT)["input_ids"][:] == rows["input_ids"][::-1]


def test_rows_have_the_columns_and_types_that_are_promised(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    assert rows.features == TOKEN_ROW_FEATURES
    assert set(MODEL_COLUMNS) <= set(rows.column_names)
    for row in rows:
        assert len(row["input_ids"]) == len(row["segment_ids"]) == row["length"] <= 160
        assert set(row["segment_ids"]) == {0, 1, 2}
        assert len(row["full"]) == len(row["kept"]) == 3
        assert all(kept <= full for kept, full in zip(row["kept"], row["full"], strict=True))


def test_weights_of_battles_are_those_of_their_rows(battles, tokenizer):
    weights = np.linspace(0.5, 2, len(battles)).astype(np.float32)
    weighted = battles.remove_columns("weight").add_column("weight", weights)
    assert np.array_equal(np.float32(tokenize(weighted, tokenizer, PROMPT)["weight"][:]), weights)


def test_unlabelled_battles_have_labels_that_are_no_numbers(tokenizer):
    rows = tokenize(read_battles(battle_frame(2).drop(columns=list(OUTCOMES))), tokenizer, PROMPT)
    assert np.isnan(np.array(rows["labels"][:], dtype=np.float64)).all()


def test_swapped_battles_exchange_their_segments_labels_and_nothing_of_their_length(battles, tokenizer):
    config = PromptConfig(max_length=1000)
    rows, swapped = (tokenize(data, tokenizer, config) for data in (battles, swap(battles)))
    for row, other in zip(rows, swapped, strict=True):
        assert row["length"] == other["length"]
        assert row["labels"] == [other["labels"][column] for column in (1, 0, 2)]
        assert [row["full"], row["kept"]] == [[other[name][text] for text in (0, 2, 1)] for name in ("full", "kept")]


def test_a_format_of_the_battles_does_not_matter(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    np.testing.assert_equal(tokenize(battles.with_format("numpy"), tokenizer, PROMPT)[:], rows[:])  # NaN is NaN


@pytest.mark.parametrize(
    ("changes", "key"), [({"template": "nonsense"}, "template"), ({"max_length": 5}, "max_length")]
)
def test_a_prompt_that_cannot_be_made_is_refused(changes, key, battles, tokenizer):
    with pytest.raises(InputError, match=rf"^prompt\.{key}: "):
        tokenize(battles, tokenizer, dataclasses.replace(PROMPT, **changes))


def test_a_template_that_encodes_each_response_alone_is_refused(battles, tokenizer):
    alone = "{% for round in rounds %}{{ round.prompt }} {{ round.response }}{% endfor %}"
    with pytest.raises(InputError, match=r"^prompt\.template: .* has response, but the objective needs response_a and"):
        tokenize(battles, tokenizer, dataclasses.replace(PROMPT, template=alone))


def test_rows_of_two_processes_are_those_of_one(battles, tokenizer, tmp_path, monkeypatch):
    rows = tokenize(battles, tokenizer, PROMPT)
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "other"))
    by_two = tokenize(battles, tokenizer, PROMPT, num_proc=2)
    assert len(by_two.cache_files) == 2
    assert by_two.features == TOKEN_ROW_FEATURES
    np.testing.assert_equal(by_two[:], rows[:])


TOKENIZE_A_FILE = """
import json, sys
from transformers import AutoTokenizer
from rewardmodel.config.schema import PromptConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.prompt.tokenization import tokenize

sys.stdin.readline()
rows = tokenize(read_battles(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2]), PromptConfig(max_length=160))
print(json.dumps({"files": [file["filename"] for file in rows.cache_files], "rows": rows[:]}))
"""


@pytest.mark.slow  # fresh processes
def test_a_file_is_tokenised_once_for_all_processes(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [str(write_csv(battle_frame(), tmp_path / "train.csv")), str(tmp_path / "tokenizer")]
    processes = [  # both import at the same time, then one works after the other
        subprocess.Popen(
            [sys.executable, "-c", TOKENIZE_A_FILE, *arguments],
            env={**os.environ, "PYTHONHASHSEED": seed}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    found = []
    for process in processes:
        shown = json.loads(process.communicate("go\n", timeout=120)[0])
        found.append((shown, [os.stat(file).st_mtime_ns for file in shown["files"]]))
    assert found[0] == found[1]
    assert len(found[0][0]["rows"]["input_ids"]) == 48


def files_of(rows: Dataset) -> list[tuple[str, int]]:
    return [(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in rows.cache_files]


def test_the_same_battles_and_settings_are_tokenised_once(battles, tokenizer, cache):
    first = files_of(tokenize(battles, tokenizer, PROMPT))
    assert files_of(tokenize(battles, make_tokenizer(), dataclasses.replace(PROMPT))) == first
    assert [str(file) for file in cache.iterdir()] == [file for file, _ in first]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 161},
        {"truncation": "head"},
        {"template": "encoder"},
        {"template": "{% for r in rounds %}{{ r.prompt }}|{{ r.response_a }}|{{ r.response_b }}{% endfor %}"},
    ],
    ids=["length", "policy", "template", "own template"],
)
def test_another_setting_is_another_file_in_the_cache(changes, battles, tokenizer, cache):
    first = tokenize(battles, tokenizer, PROMPT)
    other = tokenize(battles, tokenizer, dataclasses.replace(PROMPT, **changes))
    assert other.cache_files != first.cache_files
    assert len(list(cache.iterdir())) == 2
    encoder = PromptEncoder(tokenizer, dataclasses.replace(PROMPT, **changes))
    expected = next(encoder(*([battles[0][name]] for name in ("prompt", "response_a", "response_b"))))
    assert other[0]["input_ids"] == expected.input_ids.tolist()


def test_other_battles_are_another_file_in_the_cache(battles, tokenizer, cache):
    tokenize(battles, tokenizer, PROMPT)
    assert len(tokenize(battles.select(range(4)), tokenizer, PROMPT)) == 4
    assert len(list(cache.iterdir())) == 2


def test_the_cache_tells_tokenizers_apart(battles):
    framed, bare = (tokenize(battles, make_tokenizer(add_bos), PROMPT) for add_bos in (True, False))
    assert all(row["input_ids"][0] == 1 for row in framed)
    assert all(row["input_ids"][0] != 1 for row in bare)


def test_the_cache_tells_separators_apart(battles):
    config = PromptConfig(template="encoder", max_length=160)
    plain, separated = make_tokenizer(), make_tokenizer()
    separated.sep_token = "<end_of_turn>"
    assert plain.backend_tokenizer.to_str() == separated.backend_tokenizer.to_str()
    tokenize(battles, plain, config)
    assert all(2 in row["input_ids"] for row in tokenize(battles, separated, config))


def test_retention_of_rows_of_a_known_example():
    rows = Dataset.from_dict({"full": [[10, 20, 30], [4, 5, 6]], "kept": [[10, 20, 15], [4, 5, 6]]})
    assert measure_row_retention(rows) == {
        "battles_cut": 0.5,
        "prompt_kept": 1.0,
        "responses_kept": 46 / 61,
        "less_kept_response": 10.0,
    }


def test_retention_of_tokenised_battles_counts_the_ones_that_lost_text(battles, tokenizer):
    whole, cut = (tokenize(battles, tokenizer, PromptConfig(max_length=length)) for length in (1000, 150))
    counted = [kept != full for kept, full in zip(cut["kept"][:], cut["full"][:], strict=True)]
    assert measure_row_retention(whole)["battles_cut"] == 0
    assert measure_row_retention(whole)["responses_kept"] == measure_row_retention(whole)["prompt_kept"] == 1
    assert 0 < measure_row_retention(cut)["battles_cut"] == np.mean(counted) < 1


@pytest.fixture
def encoders(tokenizer):
    """Return how each encoding makes the sequences of a battle: one function from battles to lists of sequences."""

    def separately(battles, prompt):
        encoder = PromptEncoder(tokenizer, prompt, "separate")
        return [list(encoder(battles["prompt"][:], battles[name][:])) for name in ("response_a", "response_b")]

    def jointly(battles, prompt):
        encoder = PromptEncoder(tokenizer, prompt)
        texts = [battles[name][:] for name in ("prompt", "response_a", "response_b")]
        return [list(encoder(*texts)), list(encoder(texts[0], texts[2], texts[1]))]

    return {"joint": (jointly, PROMPT), "separate": (separately, PromptConfig("response", max_length=120))}


@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_a_row_holds_both_sequences_of_a_battle_and_their_beginning_once(encoding, encoders, battles, tokenizer):
    encode, prompt = encoders[encoding]
    rows = tokenize(battles, tokenizer, prompt, encoding=encoding, both_orders=True)
    for row, *expected in zip(rows, *encode(battles, prompt), strict=True):
        shared, *branches = row["branches"]
        assert shared + sum(branches) == row["length"] == len(row["input_ids"])
        for number, one in enumerate(expected):
            start = shared + sum(branches[:number])
            for column in ("input_ids", "segment_ids"):
                found = row[column][:shared] + row[column][start : start + branches[number]]
                assert found == getattr(one, column).tolist()
        differs = [row["input_ids"][shared], row["segment_ids"][shared]]
        other = [row["input_ids"][shared + branches[0]], row["segment_ids"][shared + branches[0]]]
        assert differs != other or 1 in branches  # no more could be shared


def test_one_order_is_the_first_of_both(battles, tokenizer):
    one, both = (tokenize(battles, tokenizer, PROMPT, both_orders=orders) for orders in (False, True))
    for alone, row in zip(one, both, strict=True):
        assert alone["branches"] == [0, alone["length"]]
        assert sum(row["branches"][:2]) == alone["length"]
        assert alone["input_ids"] == row["input_ids"][: alone["length"]]
        assert [alone[name] for name in ("full", "kept", "labels")] == [
            row[name] for name in ("full", "kept", "labels")
        ]


def encoded(ids, segments=None) -> EncodedSequence:
    return EncodedSequence(np.array(ids, np.int32), np.array(segments or [0] * len(ids), np.int8), (0,), (0,))


@pytest.mark.parametrize(
    ("sequences", "ids", "branches"),
    [
        ([encoded([1, 2, 3])], [1, 2, 3], [0, 3]),
        ([encoded([1, 2, 3]), encoded([1, 2, 4, 5])], [1, 2, 3, 4, 5], [2, 1, 2]),
        ([encoded([1, 2]), encoded([1, 2])], [1, 2, 2], [1, 1, 1]),
        ([encoded([1, 2]), encoded([1, 2, 3])], [1, 2, 2, 3], [1, 1, 2]),
        ([encoded([7]), encoded([7, 8])], [7, 7, 8], [0, 1, 2]),
        ([encoded([1, 2, 3], [0, 1, 1]), encoded([1, 2, 3], [0, 2, 2])], [1, 2, 3, 2, 3], [1, 2, 2]),
    ],
    ids=["one", "two", "the same", "a beginning of the other", "one token", "other segments"],
)
def test_sequences_are_merged_as_by_hand(sequences, ids, branches):
    merged = pack_sequences(sequences)
    assert merged.input_ids.tolist() == ids
    assert merged.branches == branches
    assert len(merged.segment_ids) == len(ids)


def test_what_is_saved_is_the_share_of_tokens_that_are_in_a_row_once():
    rows = Dataset.from_dict({"branches": [[10, 5, 5], [0, 20]], "length": [20, 20]})
    assert shared_token_fraction(rows) == pytest.approx(1 - 40 / 50)


def test_separate_rows_say_what_is_kept_of_prompt_and_responses(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PromptConfig("response", max_length=94), encoding="separate")
    joint = tokenize(battles, tokenizer, PromptConfig(max_length=1000))
    assert rows["full"][:] == joint["full"][:]
    assert any(kept != full for kept, full in zip(rows["kept"][:], rows["full"][:], strict=True))
    assert all(len(kept) == 3 for kept in rows["kept"])


def test_a_teachers_probabilities_are_in_the_rows_and_swap_with_the_responses(battles, tokenizer):
    assert np.isnan(np.array(tokenize(battles, tokenizer, PROMPT)["teacher"][:])).all()
    soft = np.random.default_rng(0).dirichlet([1, 1, 1], len(battles))
    for name, values in zip(TEACHER_COLUMNS, soft.T, strict=True):
        battles = with_column(battles, name, values)
    rows, swapped = (np.array(tokenize(one, tokenizer, PROMPT)["teacher"][:]) for one in (battles, swap(battles)))
    np.testing.assert_allclose(rows, soft, atol=1e-7)
    np.testing.assert_array_equal(swapped, rows[:, [1, 0, 2]])
