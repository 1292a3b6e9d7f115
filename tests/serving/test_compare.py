import io
import json

import pytest

from rewardmodel.cli import main
from rewardmodel.config.schema import InferenceConfig, ObjectiveConfig, Recipe
from rewardmodel.errors import InputError
from rewardmodel.serving.answers import describe_prediction, format_answer
from rewardmodel.serving.compare import compare_responses, read_texts

ANSWER = {"p_model_a": 0.2, "p_model_b": 0.7, "p_tie": 0.1}
ORDERS = {f"{order}_{name}": p for order in ("ab", "ba") for name, p in ANSWER.items()}


def typed(monkeypatch, text, terminal=True):
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", stdin)


def test_texts_come_from_flags_files_and_the_terminal(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("from a file\n")
    typed(monkeypatch, "typed\n\nin lines\n.\n")
    found = read_texts({"prompt": "a flag", "response_a": f"@{tmp_path}/a.txt", "response_b": None})
    assert found == {"prompt": "a flag", "response_a": "from a file\n", "response_b": "typed\n\nin lines"}


def test_a_text_that_is_missing_is_named(tmp_path, monkeypatch):
    typed(monkeypatch, "text", terminal=False)
    with pytest.raises(InputError, match="--response-b: missing, and there is no terminal to type it in"):
        read_texts({"prompt": "a", "response_a": "b", "response_b": None})
    (tmp_path / "a.bin").write_bytes(b"\xff")
    for name in ("nope", "a.bin"):
        with pytest.raises(InputError, match=f"--prompt: .*{name}: cannot be read as a UTF-8 file"):
            read_texts({"prompt": f"@{tmp_path}/{name}", "response_a": "b", "response_b": "c"})


def test_the_answer_is_a_few_lines():
    lines = format_answer(describe_prediction(ANSWER | ORDERS), Recipe()).splitlines()
    assert lines[0] == "B is better        A 20.0%   B 70.0%   tie 10.0%"
    assert lines[2] == "  B shown first    A 20.0%   B 70.0%   tie 10.0%"
    assert lines[3] == "Either order names the same."
    other = describe_prediction(ANSWER | ORDERS | {"ba_p_model_a": 0.8, "ba_p_model_b": 0.1})
    assert other["flips"]
    assert format_answer(other, Recipe()).splitlines()[3] == "The order decides who wins: do not rely on this."
    one = describe_prediction(ANSWER | {name: p for name, p in ORDERS.items() if name.startswith("ab")})
    assert one["flips"] is None
    once = Recipe(inference=InferenceConfig(swap_tta="none"))
    assert format_answer(one, once).splitlines()[1:] == ["A was shown first only, because inference.swap_tta is none."]
    separate = Recipe(objective=ObjectiveConfig("bradley_terry"))
    assert format_answer(one, separate).splitlines()[1] == (
        "Each response is scored alone, so that their order cannot matter."
    )


@pytest.mark.parametrize(
    ("shares", "winner"),
    [((0.4, 0.4, 0.2), "tie"), ((0.35, 0.35 + 1e-8, 0.3), "tie"), ((0.4, 0.2, 0.4), "model_a"), ((1 / 3,) * 3, "tie")],
)
def test_responses_that_are_equally_likely_to_win_tie(shares, winner):
    assert describe_prediction(dict(zip(ANSWER, shares, strict=True)))["winner"] == winner


def test_the_command_says_what_the_server_says(joint_run, joint_judge, joint, monkeypatch, capsys):
    monkeypatch.setattr("rewardmodel.inference.judge.load_judge", lambda run, recipe: joint_judge)
    texts = {"prompt": "hi", "response_a": "a kind answer", "response_b": "rude"}
    flags = ["--prompt", "hi", "--response-a", "a kind answer", "--response-b", "rude"]
    assert main(["compare", str(joint_run), *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"id": None, **said} == pytest.approx(joint.post("/battle", json=texts).json(), abs=1e-6)
    assert main(["compare", str(joint_run), *flags]) == 0
    assert "A shown first" in capsys.readouterr().out
    assert compare_responses(joint_run, **texts) == pytest.approx(said, abs=1e-6)
