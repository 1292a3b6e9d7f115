"""A trained run -> a function from conversations to rewards, for TRL's online trainers or best-of-n sampling."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.config.schema import Recipe
from rewardmodel.data.pairs import split_turns
from rewardmodel.data.raw_row import RawRow
from rewardmodel.errors import InputError
from rewardmodel.inference.battles import single_model
from rewardmodel.model.loading import load_predictor
from rewardmodel.objectives import find_objective
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, pack_sequences
from rewardmodel.run_folder import as_folders, load_run_recipe

Conversation = str | Sequence[dict[str, Any]]
"""A text, or messages: [{"role": "user", "content": "..."}, ...]."""


def reward_function(run: str | Path, recipe: Recipe | None = None) -> Callable[..., list[float]]:
    """Return a function that scores completions with a trained run, for TRL's `reward_funcs`.

    Template and truncation are those that the run was trained with. A prompt is a text, or messages that end with one
    of the user; a completion is a text, or messages, with calls of tools and their results or without.

    Args:
        run: a run folder or an export of one (`exports.export`) whose objective scores each response alone.
        recipe: overrides the run's own, for another device or precision, or a backbone that was moved.

    Returns:
        rewards(prompts, completions, **ignored) -> a finite float for each completion, in order.

    Raises:
        InputError: no trained run, or one whose objective compares two responses. The function raises it for messages
            that are not a conversation.
        FloatingPointError: raised by the function, for a reward that is NaN or infinite.
    """
    (run,) = as_folders(run)
    recipe = recipe or load_run_recipe(run)
    objective = find_objective(recipe.objective)
    if objective.encoding != "separate":
        raise InputError(f"{run}: {explain_no_reward(recipe.objective.name)}")
    predictor = load_predictor(recipe.model, single_model(run), recipe.inference.batch_tokens)
    encoder = PromptEncoder(predictor.tokenizer, recipe.prompt, objective.encoding)

    def rewards(prompts: Sequence[Conversation], completions: Sequence[Conversation], **_: Any) -> list[float]:
        # turns: (the user's, the assistant's) of each conversation: [(["What is 2 + 2?"], ["4"]), ...]
        turns = [
            conversation_turns(*pair, number) for number, pair in enumerate(zip(prompts, completions, strict=True), 1)
        ]
        if not turns:
            return []
        encoded = [pack_sequences([one]) for one in encoder(*zip(*turns, strict=True))]
        rows = Dataset.from_list(
            [_make_row(str(number), *one) for number, one in enumerate(encoded)], features=TOKEN_ROW_FEATURES
        )
        found = predictor.logits(rows, local_only=True)[:, 0, 0]
        broken = np.flatnonzero(~np.isfinite(found))
        if len(broken):
            raise FloatingPointError(
                f"rewards: {len(broken)} of {len(found)} completions have a reward that is NaN or infinite, first "
                f"number {broken[0] + 1}; the weights of {run} are broken, or activations overflow: set model.dtype"
            )
        return found.tolist()

    rewards.__name__ = f"rewardmodel_{run.name}"
    return rewards


def explain_no_reward(objective: str) -> str:
    """Return why an objective that compares two responses gives no reward, and what to do."""
    return (
        f"objective {objective} compares two responses and gives no reward; train with rao_kupper, davidson or "
        "bradley_terry"
    )


def conversation_turns(prompt: Conversation, completion: Conversation, number: int = 1) -> tuple[list[str], list[str]]:
    """Return the user's turns and the assistant's turns of a prompt and its completion; both lists are equally long.

    Messages are read by the same code as those of battles: the content may be a text, parts or null, calls of tools are
    written as text, and messages of system, developer and tools belong to the prompt's turns.

    Args:
        prompt: a text of the user, or messages.
        completion: a text of the assistant, or messages.
        number: of the pair, from 1, for errors.

    Raises:
        InputError: a message without a known role, or without a text; or no message at all.
    """
    given = {"prompt": prompt, "completion": completion}
    row = RawRow("rewards", number, given, Counter(), json_texts=False, seed=0)
    messages = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        text = given[name]
        messages += [(role, row.repair(text))] if isinstance(text, str) else row.read_dialogue(name, role)
    if not messages:
        raise row.error("prompt", "no messages; give a text, or messages like {'role': 'user', 'content': 'a text'}")
    return split_turns(messages)


def _make_row(name: str, input_ids: np.ndarray, segment_ids: np.ndarray, branches: list[int]) -> dict[str, Any]:
    """Return a row of `TOKEN_ROW_FEATURES` of one conversation, without an outcome."""
    unknown = {"labels": [np.nan] * 3, "teacher": [np.nan] * 3}
    sequence = {"input_ids": input_ids, "segment_ids": segment_ids, "branches": branches, "length": len(input_ids)}
    return {"id": name, **sequence, **unknown, "full": [], "kept": [], "weight": 1.0}
