"""A raw row with two responses in, a battle out: the competition's columns, two conversations, chosen and rejected.

Where the prompt is, and how a response is given, is decided by row: a text, a list of turns, or messages; the prompt in
a separate column, at the beginning of a conversation, or both.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from rewardmodel.battles import OUTCOMES, TEXT_COLUMNS
from rewardmodel.data.outcomes import certain, parse_outcome
from rewardmodel.data.raw_row import RawRow, shorten
from rewardmodel.data.text_lists import is_sequence

Message = tuple[str, str]
"""Who said it, and what: ("user", "What is 2 + 2?")."""

CONTEXT_COLUMNS = ("system", "history", "input")
"""Columns that are part of the prompt: a system message, earlier rounds, and what an instruction is about."""


def parse_competition(row: RawRow) -> list[dict[str, Any]]:
    """Parse columns prompt, response_a and response_b: lists of turns, what spells them, plain texts, or messages."""
    if any(row.has_messages(name) for name in TEXT_COLUMNS):
        prompt, response_a, response_b = _read_pair(row, "response_a", "response_b")
        texts = {"prompt": prompt, "response_a": response_a, "response_b": response_b}
    else:
        texts = {name: row.read_turns(name) for name in TEXT_COLUMNS}
        rounds = max(1, *map(len, texts.values()))
        for name in TEXT_COLUMNS:
            if not texts[name]:
                texts[name] = [""] * rounds
                row.notes["missing text", "read as empty"] += 1
    return [{**add_context(row, texts), **_models(row), **parse_outcome(row)}]


def parse_conversations(row: RawRow) -> list[dict[str, Any]]:
    """Parse two whole conversations with the same user turns, in columns conversation_a and conversation_b.

    In the column `turn` is the number of the round that was judged: later ones are left out.
    """
    prompt, response_a = split_turns(row.read_dialogue("conversation_a", "user"))
    other, response_b = split_turns(row.read_dialogue("conversation_b", "user"))
    if not prompt:
        raise row.error("conversation_a", "empty; give its messages")
    if prompt != other:
        raise row.error("conversation_b", "its user turns differ from those of conversation_a; give both the same")
    texts = {"prompt": prompt, "response_a": response_a, "response_b": response_b}
    hint = "give the number of the round that was judged, from 1, or ignore the column with columns: {turn: null}"
    judged = row.read_number("turn", hint)
    if judged is not None and not (judged >= 1 and judged.is_integer()):
        raise row.error("turn", f"{judged:g} is no round; {hint}")
    if judged is not None and judged < len(prompt):
        row.notes["battle", "judged before the last round: later rounds are left out"] += 1
        texts = {name: turns[: int(judged)] for name, turns in texts.items()}
    return [{**add_context(row, texts), **_models(row), **parse_outcome(row)}]


def parse_preference(row: RawRow) -> list[dict[str, Any]]:
    """Parse columns chosen and rejected; a hash of the texts and the seed decides which of them becomes A.

    Equal scores of both are a tie: the data sets that give them choose one of two equal answers at random.
    """
    prompt, better, worse = _read_pair(row, "chosen", "rejected")
    hint = "give a score, or ignore the column with columns: {score_chosen: null, score_rejected: null}"
    score, other = (row.read_number(f"score_{name}", hint) for name in ("chosen", "rejected"))
    lead = None if score is None or other is None else score_lead(score, other)
    if lead == 0:
        row.notes["pair", "with equal scores, read as tied"] += 1
    elif lead is not None and lead < 0:
        read = "read as labelled" if row.source.score_scale is None else "which score_scale makes the likelier winner"
        row.notes["pair", f"whose rejected response has the higher score, {read}"] += 1
    elif lead is None and row.source.score_scale is not None:
        row.notes["pair", "without scores, read as labelled"] += 1
    models = (row.read_text("chosen_model"), row.read_text("rejected_model"))
    return [toss(row, prompt, (better, worse), models, lead)]


def score_lead(better: float, worse: float) -> float:
    """Return how much higher the better one's score is; 0 if they are equal, infinite ones too."""
    return 0.0 if better == worse else better - worse


def toss(
    row: RawRow, prompt: list[str], answers: tuple[list[str], list[str]], models: tuple[str, str], lead: float | None
) -> dict[str, Any]:
    """Return a battle of a better and a worse answer, which of them is A being decided by the texts and the seed.

    Args:
        row: where they are from.
        prompt: its turns.
        answers: the turns of the better and of the worse one.
        models: that wrote them.
        lead: how much higher the better one's score is, 0 for a tie; None: there are no scores.
    """
    texts = add_context(row, {"prompt": prompt, "response_a": answers[0], "response_b": answers[1]})
    key = json.dumps([row.seed, *texts.values()]).encode()
    first = hashlib.blake2b(key, digest_size=1).digest()[0] % 2  # 0 or 1, whatever the order of rows
    if first:
        texts |= {"response_a": texts["response_b"], "response_b": texts["response_a"]}
    named = dict(zip(("model_a", "model_b"), models[::-1] if first else models, strict=True))
    return {**texts, **named, **_outcome(row.source.score_scale, lead, first)}


def _outcome(scale: float | None, lead: float | None, better: int) -> dict[str, float | None]:
    """Return the probabilities of a battle's outcomes by how far the scores are apart.

    Args:
        scale: the source's `score_scale`.
        lead: as of `toss`.
        better: index of the better response: 0 is A, 1 is B.
    """
    if lead == 0:
        return certain(2)
    if scale is None or lead is None:
        return certain(better)
    p = (1 + math.tanh(lead / scale / 2)) / 2  # the logistic function, without overflow
    return dict(zip(OUTCOMES, (1 - p, p, 0.0) if better else (p, 1 - p, 0.0), strict=True))


def _models(row: RawRow) -> dict[str, str]:
    return {name: row.read_text(name) for name in ("model_a", "model_b")}


def _read_pair(row: RawRow, first: str, second: str) -> tuple[list[str], list[str], list[str]]:
    """Return the turns of the prompt and of the responses in two columns, with what comes before them.

    A response without a prompt, next to a conversation with one, answers the same prompt.
    """
    shared = read_prompt(row, "prompt")
    columns = {name: row.read_dialogue(name, "assistant") for name in (first, second)}
    for name, messages in columns.items():
        if not messages:
            raise row.error(name, "empty; give the response")
    if not any(role == "user" for role, _ in shared):
        asked = [messages for messages in columns.values() if messages[0][0] != "assistant"]
        if len(asked) == 1:
            shared = shared + _without_answer(asked[0])
    (prompt, one), (other, two) = (
        split_turns(join_prompt(row, name, shared, messages)) for name, messages in columns.items()
    )
    if prompt != other:
        raise row.error(second, f"its user turns differ from those of {first}; give both the same prompt")
    return prompt, one, two


def read_prompt(row: RawRow, column: str) -> list[Message]:
    """Return the messages of a prompt; empty if the row has none. A last answer that is still empty is left out."""
    messages = [] if row.values.get(column) is None else row.read_dialogue(column, "user")
    while messages and messages[-1] == ("assistant", ""):
        messages = messages[:-1]
    return messages


def _without_answer(messages: list[Message]) -> list[Message]:
    """Return a conversation up to its last answer."""
    last = len(messages)
    while last and messages[last - 1][0] == "assistant":
        last -= 1
    return messages[:last]


def join_prompt(row: RawRow, column: str, prompt: list[Message], messages: list[Message]) -> list[Message]:
    """Return a conversation with its prompt, which may be apart, at the start of its messages, or both.

    Raises:
        InputError: there is no prompt at all; `column` is the one of the messages.
    """
    own_prompt = messages[0][0] != "assistant"
    if not prompt and not own_prompt:
        raise row.error(column, "no prompt; give a column 'prompt', or messages that begin with the user's")
    users = [[text.strip() for role, text in part if role == "user"] for part in (prompt, messages)]
    if own_prompt and users[1][: len(users[0])] == users[0]:  # the column repeats the prompt
        return [one for one in prompt if one[0] == "system" and one not in messages] + messages
    return prompt + messages


def split_turns(messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """Return the prompt turns and the response turns of a conversation, as many of each.

    Consecutive messages of one side are joined by a blank line, and a system message is part of the prompt turn where
    it occurs. What is missing is empty: `[("assistant", "Hi"), ("user", "Who?")]` -> `(["", "Who?"], ["Hi", ""])`.
    """
    prompts: list[str] = []
    responses: list[str] = []
    after_prompt = False  # whether the message before is of the prompt's side
    for role, text in messages:
        is_prompt = role != "assistant"
        if is_prompt and after_prompt:
            prompts[-1] += f"\n\n{text}"
        elif is_prompt or not prompts:
            prompts.append(text if is_prompt else "")
            responses.append("" if is_prompt else text)
        else:
            responses[-1] = text if after_prompt else f"{responses[-1]}\n\n{text}"
        after_prompt = is_prompt
    return prompts, responses


def add_context(row: RawRow, texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the turns with what the columns `input`, `history` and `system` say before them.

    `input` follows the instruction of the last turn on a new line, as templates of instruction data have it; rounds of
    the history come first, and the system message is the beginning of the first prompt turn. A history or a system
    message that the turns begin with already is not said twice.
    """
    if not any(row.values.get(name) is not None for name in CONTEXT_COLUMNS):
        return texts
    prompt, responses = [*texts["prompt"]], [texts["response_a"], texts["response_b"]]
    if (row.source.columns.get("prompt") == "instruction" or "input" in row.source.columns) and row.read_text("input"):
        prompt[-1] = f"{prompt[-1]}\n{row.repair(str(row.values['input']))}"
    asked, answered = _read_history(row)
    if asked and prompt[: len(asked)] != asked:
        prompt, responses = asked + prompt, [answered + response for response in responses]
    system = row.read_text("system")
    if system and not prompt[0].startswith(system):
        prompt[0] = f"{system}\n\n{prompt[0]}"
    return {"prompt": prompt, "response_a": responses[0], "response_b": responses[1]}


def _read_history(row: RawRow) -> tuple[list[str], list[str]]:
    """Return the questions and the answers of earlier rounds: of pairs, `[["Hi", "Hello"]]`, or of messages."""
    hint = (
        'give pairs of a question and an answer, [["Hi", "Hello"]], or messages; if it is the prompt, write columns: '
        "{prompt: history}, and if it is something else, {history: null}"
    )
    rounds = row.read_list("history", hint)
    if rounds and isinstance(rounds[0], dict):
        return split_turns(row.read_messages("history", rounds, "user"))
    for pair in rounds:
        if not (is_sequence(pair) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise row.error("history", f"{shorten(pair)} is no round; {hint}")
    return [row.repair(pair[0]) for pair in rounds], [row.repair(pair[1]) for pair in rounds]
