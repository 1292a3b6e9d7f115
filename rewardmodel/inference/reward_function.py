"""A trained run -> a function from conversations to rewards, for TRL's online trainers or best-of-n sampling."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.errors import InputError
from rewardmodel.model.loading import load_predictor
from rewardmodel.objectives import find_objective
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, pack_sequences
from rewardmodel.run_folder import load_run_recipe, model_folder, trained_models

Conversation = str | Sequence[dict[str, str]]
"""A text, or messages: [{"role": "user", "content": "..."}, ...]."""


def reward_function(run: str | Path) -> Callable[..., list[float]]:
    """Return a function that scores completions with a trained run, for TRL's `reward_funcs`.

    Template and truncation are those that the run was trained with. A prompt is a text, or messages that end with one
    of the user; a completion is a text, or messages. System messages are put before the user's first message.

    Args:
        run: a run folder or an export of one (`exports.export`) whose objective scores each response alone.

    Returns:
        rewards(prompts, completions, **ignored) -> a float for each completion, in order.

    Raises:
        InputError: no trained run, or one whose objective compares two responses. The function raises it for messages
            that are not a conversation.
    """
    run = Path(run)
    recipe = load_run_recipe(run)
    objective = find_objective(recipe.objective)
    if objective.encoding != "separate":
        raise InputError(
            f"{run}: objective {recipe.objective.name} compares two responses and gives no reward; train with "
            "rao_kupper, davidson or bradley_terry"
        )
    folders = trained_models(run)
    if len(folders) > 1:
        raise InputError(
            f"{run}: a run of {len(folders)} folds; give the folder of one fold, or export the run with --kind soup"
        )
    predictor = load_predictor(recipe.model, model_folder(run), recipe.inference.batch_tokens)
    encoder = PromptEncoder(predictor.tokenizer, recipe.prompt, objective.encoding)

    def rewards(prompts: Sequence[Conversation], completions: Sequence[Conversation], **_: Any) -> list[float]:
        # turns: (the user's, the assistant's) of each conversation: [(["What is 2 + 2?"], ["4"]), ...]
        turns = [split_turns(*pair) for pair in zip(prompts, completions, strict=True)]
        encoded = [pack_sequences([one]) for one in encoder(*zip(*turns, strict=True))]
        rows = Dataset.from_list(
            [_make_row(str(number), *one) for number, one in enumerate(encoded)], features=TOKEN_ROW_FEATURES
        )
        return predictor.logits(rows, local_only=True)[:, 0, 0].tolist()

    rewards.__name__ = f"rewardmodel_{run.name}"
    return rewards


def split_turns(prompt: Conversation, completion: Conversation) -> tuple[list[str], list[str]]:
    """Return the user's turns and the assistant's turns of a prompt and its completion; both lists are equally long.

    Raises:
        InputError: roles do not alternate from the user to the assistant, or a message is not a role and a text.
    """
    messages = [*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")]
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"rewards: {message!r:.80}: give messages like {{'role': 'user', 'content': 'a text'}}")
    system = [message["content"] for message in messages if message["role"] == "system"]
    dialogue = [message for message in messages if message["role"] != "system"]
    roles = [message["role"] for message in dialogue]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise InputError(f"rewards: messages of {', '.join(roles) or 'nobody'}; give user and assistant in turns")
    texts = [message["content"] for message in dialogue]
    texts[0] = "\n\n".join([*system, texts[0]])
    return texts[::2], texts[1::2]


def _as_messages(given: Conversation, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": given}] if isinstance(given, str) else list(given)


def _make_row(name: str, input_ids: np.ndarray, segment_ids: np.ndarray, branches: list[int]) -> dict[str, Any]:
    """Return a row of `TOKEN_ROW_FEATURES` of one conversation, without an outcome."""
    unknown = {"labels": [np.nan] * 3, "teacher": [np.nan] * 3}
    sequence = {"input_ids": input_ids, "segment_ids": segment_ids, "branches": branches, "length": len(input_ids)}
    return {"id": name, **sequence, **unknown, "full": [], "kept": [], "weight": 1.0}
