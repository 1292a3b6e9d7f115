"""A trained run -> a function from conversations to rewards, for TRL's online trainers or best-of-n."""

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
"""A text, or messages with a role and a content."""


def reward_function(run: str | Path) -> Callable[..., list[float]]:
    """Return a function of prompts and completions, as TRL's `reward_funcs` wants it, by a trained run.

    Template and truncation are those that the run was trained with. A prompt is a text, or messages that end with the
    user's; a completion is a text, or messages. A system message stands before the user's first.

    Args:
        run: the run folder, or what `exports.export` made of one; its objective scores each response alone.

    Returns:
        rewards(prompts, completions, **others) -> one float each, in order; `others` are ignored.

    Raises:
        InputError: no trained run, or one whose objective compares responses; from the function: messages that are not
            a conversation.
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
        raise InputError(f"{run}: a run of {len(folders)} folds; give one of them, or export them as a soup")
    predictor = load_predictor(recipe.model, model_folder(run), recipe.inference.batch_tokens)
    encoder = PromptEncoder(predictor.tokenizer, recipe.prompt, objective.encoding)

    def rewards(prompts: Sequence[Conversation], completions: Sequence[Conversation], **_: Any) -> list[float]:
        turns = [conversation(*pair) for pair in zip(prompts, completions, strict=True)]
        encoded = [pack_sequences([one]) for one in encoder(*zip(*turns, strict=True))]
        rows = Dataset.from_list(
            [_row(str(number), *one) for number, one in enumerate(encoded)], features=TOKEN_ROW_FEATURES
        )
        return predictor.logits(rows, local_only=True)[:, 0, 0].tolist()

    rewards.__name__ = f"rewardmodel_{run.name}"
    return rewards


def conversation(prompt: Conversation, completion: Conversation) -> tuple[list[str], list[str]]:
    """Return the user's turns and the assistant's, as many, of a prompt and its completion.

    Raises:
        InputError: turns that do not alternate, beginning with the user and ending with the assistant.
    """
    messages = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
    system = [message["content"] for message in messages if message["role"] == "system"]
    said = [message for message in messages if message["role"] != "system"]
    roles = [message["role"] for message in said]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise InputError(f"rewards: messages of {', '.join(roles) or 'nobody'}; give user and assistant in turns")
    texts = [message["content"] for message in said]
    texts[0] = "\n\n".join([*system, texts[0]])
    return texts[::2], texts[1::2]


def _messages(given: Conversation, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": given}] if isinstance(given, str) else list(given)


def _row(name: str, input_ids: np.ndarray, segment_ids: np.ndarray, branches: list[int]) -> dict[str, Any]:
    """Return a row of `TOKEN_ROW_FEATURES` of one conversation, without an outcome."""
    unknown = {"labels": [np.nan] * 3, "teacher": [np.nan] * 3}
    sequence = {"input_ids": input_ids, "segment_ids": segment_ids, "branches": branches, "length": len(input_ids)}
    return {"id": name, **sequence, **unknown, "full": [], "kept": [], "weight": 1.0}
