"""A run and a benchmark's questions -> the run's scores of every response.

A model that scores each response alone computes every response once, after a prompt that is computed once for all of
them. A model that compares two responses plays all pairs in both orders.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from rewardmodel.benchmarks.pairs import score_questions
from rewardmodel.benchmarks.questions import Question
from rewardmodel.benchmarks.scoring import Scored, score_rewards
from rewardmodel.config.schema import Recipe
from rewardmodel.inference.predict import predict
from rewardmodel.inference.shards import shard_folder, sharded_logits
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import load_predictor, load_tokenizer
from rewardmodel.objectives import find_objective
from rewardmodel.predictions import predicted
from rewardmodel.prompt.encoder import PromptEncoder
from rewardmodel.prompt.template import ENCODINGS
from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, pack_sequences
from rewardmodel.run_folder import model_folder, trained_models

logger = logging.getLogger(__name__)

ROW_RESPONSES = 8
"""Responses of a question that are computed in one row; a question with more of them takes several rows."""


def play(
    run: Path, recipe: Recipe, questions: Sequence[Question], pairs: Dataset, across: bool, work: Path
) -> list[Scored]:
    """Return a run's scores of the responses of each question, in order.

    They are the model's own, neither calibrated nor blended. A k-fold run gives the mean over its folds.

    Args:
        run: the run folder, or an export.
        recipe: to predict by.
        questions: of the benchmark.
        pairs: of their responses, as `pair_battles` returns them.
        across: as the pairs were made.
        work: folder of intermediate results, from which the same call continues after a kill.

    Raises:
        InputError: a backbone that cannot be found.
        FloatingPointError: a score that is NaN or infinite; the questions are named.
    """
    if find_objective(recipe.objective).encoding == "separate":
        folds = [_reward_responses(folder, recipe, questions, work) for folder in trained_models(run)]
        return [score_rewards(np.mean(rewards, axis=0)) for rewards in zip(*folds, strict=True)]
    plain = replace(recipe.inference, swap_tta="both", calibrate=False, blend=False)
    table = predict(run, pairs, replace(recipe, inference=plain), work=work)
    a_first, b_first = (np.subtract(*predicted(table, order).T[:2]) for order in ("ab", "ba"))
    return score_questions(questions, across, a_first, b_first)


def _reward_responses(folder: Path, recipe: Recipe, questions: Sequence[Question], work: Path) -> list[np.ndarray]:
    """Return the reward of each response of each question, (n,) float64, by one model."""
    model = model_folder(folder)
    predictor = load_predictor(recipe.model, model, recipe.inference.batch_tokens)
    settings = {**asdict(recipe.model), "dtype": str(predictor.dtype), "batch_tokens": predictor.budget}
    rewards = [np.empty(len(one.responses)) for one in questions]
    for count, rows in _question_rows(predictor, recipe, questions).items():
        table = Dataset.from_list(rows, features=TOKEN_ROW_FEATURES)
        logits = sharded_logits(predictor, table, shard_folder(work, model, table, settings))
        for row, values in zip(rows, logits[:, :, 0], strict=True):
            place, start = map(int, row["id"].split(":"))
            rewards[place][start : start + count] = values
    return rewards


def _question_rows(
    predictor: Predictor, recipe: Recipe, questions: Sequence[Question]
) -> dict[int, list[dict[str, Any]]]:
    """Return rows of `TOKEN_ROW_FEATURES` by their number of sequences.

    A row has one question's prompt once, then up to `ROW_RESPONSES` of its responses; its id is `question:first`.
    """
    encoder = PromptEncoder(predictor.tokenizer, recipe.prompt, "separate")
    unknown = {"labels": [np.nan] * 3, "teacher": [np.nan] * 3, "full": [], "kept": [], "weight": 1.0}
    rows, cut = defaultdict(list), 0
    for place, one in enumerate(questions):
        for start in range(0, len(one.responses), ROW_RESPONSES):
            responses = [[text] for text in one.responses[start : start + ROW_RESPONSES]]
            sequences = list(encoder([[one.prompt]] * len(responses), responses))
            cut += sum(each.kept != each.full for each in sequences)
            packed = pack_sequences(sequences)
            row = {"id": f"{place}:{start}", "length": len(packed.input_ids), **packed._asdict(), **unknown}
            rows[len(responses)].append(row)
    if cut:
        count = sum(len(one.responses) for one in questions)
        logger.warning("%d of %d responses are cut: prompt.max_length is %d", cut, count, encoder.max_length)
    return rows


def template_name(run: Path, recipe: Recipe) -> str:
    """Return the name of a run's template as leaderboards write it: `tokenizer` for the backbone's chat template."""
    _, decoder, encoder = ENCODINGS[find_objective(recipe.objective).encoding]
    tokenizer = load_tokenizer(model_folder(trained_models(run)[0]))
    name = recipe.prompt.template or (encoder if tokenizer.sep_token else decoder)
    return "tokenizer" if name == "chat" else name if name.isidentifier() else "custom"
