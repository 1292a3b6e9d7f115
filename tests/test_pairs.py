import dataclasses
import warnings

import numpy as np
import pytest
import torch
from conftest import battle_frame, make_tokenizer
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES, outcomes, swap
from rewardmodel.config import PromptConfig
from rewardmodel.errors import InputError
from rewardmodel.formats import read_battles
from rewardmodel.pairs import MODEL_COLUMNS, MODEL_INPUTS, ROWS, PadCollator, length_sorted_batches, share_cut, tokenize
from rewardmodel.prompt import PromptEncoder

PROMPT = PromptConfig(max_length=160)


@pytest.fixture(scope="module")
def battles():
    return read_battles(battle_frame())


def test_rows_keep_the_order_and_the_count_of_battles(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    encoded = list(PromptEncoder(tokenizer, PROMPT)(battles["prompt"], battles["response_a"], battles["response_b"]))
    assert len(rows) == len(battles)
    assert rows["input_ids"][:] == [row.input_ids for row in encoded]
    assert rows["segment_ids"][:] == [row.segment_ids for row in encoded]
    assert rows["full_length"][:] == [row.full_length for row in encoded]
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
        assert len(row["input_ids"]) == len(row["segment_ids"]) == row["length"] <= min(160, row["full_length"])
        assert set(row["segment_ids"]) == {0, 1, 2}


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


def test_a_format_of_the_battles_does_not_matter(battles, tokenizer):
    rows = tokenize(battles, tokenizer, PROMPT)
    assert tokenize(battles.with_format("numpy"), tokenizer, PROMPT)[:] == rows[:]


@pytest.mark.parametrize(
    ("changes", "key"), [({"template": "nonsense"}, "template"), ({"max_length": 5}, "max_length")]
)
def test_a_prompt_that_cannot_be_made_is_refused(changes, key, battles, tokenizer):
    with pytest.raises(InputError, match=rf"^prompt\.{key}: "):
        tokenize(battles, tokenizer, dataclasses.replace(PROMPT, **changes))


@pytest.fixture
def battles_on_disk(battles, tmp_path):
    battles.save_to_disk(tmp_path / "battles")
    return load_from_disk(tmp_path / "battles")


def test_battles_on_disk_are_tokenised_once_for_each_setting(battles_on_disk, tokenizer):
    first = tokenize(battles_on_disk, tokenizer, PROMPT)
    files = first.cache_files
    assert files  # written beside the battles
    assert tokenize(battles_on_disk, tokenizer, PROMPT).cache_files == files
    for config in (PromptConfig(max_length=200), PromptConfig(template="encoder", max_length=160)):
        other = tokenize(battles_on_disk, tokenizer, config)
        assert other.cache_files != files
        assert other["input_ids"][:] != first["input_ids"][:]


def test_the_cache_tells_tokenizers_apart(battles_on_disk):
    framed, bare = (tokenize(battles_on_disk, make_tokenizer(add_bos), PROMPT) for add_bos in (True, False))
    assert all(row["input_ids"][0] == 1 for row in framed)
    assert all(row["input_ids"][0] != 1 for row in bare)


def test_the_cache_tells_separators_apart(battles_on_disk):
    config = PromptConfig(template="encoder", max_length=160)
    plain, separated = make_tokenizer(), make_tokenizer()
    separated.sep_token = "<end_of_turn>"
    assert plain.backend_tokenizer.to_str() == separated.backend_tokenizer.to_str()
    tokenize(battles_on_disk, plain, config)
    assert all(2 in row["input_ids"] for row in tokenize(battles_on_disk, separated, config))


def rows_of(*full_and_kept):
    return Dataset.from_dict(
        {"length": [kept for _, kept in full_and_kept], "full_length": [full for full, _ in full_and_kept]}
    )


def test_share_cut_counts_the_battles_that_lost_tokens():
    assert share_cut(rows_of((10, 10), (20, 16), (16, 16), (17, 16))) == 0.5
    assert share_cut(rows_of((10, 10))) == 0.0
    assert share_cut(rows_of((11, 10))) == 1.0


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
