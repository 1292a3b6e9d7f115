import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.prompt.truncation import (
    MIN_ROUND_TOKENS,
    TRUNCATIONS,
    count_kept_tokens,
    cut_head,
    cut_middle,
    cut_tail,
    keep_rounds,
    measure_retention,
    share_evenly,
    share_in_proportion,
)

IDS, MARK = list(range(10)), [-1, -2]

every_share = pytest.mark.parametrize("share", [share_evenly, share_in_proportion])
every_cut = pytest.mark.parametrize("cut", [cut_middle, cut_tail, cut_head])
every_policy = pytest.mark.parametrize("policy", TRUNCATIONS)

# One, two or three responses to a prompt, and a budget below or above what they take.
texts_and_budget = st.tuples(st.lists(st.integers(0, 2000), min_size=2, max_size=4).map(tuple), st.integers(0, 5000))


@pytest.mark.parametrize(
    ("texts", "budget", "kept"),
    [
        ((0, 10, 100), 50, (0, 10, 40)),
        ((0, 100, 10), 50, (0, 40, 10)),
        ((0, 100, 100), 51, (0, 25, 25)),
        ((1000, 1000, 10), 100, (25, 65, 10)),
        ((1000, 10, 10), 100, (80, 10, 10)),
        ((1000, 1000, 1000), 100, (26, 37, 37)),
        ((10, 1000, 1000), 100, (10, 45, 45)),
        ((30, 30, 40), 100, (30, 30, 40)),
        ((0, 0, 0), 0, (0, 0, 0)),
        ((5, 5, 5), 0, (0, 0, 0)),
        ((1000, 1000), 100, (25, 75)),
        ((1000, 10), 100, (90, 10)),
        ((10, 1000), 100, (10, 90)),
        ((0, 10, 100, 100), 90, (0, 10, 40, 40)),
        ((0, 10, 30, 100), 90, (0, 10, 30, 50)),
        ((1000, 50, 50, 50), 100, (25, 25, 25, 25)),
    ],
)
def test_the_longest_response_gives_way_and_a_quarter_is_the_prompts(texts, budget, kept):
    assert share_evenly(texts, budget) == kept


@pytest.mark.parametrize(
    ("texts", "budget", "kept"),
    [
        ((10, 20, 30), 60, (10, 20, 30)),
        ((10, 20, 30), 30, (5, 10, 15)),
        ((0, 10, 100), 50, (0, 4, 45)),
        ((1, 1000, 1000), 100, (0, 49, 49)),
        ((100, 300), 40, (10, 30)),
        ((5, 5, 5), 0, (0, 0, 0)),
        ((0, 0, 0), 0, (0, 0, 0)),
    ],
)
def test_in_proportion_every_text_keeps_the_same_share(texts, budget, kept):
    assert share_in_proportion(texts, budget) == kept


@every_share
@given(drawn=texts_and_budget)
def test_a_share_is_never_above_the_budget_nor_above_the_text_nor_negative(share, drawn):
    texts, budget = drawn
    kept = share(texts, budget)
    assert len(kept) == len(texts)
    assert sum(kept) <= budget
    assert all(0 <= stays <= size for stays, size in zip(kept, texts, strict=True))


@every_share
@given(drawn=texts_and_budget)
def test_a_share_is_everything_when_it_fits(share, drawn):
    texts, budget = drawn
    assert share(texts, sum(texts) + budget) == texts


@every_share
@given(drawn=texts_and_budget)
def test_a_share_leaves_less_than_a_token_a_text_unused(share, drawn):
    texts, budget = drawn
    if sum(texts) > budget:
        assert sum(share(texts, budget)) > budget - len(texts)


@every_share
@given(drawn=texts_and_budget, order=st.randoms(use_true_random=False))
def test_another_order_of_the_responses_only_reorders_what_stays_of_them(share, drawn, order):
    (prompt, *responses), budget = drawn
    numbers = list(range(len(responses)))
    order.shuffle(numbers)
    kept = share((prompt, *responses), budget)
    reordered = share((prompt, *(responses[number] for number in numbers)), budget)
    assert reordered == (kept[0], *(kept[1:][number] for number in numbers))


@given(drawn=texts_and_budget)
def test_no_response_that_is_cut_keeps_less_than_another_response(drawn):
    texts, budget = drawn
    kept = share_evenly(texts, budget)
    for stays, size in zip(kept[1:], texts[1:], strict=True):
        assert stays == size or stays == max(kept[1:])


@given(drawn=texts_and_budget)
def test_the_prompt_keeps_a_quarter_of_the_budget_if_it_needs_it(drawn):
    texts, budget = drawn
    assert share_evenly(texts, budget)[0] >= min(texts[0], budget // 4)


@pytest.mark.parametrize(
    ("cut", "size", "kept"),
    [
        (cut_middle, 6, [0, 1, -1, -2, 8, 9]),
        (cut_middle, 7, [0, 1, 2, -1, -2, 8, 9]),
        (cut_middle, 4, [0, -1, -2, 9]),
        (cut_middle, 3, [0, 1, 2]),
        (cut_tail, 6, [0, 1, 2, 3, -1, -2]),
        (cut_tail, 4, [0, 1, -1, -2]),
        (cut_tail, 3, [0, 1, 2]),
        (cut_head, 6, [-1, -2, 6, 7, 8, 9]),
        (cut_head, 4, [-1, -2, 8, 9]),
        (cut_head, 3, [7, 8, 9]),
        *((cut, 0, []) for cut in (cut_middle, cut_tail, cut_head)),
        *((cut, size, IDS) for cut in (cut_middle, cut_tail, cut_head) for size in (10, 11)),
    ],
)
def test_a_cut_of_ten_tokens(cut, size, kept):
    assert cut(IDS, size, MARK) == kept


@every_cut
@given(count=st.integers(0, 60), size=st.integers(0, 80), mark=st.integers(0, 9))
def test_a_cut_fills_its_size_and_text_kept_counts_it_without_the_mark(cut, count, size, mark):
    kept = cut(list(range(count)), size, [-1] * mark)
    assert len(kept) == min(count, size)
    assert count_kept_tokens(count, size, mark) == sum(token >= 0 for token in kept)


@pytest.mark.parametrize(
    ("full", "size", "mark", "kept"), [(10, 10, 3, 10), (10, 12, 3, 10), (10, 9, 3, 6), (10, 5, 3, 2), (10, 4, 3, 4)]
)
def test_the_mark_is_no_text(full, size, mark, kept):
    assert count_kept_tokens(full, size, mark) == kept


def kept_of(rounds, budget, overhead=10, mark=3, share=share_evenly):
    return keep_rounds(rounds, lambda count: budget - overhead * count, mark, share)


@pytest.mark.parametrize(
    ("rounds", "budget", "kept"),
    [
        ([(50, 50, 50)] * 4, 640, [(50, 50, 50)] * 4),
        # 380 - 2 * 150 - 3 * 10 - 3 = 47: a token too few for a third round
        ([(50, 50, 50)] * 4, 380, [(50, 50, 50)] * 2),
        ([(50, 50, 50)] * 4, 381, [(12, 18, 18), (50, 50, 50), (50, 50, 50)]),
        # an older round of 15 tokens needs no more than these
        ([(100, 0, 0), (5, 5, 5), (50, 50, 50)], 200, [(5, 5, 5), (50, 50, 50)]),
        # a conversation of one round needs no mark for rounds that are left out
        ([(100, 100, 100)], 110, [(26, 37, 37)]),
        ([(1, 1, 1), (100, 100, 100)], 113, [(26, 37, 37)]),
        ([(100, 300)], 60, [(12, 38)]),
    ],
)
def test_the_latest_rounds_stay_and_the_oldest_go(rounds, budget, kept):
    assert kept_of(rounds, budget) == kept


def test_the_oldest_round_that_stays_is_cut_as_the_policy_says():
    rounds = [(0, 10, 100), (50, 50, 50)]
    assert kept_of(rounds, 223, share=share_evenly) == [(0, 10, 40), (50, 50, 50)]
    assert kept_of(rounds, 223, share=share_in_proportion) == [(0, 4, 45), (50, 50, 50)]


# The fixed text of a round is at least its texts' names, and the encoder refuses a budget that is any smaller.
conversations = st.tuples(
    st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=1, max_size=6),
    st.integers(3, 60),
    st.integers(0, 9),
    st.integers(MIN_ROUND_TOKENS, 1500),
).map(lambda drawn: (drawn[0], drawn[1], drawn[2], drawn[1] + drawn[2] + drawn[3]))


@every_policy
@settings(max_examples=50)
@given(drawn=conversations)
def test_rounds_that_stay_never_exceed_the_budget(policy, drawn):
    rounds, overhead, mark, budget = drawn
    kept = kept_of(rounds, budget, overhead, mark, TRUNCATIONS[policy].share)
    left_out = mark if len(kept) < len(rounds) else 0
    assert 1 <= len(kept) <= len(rounds)
    assert sum(map(sum, kept)) + left_out + overhead * len(kept) <= budget
    assert all(size >= 0 for texts in kept for size in texts)


@every_policy
@settings(max_examples=50)
@given(drawn=conversations)
def test_every_round_after_the_oldest_that_stays_is_whole(policy, drawn):
    rounds, overhead, mark, budget = drawn
    kept = kept_of(rounds, budget, overhead, mark, TRUNCATIONS[policy].share)
    assert kept[1:] == rounds[len(rounds) - len(kept) + 1 :]


@every_policy
@settings(max_examples=50)
@given(drawn=conversations)
def test_a_conversation_that_fits_is_whole(policy, drawn):
    rounds, overhead, mark, more = drawn
    budget = sum(map(sum, rounds)) + overhead * len(rounds)
    for room in (budget, budget + more):
        assert kept_of(rounds, room, overhead, mark, TRUNCATIONS[policy].share) == rounds


@every_policy
@settings(max_examples=50)
@given(drawn=conversations)
def test_a_swap_of_the_responses_swaps_what_stays_of_them(policy, drawn):
    rounds, overhead, mark, budget = drawn
    swapped = [(prompt, b, a) for prompt, a, b in rounds]
    limits = (budget, overhead, mark, TRUNCATIONS[policy].share)
    assert kept_of(swapped, *limits) == [(prompt, b, a) for prompt, a, b in kept_of(rounds, *limits)]


@every_policy
@settings(max_examples=50)
@given(drawn=conversations)
def test_a_cut_text_is_as_long_as_its_share(policy, drawn):
    rounds, overhead, mark, budget = drawn
    share, cut = TRUNCATIONS[policy]
    kept = kept_of(rounds, budget, overhead, mark, share)
    for texts, sizes in zip(rounds[len(rounds) - len(kept) :], kept, strict=True):
        assert tuple(len(cut([0] * full, size, [1] * mark)) for full, size in zip(texts, sizes, strict=True)) == sizes


def test_retention_of_a_known_example():
    full = np.array([[10, 20, 30], [4, 5, 6], [40, 10, 100], [6, 5, 4]])
    kept = np.array([[10, 20, 15], [4, 5, 6], [20, 10, 60], [6, 5, 4]])
    assert measure_retention(full, kept) == {
        "battles_cut": 0.5,
        "prompt_kept": 40 / 60,
        "responses_kept": 125 / 180,
        "less_kept_response": (15 + 5 + 10 + 4) / 4,
    }


def test_retention_of_responses_that_stand_alone():
    kept = measure_retention(np.array([[10, 20], [10, 40]]), np.array([[10, 20], [5, 10]]))
    assert kept == {"battles_cut": 0.5, "prompt_kept": 0.75, "responses_kept": 0.5, "less_kept_response": 15.0}


def test_retention_of_empty_texts_is_a_number():
    nothing = np.zeros((2, 3), int)
    assert np.isfinite(list(measure_retention(nothing, nothing).values())).all()
    assert measure_retention(nothing, nothing)["battles_cut"] == 0
