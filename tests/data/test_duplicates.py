import numpy as np
import pytest
from builders import from_columns
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.battles import OUTCOMES, swap
from rewardmodel.data import duplicates as module
from rewardmodel.data.duplicates import find_duplicates, find_near_duplicates, winner_signs
from rewardmodel.data.folds import assign_groups

A, B, TIE = np.eye(3).tolist()
ROUND = "Write a short poem about the sea, the wind and the harbour where my grandfather mended his nets "


def battles_of(rows, winners=None):
    """Return battles of one turn, each row (prompt, response a, response b)."""
    columns = {"id": [f"id{row}" for row in range(len(rows))]}
    columns |= {
        name: [[row[place]] for row in rows] for place, name in enumerate(("prompt", "response_a", "response_b"))
    }
    if winners is not None:
        columns |= dict(zip(OUTCOMES, np.transpose(winners).tolist(), strict=True))
    return from_columns(columns, "made")


def prompts_of(prompts):
    return assign_groups(battles_of([(prompt, f"a {row}", f"b {row}") for row, prompt in enumerate(prompts)]))


def jaccard(first, second):
    sets = [{text[i : i + 5] for i in range(len(text) - 4)} for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def plain(prompt):
    return "".join(prompt.lower().split())[:4000]


def test_a_battle_that_repeats_another_is_counted_without_the_first():
    found = find_duplicates(battles_of([("p", "x", "y"), ("p", "x", "y"), ("P ", "X", " y"), ("p", "x", "z")]))
    assert (found["battles"], found["sets"]) == (2, 1)
    assert found["examples"] == [["id0", "id1", "id2"]]


def test_a_repeat_may_have_a_and_b_exchanged():
    battles = battles_of([("p", "x", "y"), ("p", "y", "x")], [A, B])
    found = find_duplicates(battles)
    assert found["battles"] == 1
    assert found["label_conflicts"] == {"sets": 0, "battles": 0, "examples": []}


@pytest.mark.parametrize("changed", [("q", "x", "y"), ("p", "x", "x"), ("p", "xy", "")])
def test_another_text_is_no_repeat(changed):
    assert find_duplicates(battles_of([("p", "x", "y"), changed]))["battles"] == 0


def test_different_winners_of_the_same_battle_are_a_conflict():
    rows = [("p", "x", "y"), ("p", "y", "x"), ("p", "x", "y"), ("q", "x", "y"), ("q", "x", "y"), ("r", "x", "y")]
    conflicts = find_duplicates(battles_of(rows, [A, A, A, TIE, TIE, B]))["label_conflicts"]
    assert conflicts == {"sets": 1, "battles": 3, "examples": [["id0", "id1", "id2"]]}


def test_which_of_two_identical_responses_won_is_no_conflict_but_a_tie_and_a_winner_are():
    battles = battles_of([("p", "x", "x"), ("p", "x", "x")], [A, B])
    assert find_duplicates(battles)["label_conflicts"]["sets"] == 0
    assert find_duplicates(battles)["identical_responses"] == {"battles": 2, "decided": 2}
    tied = find_duplicates(battles_of([("p", "x", "x"), ("p", "x", "x")], [A, TIE]))
    assert tied["label_conflicts"]["sets"] == 1
    assert tied["identical_responses"] == {"battles": 2, "decided": 1}


def test_unlabelled_battles_have_no_conflicts():
    found = find_duplicates(battles_of([("p", "x", "y"), ("p", "y", "x")]))
    assert (found["battles"], found["label_conflicts"]["sets"]) == (1, 0)


def test_examples_are_few():
    rows = [(f"p{number}", "x", "y") for number in range(9) for _ in range(8)]
    found = find_duplicates(battles_of(rows))
    assert [len(ids) for ids in found["examples"]] == [5] * 5
    assert found["battles"] == 63


def test_winner_is_the_likeliest_outcome_and_even_chances_are_a_tie():
    soft = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4], [0.5, 0.5, 0], [0.4, 0.2, 0.4], [np.nan] * 3]
    assert winner_signs(np.array(soft)).tolist() == [1, -1, 0, 0, 0, 0]


outcome = st.sampled_from([A, B, TIE, [0.5, 0.5, 0.0], [0.2, 0.5, 0.3]])
table = st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("xyz"), st.sampled_from("xyz"), outcome), min_size=1)


@settings(deadline=None, max_examples=25)
@given(table, st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_row_order_or_on_who_stands_first(rows, random):
    battles = battles_of([row[:3] for row in rows], [row[3] for row in rows])
    order = list(range(len(rows)))
    random.shuffle(order)
    found = counts(find_duplicates(battles))
    assert counts(find_duplicates(battles.select(order))) == found
    assert counts(find_duplicates(swap(battles))) == found
    assert found[0] == len(rows) - len({(row[0], frozenset(row[1:3])) for row in rows})


def counts(found):
    conflicts = found["label_conflicts"]
    return found["battles"], found["sets"], conflicts["sets"], conflicts["battles"], found["identical_responses"]


def test_two_prompts_that_differ_in_a_word_are_found_with_their_similarity():
    prompts = [ROUND * 2, ROUND + ROUND.replace("nets", "sails"), "Something else that no other prompt here resembles"]
    found = find_near_duplicates(prompts_of(prompts))
    assert (found["prompts"], found["pairs"], found["battles"]) == (3, 1, 2)
    (example,) = found["examples"]
    assert set(example["ids"]) == {"id0", "id1"}
    assert example["similarity"] == pytest.approx(jaccard(*map(plain, prompts[:2])))


def test_equal_prompts_are_one_and_count_with_their_battles():
    found = find_near_duplicates(prompts_of([ROUND, ROUND.upper(), f"{ROUND} ", ROUND + "now"]))
    assert (found["prompts"], found["pairs"], found["battles"]) == (2, 1, 4)


def test_prompts_of_one_group_are_left_out_and_those_without_a_group_are_not():
    pair = [f"{letter} " * 60 for letter in "xy"]
    battles = battles_of([(ROUND, *pair), (ROUND + "now", *pair)])
    assert find_near_duplicates(assign_groups(battles))["pairs"] == 0
    assert find_near_duplicates(battles)["pairs"] == 1


def test_short_prompts_are_left_out():
    assert find_near_duplicates(prompts_of(["", "hi", "h i y o", "hello"]))["prompts"] == 1
    assert find_near_duplicates(prompts_of(["", "hi"]))["prompts"] == 0


def test_only_the_first_characters_count():
    start = "".join(map(str, range(2000)))[:4000]
    found = find_near_duplicates(prompts_of([start + "one", start + "another end"]))
    assert found["examples"][0]["similarity"] == 1
    found = find_near_duplicates(prompts_of([start[:3999] + "0", start[:3999] + "1"]))
    assert found["examples"][0]["similarity"] < 1


def test_characters_outside_the_basic_plane_and_other_scripts_are_compared():
    text = "".join(chr(0x1F600 + number % 64) + chr(0x4E00 + number) for number in range(100))
    found = find_near_duplicates(prompts_of([text, text + "再", "無關的提示,完全不同的內容"]))
    assert found["pairs"] == 1


def test_threshold_is_kept():
    battles = prompts_of([ROUND, ROUND + "and the sky"])
    similarity = find_near_duplicates(battles, 0.5)["examples"][0]["similarity"]
    assert find_near_duplicates(battles, similarity)["pairs"] == 1
    assert find_near_duplicates(battles, np.nextafter(similarity, 1))["pairs"] == 0


edits = st.lists(st.tuples(st.integers(0, 400), st.text("abc defgh", min_size=1, max_size=12)), max_size=3)
bases = st.sampled_from([ROUND * 2, ROUND[::-1] * 2, "Explain recursion to a child of seven. " * 4, "x" * 40])


@st.composite
def edited_prompts(draw):
    text = draw(bases)
    for place, put in draw(edits):
        text = text[: place % len(text)] + put + text[place % len(text) :]
    return text


@pytest.mark.slow  # seconds a case
@settings(deadline=None, max_examples=40)
@given(st.lists(edited_prompts(), min_size=2, max_size=module.LEADERS + 1))
def test_brute_force_finds_the_same_pairs(prompts):
    distinct = sorted(set(map(plain, prompts)))
    similar = [jaccard(first, second) for n, first in enumerate(distinct) for second in distinct[:n]]
    battles = prompts_of(prompts)
    found = find_near_duplicates(battles)
    assert sum(value > 0.95 for value in similar) <= found["pairs"] <= sum(value >= 0.8 for value in similar)
    backwards = find_near_duplicates(battles.select(range(len(prompts))[::-1]))
    assert {**backwards, "examples": 0} == {**found, "examples": 0}


def test_the_same_battles_give_the_same_findings():
    battles = prompts_of([f"{ROUND}{number}" for number in range(9)])
    assert find_near_duplicates(battles) == find_near_duplicates(battles)


def test_as_many_pairs_are_compared_as_bands_promise():
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefghij"), 100)) for _ in range(2000)]
    changed = [text[:40] + "z" + text[41:] for text in texts]
    shared = 91 / 101  # one character stands in five pieces
    agree = (band_keys(texts) == band_keys(changed)).any(axis=1).mean()
    assert agree == pytest.approx(1 - (1 - shared**module.ROWS_PER_BAND) ** module.BANDS, abs=0.01)
    far = [text[:10] + "".join(f"{one}z" for one in text[10:80:2]) + text[80:] for text in texts]
    share = np.mean([jaccard(*pair) for pair in zip(texts, far, strict=True)])
    agree = (band_keys(texts) == band_keys(far)).any(axis=1).mean()
    assert agree == pytest.approx(1 - (1 - share**module.ROWS_PER_BAND) ** module.BANDS, abs=0.03)


def band_keys(texts):
    return np.stack([module._band_keys(module._signature(text)) for text in texts])


def test_a_full_bucket_is_compared_with_its_first_members_only():
    pairs = module._candidates(np.zeros((1000, 8), np.uint64))
    assert len(pairs) == sum(999 - leader for leader in range(module.LEADERS))
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert pairs[:, 0].max() == module.LEADERS - 1


def test_batches_do_not_change_what_is_found(monkeypatch):
    battles = prompts_of([f"{ROUND}{number % 7} {'the moon ' * (number % 3)}" for number in range(40)])
    found = find_near_duplicates(battles)
    monkeypatch.setattr(module, "PAIRS_PER_BATCH", 2)
    assert find_near_duplicates(battles) == found
    assert found["pairs"] > 0


def test_battles_without_an_outcome_contradict_none():
    rows, unknown = [("p", "x", "y")] * 3, [np.nan] * 3
    assert find_duplicates(battles_of(rows, [A, unknown, A]))["label_conflicts"]["sets"] == 0
    assert find_duplicates(battles_of(rows, [A, unknown, B]))["label_conflicts"]["sets"] == 1
    assert find_duplicates(battles_of(rows, [unknown] * 3))["label_conflicts"]["sets"] == 0
