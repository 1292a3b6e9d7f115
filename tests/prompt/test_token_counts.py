import numpy as np
import pytest
from builders import from_columns, make_tokenizer

from rewardmodel.config.schema import PromptConfig
from rewardmodel.prompt import token_counts as module
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.template import JOINT_RESPONSES, TEMPLATES
from rewardmodel.prompt.token_counts import count_tokens
from rewardmodel.prompt.truncation import measure_retention

TOKENIZER = make_tokenizer()
TEXTS = ("prompt", "response_a", "response_b")


def battles_of(*texts):
    ids = [f"id{row}" for row in range(len(texts[0]))]
    return from_columns({"id": ids, **dict(zip(TEXTS, texts, strict=True))}, "made")


def encoder(template="instruction", max_length=256, **settings):
    encoding = "joint" if "response_a" in TEMPLATES.get(template, template) else "separate"
    return PromptEncoder(TOKENIZER, PromptConfig(template=template, max_length=max_length, **settings), encoding)


def long_battles():
    """Return battles of one to three rounds, some far too long, some with empty turns."""
    random = np.random.default_rng(0)
    turns = random.integers(1, 4, 40)
    return battles_of(
        *([["word " * int(random.integers(0, 300)) for _ in range(count)] for count in turns] for _ in range(3))
    )


def test_tokens_are_those_of_the_encoder():
    battles, made = long_battles(), encoder(max_length=100_000)
    tokens = count_tokens(battles, made)
    encoded = list(made(*(battles[name][:] for name in TEXTS)))
    full = np.array([row.full for row in encoded])
    assert tokens["battles"] == 40
    assert tokens["lengths"]["prompt"].tolist() == full[:, 0].tolist()
    assert tokens["lengths"]["both_responses"].tolist() == full[:, 1:].sum(axis=1).tolist()
    assert tokens["lengths"]["longer_response"].tolist() == full[:, 1:].max(axis=1).tolist()
    assert tokens["lengths"]["sequence"].tolist() == [len(row.input_ids) for row in encoded]


@pytest.mark.parametrize("truncation", ["balanced", "head"])
def test_retention_is_that_of_the_encoder_at_each_budget(truncation):
    battles = long_battles()
    tokens = count_tokens(battles, encoder(truncation=truncation))
    assert (tokens["max_length"], tokens["truncation"]) == (256, truncation)
    assert [row["max_length"] for row in tokens["retention"]] == [256, *module.MAX_LENGTHS]
    for row in tokens["retention"][:4]:
        made = encoder(max_length=row["max_length"], truncation=truncation)
        encoded = list(made(*(battles[name][:] for name in TEXTS)))
        full, kept = (np.array([getattr(one, name) for one in encoded]) for name in ("full", "kept"))
        assert row["kept"] == pytest.approx(measure_retention(full, kept))


def test_right_cut_keeps_what_stands_in_the_first_tokens_of_the_whole_layout():
    battles, whole = long_battles(), encoder(max_length=100_000)
    tokens = count_tokens(battles, encoder())
    full, kept = [], []
    for rounds in whole.tokenize_rounds(*(battles[name][:] for name in TEXTS)):
        fixed = whole.fixed_tokens(len(rounds))
        marks = []  # of each token of the layout, the text that it belongs to, or -1
        for before, (number, text) in zip(fixed.before, fixed.turns, strict=True):
            marks += [-1] * len(before) + [text] * len(rounds[number][text])
        full.append([marks.count(text) for text in range(3)])
        kept.append([marks[:512].count(text) for text in range(3)])
    (row,) = (row for row in tokens["retention"] if row["max_length"] == 512)
    assert row["right_cut"] == pytest.approx(measure_retention(np.array(full), np.array(kept)))


def test_responses_that_are_encoded_alone_make_two_sequences_a_battle():
    template = "{% for round in rounds %}<P>{{ round.prompt }}<R>{{ round.response }}{% endfor %}"
    made = encoder(template, max_length=200)
    assert made.responses != JOINT_RESPONSES
    battles = battles_of([["p " * 100], ["p"]], [["a " * 300], ["a"]], [["b " * 4], ["b"]])
    tokens = count_tokens(battles, made)
    columns = [battles[name][:] for name in TEXTS]
    sides = [list(made(columns[0], column)) for column in columns[1:]]
    full = np.array([[a.full[0], a.full[1], b.full[1]] for a, b in zip(*sides, strict=True)])
    kept = np.array([[min(a.kept[0], b.kept[0]), a.kept[1], b.kept[1]] for a, b in zip(*sides, strict=True)])
    row = tokens["retention"][0]
    assert row["max_length"] == 200
    assert row["kept"] == pytest.approx(measure_retention(full, kept))
    assert row["kept"]["battles_cut"] == 0.5
    whole = encoder(template, max_length=100_000)
    lengths = [len(one.input_ids) for column in columns[1:] for one in whole(columns[0], column)]
    assert sorted(tokens["lengths"]["sequence"].tolist()) == sorted(lengths)


def test_budgets_that_the_template_does_not_fit_into_are_left_out():
    turns = "{{ r.prompt }}|{{ r.response_a }}|{{ r.response_b }}"
    made = encoder(f"{{% for r in rounds %}}{'long instruction ' * 60}{turns}{{% endfor %}}", max_length=8192)
    least = made.fixed_tokens(1).length
    found = [row["max_length"] for row in count_tokens(battles_of([["p"]], [["a"]], [["b"]]), made)["retention"]]
    assert found == [length for length in module.MAX_LENGTHS if length > least + 60]
    assert 512 not in found


def test_tokens_of_many_battles_are_those_of_a_seeded_sample(monkeypatch):
    monkeypatch.setattr(module, "COUNTED_BATTLES", 10)
    battles = long_battles()
    first, again, other = (count_tokens(battles, encoder(), seed) for seed in (0, 0, 1))
    assert first["battles"] == 10
    np.testing.assert_equal(first, again)
    with pytest.raises(AssertionError):
        np.testing.assert_equal(first, other)
