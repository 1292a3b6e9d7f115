import numpy as np
import pytest
from builders import from_columns
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewardmodel.battles import BATTLE_FEATURES, OUTCOMES, outcomes, swap
from rewardmodel.data.folds import TRIVIAL_RESPONSES, assign_folds, assign_groups, content_keys, limit_battles
from rewardmodel.errors import InputError

LONG = [f"answer {letter} " + letter * TRIVIAL_RESPONSES for letter in "uvwxyz"]


def battles_of(prompts, pairs=None, winners=None):
    """Return battles of one turn; without `pairs`, no two battles share their responses."""
    count = len(prompts)
    pairs = pairs or [(f"{row} {LONG[0]}", f"{row} {LONG[1]}") for row in range(count)]
    winners = np.eye(3)[np.arange(count) % 3 if winners is None else winners]
    columns = {
        "id": [f"id{row}" for row in range(count)],
        "prompt": [[prompt] for prompt in prompts],
        "response_a": [[first] for first, _ in pairs],
        "response_b": [[second] for _, second in pairs],
    }
    return from_columns(columns | dict(zip(OUTCOMES, winners.T.tolist(), strict=True)), "made")


def groups_of(*arguments):
    return assign_groups(battles_of(*arguments))["group"][:]


def by_id(battles, column):
    return dict(zip(battles["id"], battles[column], strict=True))


def closure(links):
    """Return the least row that each row is tied to, by brute force; rows that share a key are tied."""
    least = list(range(len(links)))
    for _ in links:
        for row, keys in enumerate(links):
            for other, other_keys in enumerate(links):
                if keys & other_keys:
                    least[row] = least[other] = min(least[row], least[other])
    return least


def partition(labels):
    return {frozenset(np.flatnonzero(np.array(labels) == label).tolist()) for label in set(labels)}


prompts = st.sampled_from([f"prompt {number}" for number in range(12)])
responses = st.tuples(st.sampled_from(LONG), st.sampled_from(LONG))
tables = st.lists(st.tuples(prompts, responses, st.integers(0, 2)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=50)
@given(tables)
def test_groups_are_the_closure_over_equal_prompts_and_equal_response_pairs(rows):
    drawn, pairs, winners = map(list, zip(*rows, strict=True))
    links = [{prompt, frozenset(pair)} for prompt, pair in zip(drawn, pairs, strict=True)]
    assert partition(groups_of(drawn, pairs, winners)) == partition(closure(links))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(prompts, st.integers(0, 2)), min_size=30, max_size=40),
    st.integers(2, 3),
    st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:The least populated class")
def test_no_group_and_no_prompt_stands_in_two_folds(rows, folds, seed):
    drawn, winners = map(list, zip(*rows, strict=True))
    battles = assign_groups(battles_of(drawn, None, winners))
    assume(len(set(battles["group"])) >= folds)
    split = assign_folds(battles, folds, seed)
    assert set(split["fold"]) <= set(range(folds))
    for column in ("group", "prompt"):
        homes = {}
        for key, fold in zip(map(str, split[column]), split["fold"], strict=True):
            assert homes.setdefault(key, fold) == fold


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(prompts, responses), min_size=1, max_size=25), st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_row_order(rows, random):
    battles = battles_of(*map(list, zip(*rows, strict=True)))
    order = list(range(len(rows)))
    random.shuffle(order)
    assert by_id(assign_groups(battles.select(order)), "group") == by_id(assign_groups(battles), "group")


@pytest.mark.parametrize("seed", range(3))
def test_folds_do_not_depend_on_row_order(seed):
    random = np.random.default_rng(seed)
    battles = battles_of([f"prompt {number}" for number in random.integers(40, size=200)])
    shuffled = battles.select(random.permutation(200))
    expected, found = (by_id(assign_folds(assign_groups(table), 5), "fold") for table in (battles, shuffled))
    assert found == expected


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(prompts, responses), min_size=1, max_size=20))
def test_groups_do_not_change_when_a_and_b_are_exchanged(rows):
    battles = battles_of(*map(list, zip(*rows, strict=True)))
    assert assign_groups(swap(battles))["group"][:] == assign_groups(battles)["group"][:]


def test_same_prompt_is_the_same_group_and_another_prompt_another():
    first, second, third = groups_of(["one", "two", "one"])
    assert first == third != second


def test_groups_are_numbered_from_0_without_gaps():
    assert sorted(set(groups_of(["a", "b", "a", "c", "d", "b"]))) == [0, 1, 2, 3]


def test_shared_response_pairs_tie_battles_transitively():
    u, v, w, x, y, z = LONG
    groups = groups_of(["1", "2", "2", "3", "4"], [(u, v), (u, v), (w, x), (w, x), (y, z)])
    assert len(set(groups[:4])) == 1
    assert groups[4] != groups[0]


def test_one_shared_response_ties_nothing():
    u, v, w, *_ = LONG
    assert len(set(groups_of(["1", "2"], [(u, v), (u, w)]))) == 2


def test_response_pair_counts_in_either_order():
    u, v, *_ = LONG
    assert len(set(groups_of(["1", "2"], [(u, v), (v, u)]))) == 1


@pytest.mark.parametrize(("length", "count"), [(TRIVIAL_RESPONSES // 2 - 1, 2), (TRIVIAL_RESPONSES // 2, 1)])
def test_short_response_pairs_tie_nothing(length, count):
    assert len(set(groups_of(["1", "2"], [("y" * length, "n" * length)] * 2))) == count


@pytest.mark.parametrize("variant", ["HOW are you?", " how  are\n you? ", "ｈｏｗ are you？"])  # the last is full-width
def test_case_space_and_width_of_a_prompt_do_not_matter(variant):
    assert len(set(groups_of(["How are you?", variant]))) == 1


def test_turns_are_not_joined_into_one():
    texts = {name: [["x"], ["x", ""]] for name in ("response_a", "response_b")}
    battles = from_columns({"id": ["1", "2"], "prompt": [["a b"], ["a", "b"]], **texts}, "made")
    assert len(set(assign_groups(battles)["group"])) == 2


def test_groups_and_folds_change_nothing_else():
    battles = battles_of([f"prompt {row % 9}" for row in range(30)])
    split = assign_folds(assign_groups(battles), 3)
    assert split.features == BATTLE_FEATURES
    assert split.column_names == list(BATTLE_FEATURES)
    names = ["group", "fold"]
    assert split.remove_columns(names).to_dict() == battles.remove_columns(names).to_dict()


@pytest.fixture(scope="module")
def thousand():
    random = np.random.default_rng(0)
    prompts = [f"prompt {number}" for number in random.integers(300, size=1000)]
    return assign_groups(battles_of(prompts, None, random.choice(3, size=1000, p=[0.45, 0.35, 0.2])))


def test_outcome_shares_of_folds_are_alike(thousand):
    split = assign_folds(thousand, 5)
    true, fold = outcomes(split), np.array(split["fold"])
    for number in range(5):
        assert np.abs(true[fold == number].mean(axis=0) - true.mean(axis=0)).max() < 0.03


def test_folds_are_of_about_the_same_size(thousand):
    sizes = np.bincount(assign_folds(thousand, 5)["fold"], minlength=5)
    assert sizes.sum() == 1000
    assert np.abs(sizes - 200).max() <= 10


def test_folds_are_deterministic_by_seed(thousand):
    once, again, other = (assign_folds(thousand, 5, seed)["fold"][:] for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_unlabelled_battles_are_split_too():
    battles = battles_of([f"prompt {row}" for row in range(20)])
    columns = battles.remove_columns(list(OUTCOMES)).to_dict()
    split = assign_folds(assign_groups(from_columns(columns, "made")), 4)
    assert np.bincount(split["fold"]).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("folds", [3, 5])
def test_fewer_groups_than_folds_are_refused_with_both_numbers(folds):
    battles = assign_groups(battles_of(["one", "two"] * 10))
    with pytest.raises(InputError, match=rf"^data.folds: {folds} parts need as many .* are 2; "):
        assign_folds(battles, folds)


def test_one_fold_is_refused():
    with pytest.raises(InputError, match=r"data\.folds: 1; .* set at least 2"):
        assign_folds(assign_groups(battles_of([f"prompt {row}" for row in range(9)])), 1)


def test_folds_are_filled_when_every_outcome_is_rarer_than_folds():
    battles = assign_groups(battles_of([f"prompt {row}" for row in range(9)]))
    assert set(assign_folds(battles, 5)["fold"]) == set(range(5))


def test_an_outcome_rarer_than_folds_is_no_warning():
    battles = assign_groups(battles_of([f"prompt {row}" for row in range(9)], None, [0] * 8 + [2]))
    assert set(assign_folds(battles, 5)["fold"]) == set(range(5))


@pytest.mark.slow  # seconds a case
@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 60), seed=st.integers(0, 99), prompts=st.integers(1, 20))
def test_limit_returns_whole_groups_of_at_least_count_battles_in_their_order(count, seed, prompts):
    random = np.random.default_rng(seed)
    battles = assign_groups(battles_of([f"prompt {number}" for number in random.integers(prompts, size=50)]))
    kept = limit_battles(battles, count, seed)
    groups = np.array(battles["group"])
    assert len(kept) >= min(count, 50)
    assert kept["id"][:] == [name for name, group in by_id(battles, "group").items() if group in set(kept["group"])]
    largest = np.bincount(groups).max()
    assert len(kept) < count + largest


def test_limit_is_deterministic_by_seed(thousand):
    once, again, other = (limit_battles(thousand, 100, seed)["id"][:] for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_limit_above_the_number_of_battles_returns_all(thousand):
    assert limit_battles(thousand, 5000)["id"][:] == thousand["id"][:]


def test_content_keys_are_in_common_where_groups_are():
    battles = battles_of(
        ["p", " P", "q", "r"], [(LONG[0], LONG[1]), (LONG[2], LONG[3]), (LONG[1], LONG[0]), ("yes", "no")]
    )
    keys = content_keys(battles)
    assert keys.dtype == np.uint64
    assert keys[0, 0] == keys[1, 0] != keys[2, 0]
    assert keys[0, 1] == keys[2, 1] != keys[1, 1]
    assert keys[3, 0] == keys[3, 1]  # a trivial pair ties nothing
    assert len(np.unique(keys)) == 3 + 2
