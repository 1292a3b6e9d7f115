import dataclasses
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import battle_frame, make_tokenizer, write_csv
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES, outcomes, swap
from rewardmodel.config import PromptConfig
from rewardmodel.errors import InputError
from rewardmodel.formats import read_battles
from rewardmodel.pairs import MODEL_COLUMNS, MODEL_INPUTS, ROWS, PadCollator, length_sorted_batches, retention, tokenize
from rewardmodel.prompt import PromptEncoder

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
    assert rows.features == ROWS
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
    batch = PadCollator(0)(list(rows))
    assert batch["labels"].shape == (8, 3)
    assert batch["labels"].isnan().all()


def test_swapped_battles_exchange_their_segments_labels_and_nothing_of_their_length(battles, tokenizer):
    config = PromptConfig(max_length=1000)
    rows, swapped = (tokenize(data, tokenizer, config) for data in (battles, swap(battles)))
    for row, other in zip(rows, swapped, strict=True):
        assert row["length"] == other["length"]
        assert row["labels"] == [other["labels"][column] for column in (1, 0, 2)]
        assert [row["full"], row["kept"]] == [[other[name][text] for text in (0, 2, 1)] for name in ("full", "kept")]


def test_a_format_of_the_battles_does_not_matter(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    assert tokenize(battles.with_format("numpy"), tokenizer, PROMPT)[:] == rows[:]


@pytest.mark.parametrize(
    ("changes", "key"), [({"template": "nonsense"}, "template"), ({"max_length": 5}, "max_length")]
)
def test_a_prompt_that_cannot_be_made_is_refused(changes, key, battles, tokenizer):
    with pytest.raises(InputError, match=rf"^prompt\.{key}: "):
        tokenize(battles, tokenizer, dataclasses.replace(PROMPT, **changes))


def test_a_template_that_encodes_each_response_alone_is_refused(battles, tokenizer):
    alone = "{% for round in rounds %}{{ round.prompt }} {{ round.response }}{% endfor %}"
    with pytest.raises(InputError, match=r"^prompt\.template: .*each response alone.* use one with response_a"):
        tokenize(battles, tokenizer, dataclasses.replace(PROMPT, template=alone))


def test_rows_of_two_processes_are_those_of_one(battles, tokenizer, tmp_path, monkeypatch):
    rows = tokenize(battles, tokenizer, PROMPT)
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "other"))
    by_two = tokenize(battles, tokenizer, PROMPT, num_proc=2)
    assert len(by_two.cache_files) == 2
    assert by_two.features == ROWS
    assert by_two[:] == rows[:]


TOKENIZE_A_FILE = """
import json, sys
from transformers import AutoTokenizer
from rewardmodel.config import PromptConfig
from rewardmodel.formats import read_battles
from rewardmodel.pairs import tokenize

sys.stdin.readline()
rows = tokenize(read_battles(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2]), PromptConfig(max_length=160))
print(json.dumps({"files": [file["filename"] for file in rows.cache_files], "rows": rows[:]}))
"""


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
    assert retention(rows) == {
        "battles_cut": 0.5,
        "prompt_kept": 1.0,
        "responses_kept": 46 / 61,
        "less_kept_response": 10.0,
    }


def test_retention_of_tokenised_battles_counts_the_ones_that_lost_text(battles, tokenizer):
    whole, cut = (tokenize(battles, tokenizer, PromptConfig(max_length=length)) for length in (1000, 150))
    counted = [kept != full for kept, full in zip(cut["kept"][:], cut["full"][:], strict=True)]
    assert retention(whole)["battles_cut"] == 0
    assert retention(whole)["responses_kept"] == retention(whole)["prompt_kept"] == 1
    assert 0 < retention(cut)["battles_cut"] == np.mean(counted) < 1


def row(ids, segments, labels=(1.0, 0.0, 0.0), weight=1.0):
    return {"input_ids": ids, "segment_ids": segments, "labels": list(labels), "weight": weight}


def test_a_batch_is_padded_on_the_right_to_its_longest_row():
    rows = [row([5, 6, 7], [0, 1, 2]), row([8], [1], labels=(0.0, 0.25, 0.75), weight=2.5)]
    batch = PadCollator(pad_token_id=9)(rows)
    assert set(batch) == {*MODEL_INPUTS, "labels", "weight"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[0, 1, 2], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 0, 0], [0, 0.25, 0.75]]
    assert batch["weight"].tolist() == [1, 2.5]
    assert {batch[name].dtype for name in MODEL_INPUTS} == {torch.int64}
    assert {batch[name].dtype for name in ("labels", "weight")} == {torch.float32}


def test_padding_is_told_by_the_mask_even_where_the_padding_id_is_a_true_token():
    batch = PadCollator(pad_token_id=0)([row([3, 0, 0], [0, 1, 2]), row([0], [2])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_batch_takes_tensors_and_arrays_without_a_warning():
    given = row(np.array([1, 2], np.int32), torch.tensor([0, 1], dtype=torch.int8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = PadCollator(0)([given])
    assert batch["input_ids"].tolist() == [[1, 2]]


lengths_and_budget = st.tuples(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))


@given(lengths_and_budget)
def test_every_row_is_in_exactly_one_batch(drawn):
    lengths, budget = np.array(drawn[0], dtype=np.int64), drawn[1]
    batches = list(length_sorted_batches(lengths, budget))
    assert sorted(number for batch in batches for number in batch.tolist()) == list(range(len(lengths)))
    assert all(len(batch) for batch in batches)


@given(lengths_and_budget)
def test_no_batch_is_over_the_budget_unless_it_is_one_row(drawn):
    lengths, budget = np.array(drawn[0], dtype=np.int64), drawn[1]
    for batch in length_sorted_batches(lengths, budget):
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


@given(lengths_and_budget)
def test_the_longest_rows_come_first_and_equal_ones_in_their_order(drawn):
    lengths, budget = np.array(drawn[0], dtype=np.int64), drawn[1]
    numbers = [number for batch in length_sorted_batches(lengths, budget) for number in batch.tolist()]
    assert numbers == sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))


@given(lengths_and_budget)
def test_no_batch_could_take_the_row_after_it(drawn):
    lengths, budget = np.array(drawn[0], dtype=np.int64), drawn[1]
    for batch in list(length_sorted_batches(lengths, budget))[:-1]:
        assert (len(batch) + 1) * lengths[batch].max() > budget


def test_batches_of_a_known_example():
    batches = [batch.tolist() for batch in length_sorted_batches(np.array([3, 9, 4, 4, 20]), batch_tokens=12)]
    assert batches == [[4], [1], [2, 3, 0]]
