import json

import pytest

from rewardmodel.benchmarks.questions import question_sources, read_questions
from rewardmodel.benchmarks.table import BENCHMARKS, find_benchmark
from rewardmodel.config.schema import Source
from rewardmodel.errors import InputError

ROWS = {
    "rewardbench2": {
        "id": "1",
        "prompt": "What is 2 + 2?",
        "chosen": ["4"],
        "rejected": ["5", "6", "22"],
        "num_correct": 1,
        "total_completions": 4,
        "subset": "Math",
    },
    "rewardbench": {"id": 30, "prompt": "Greet me.", "chosen": "Hello", "rejected": "No", "subset": "alpacaeval-easy"},
    "rm_bench": {
        "id": "s/1",
        "prompt": "Why is the sky blue?",
        "chosen": ["a", "b", "c"],
        "rejected": ["d", "e", "f"],
        "domain": "safety-refuse",
    },
    "judgebench": {
        "pair_id": "x-1",
        "question": "Which law?",
        "response_A": "this",
        "response_B": "that",
        "label": "B>A",
        "source": "mmlu-pro-law",
    },
    "llmbar": {"input": "List three birds.", "output_1": "owl", "output_2": "fish", "label": 2},
}


def read(tmp_path, name, *rows):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    scoring = BENCHMARKS[name].scoring
    return read_questions([Source(str(path))], scoring.columns, scoring.parse, scoring.names)


@pytest.mark.parametrize(
    ("name", "subset", "correct", "identifier"),
    [
        ("rewardbench2", "Math", [1, 0, 0, 0], "1"),
        ("rewardbench", "alpacaeval-easy", [1, 0], "30"),
        ("rm_bench", "safety", [1, 1, 1, 0, 0, 0], "s/1"),
        ("judgebench", "knowledge", [0, 1], "x-1"),
        ("llmbar", "", [0, 1], "1"),
    ],
)
def test_each_benchmark_is_read_as_it_is_published(tmp_path, name, subset, correct, identifier):
    (question,) = read(tmp_path, name, ROWS[name])
    assert (question.subset, question.correct.tolist(), question.id) == (subset, correct, identifier)
    assert question.row == 1
    assert len(question.responses) == len(correct)
    assert question.group == question.prompt


def test_every_benchmark_has_a_row_here():
    assert ROWS.keys() == {name for name, one in BENCHMARKS.items() if one.scoring}


def change(name, **values):
    return {key: value for key, value in (ROWS[name] | values).items() if value != "left out"}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("rewardbench2", {"chosen": []}, "row 2, column 'chosen': no response"),
        ("rewardbench2", {"chosen": None}, "row 2, column 'chosen': no response"),
        ("rewardbench2", {"chosen": "left out"}, "row 2, column 'chosen': no response"),
        ("rewardbench2", {"rejected": ["5", None]}, "row 2, column 'rejected': response 2 is None, not a text"),
        ("rewardbench2", {"chosen": "4"}, "row 2, column 'chosen': 4 is not a list"),
        ("rewardbench2", {"num_correct": 2}, "row 2, column 'num_correct': 2, but chosen has 1 responses"),
        ("rewardbench2", {"total_completions": 5}, "'total_completions': 5, but chosen and rejected have 4"),
        ("rewardbench2", {"num_correct": "one"}, "row 2, column 'num_correct': 'one' is not a number"),
        ("rewardbench2", {"subset": "Maths"}, "row 2, column 'subset': 'Maths' is unknown (did you mean 'Math'?)"),
        ("rewardbench2", {"subset": "Ties"}, "row 2, column 'id': '1'; questions of Ties are called"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:1"}, "row 2, column 'chosen': one response; a question with"),
        ("rewardbench2", {"subset": "Ties", "id": "ref:1"}, "subset Ties: no 'tied:7' has its 'ref:7'"),
        ("rewardbench2", {"prompt": " "}, "row 2, column 'prompt': ' ': no prompt"),
        ("rewardbench", {"rejected": None}, "row 2, column 'rejected': None is not a text"),
        ("rewardbench", {"subset": "alpaca"}, "row 2, column 'subset': 'alpaca' is unknown"),
        ("rm_bench", {"chosen": ["a", "b"]}, "row 2, column 'chosen': 2 responses; give three: concise"),
        ("rm_bench", {"domain": "poetry"}, "row 2, column 'domain': 'poetry' is unknown"),
        ("judgebench", {"label": "A=B"}, "row 2, column 'label': 'A=B' is neither 'A>B' nor 'B>A'"),
        ("judgebench", {"source": "mmlu"}, "row 2, column 'source': 'mmlu' is unknown"),
        ("judgebench", {"response_B": 3}, "row 2, column 'response_B': 3 is not a text"),
        ("llmbar", {"label": 3}, "row 2, column 'label': 3 is neither 1 nor 2"),
        ("llmbar", {"label": None}, "row 2, column 'label': None is neither 1 nor 2"),
        ("llmbar", {"subset": "Hard"}, "row 2, column 'subset': 'Hard' is unknown"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, values, message):
    with pytest.raises(InputError) as error:
        read(tmp_path, name, ROWS[name], change(name, **values))
    assert f"{name}.jsonl: " in str(error.value)
    assert message in str(error.value)


def test_a_missing_column_is_named(tmp_path):
    row = {name.replace("response_A", "response_a"): value for name, value in ROWS["judgebench"].items()}
    with pytest.raises(InputError, match=r"column 'response_A' is missing \(did you mean 'response_a'"):
        read(tmp_path, "judgebench", row)
    with pytest.raises(InputError, match="the file is empty"):
        read(tmp_path, "judgebench")


def test_a_tied_question_belongs_to_its_reference(tmp_path):
    tied = change("rewardbench2", id="tied:7", chosen=["4", "four"], subset="Ties", num_correct=2, total_completions=5)
    reference = change("rewardbench2", id="ref:7", subset="Ties", prompt="What is 1 + 1?")
    questions = read(tmp_path, "rewardbench2", ROWS["rewardbench2"], tied, reference)
    assert questions[1].group == questions[2].group != questions[0].group
    with pytest.raises(InputError, match="row 4, column 'id': 'ref:7' was already used in row 3"):
        read(tmp_path, "rewardbench2", ROWS["rewardbench2"], tied, reference, reference)


def test_the_hub_is_asked_for_every_split(tmp_path, monkeypatch):
    llmbar = find_benchmark("llmbar")
    sources = question_sources(None, llmbar.hub, llmbar.splits)
    assert [one.split for one in sources] == list(llmbar.splits)
    assert {(one.path, one.subset, one.revision) for one in sources} == {
        ("princeton-nlp/LLMBar", "LLMBar", "refs/convert/parquet")
    }
    assert question_sources("me/mine", llmbar.hub, ("test",)) == [Source("me/mine", split="test")]
    (tmp_path / "mine.jsonl").write_text("")
    assert question_sources(tmp_path / "mine.jsonl", llmbar.hub, ("test",)) == [Source(str(tmp_path / "mine.jsonl"))]

    # a hub data set whose splits are its subsets
    from datasets import Dataset

    given = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *place, **how: given.append((place, how)) or Dataset.from_list([ROWS["llmbar"]])
    )
    scoring = llmbar.scoring
    questions = read_questions(sources, scoring.columns, scoring.parse, scoring.names)
    assert [one.subset for one in questions] == list(llmbar.splits)
    assert given[0] == (("princeton-nlp/LLMBar", "LLMBar"), {"split": "Natural", "revision": "refs/convert/parquet"})


def test_an_unknown_benchmark_is_named():
    with pytest.raises(InputError, match=r"no benchmark 'judgebenhc' \(did you mean 'judgebench'"):
        find_benchmark("judgebenhc")
