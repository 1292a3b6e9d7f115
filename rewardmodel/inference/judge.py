"""A trained run -> its model in memory, for predictions and rewards of texts as they come; no file is written.

`predict` reads a file of battles, keeps tokens and shards in files, and loads its models again. A judge does the same
computation for battles that come a few at a time: of a server, of a terminal, of an engine that maps a function over
parts of a large table (`inference.scorer`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from datasets.table import InMemoryTable

from rewardmodel.battles import COLUMN_DEFAULTS, TEXT_COLUMNS, build_table
from rewardmodel.config.schema import Recipe
from rewardmodel.data.raw_row import RawRow
from rewardmodel.data.raw_rows import Note
from rewardmodel.data.text_lists import looks_like_turns
from rewardmodel.errors import InputError, plural
from rewardmodel.inference.battles import single_model
from rewardmodel.inference.predict import RunCalibration, read_calibration
from rewardmodel.inference.reward_function import explain_no_reward
from rewardmodel.model.forward import Predictor, check_finite
from rewardmodel.model.loading import load_predictor
from rewardmodel.objectives import Objective, find_objective
from rewardmodel.predictions import IDENTITY_COLUMNS, apply_rules, average_orders, pair_rules, with_baseline
from rewardmodel.prompt.encoder import EncodedSequence, PromptEncoder
from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, choose_orders, pack_sequences, tokenize_columns
from rewardmodel.run_folder import RunFolder, load_run_recipe

TokenRow = dict[str, Any]
"""What a model reads: {"input_ids": (length,), "segment_ids": (length,), "branches": [310, 96, 120], "length": 526}."""

Battle = Mapping[str, Any]
"""A battle to predict: {"id": "7", "prompt": ["What is 2 + 2?"], "response_a": ["4"], "response_b": ["It is 5."]}."""


@dataclass(frozen=True)
class Judge:
    """A run's model with all that turns texts into predictions.

    Attributes:
        folder: of the run.
        recipe: the run's, with what was overridden.
        objective: of the recipe.
        predictor: the model.
        encoder: texts -> tokens.
        calibration: of the run.
        baseline: the fitted baseline that predictions are blended with; None: they are not.
    """

    folder: Path
    recipe: Recipe
    objective: Objective
    predictor: Predictor
    encoder: PromptEncoder
    calibration: RunCalibration
    baseline: Any

    @property
    def both_orders(self) -> bool:
        """Whether battles are predicted with A and B exchanged too."""
        return self.objective.encoding == "joint" and self.recipe.inference.swap_tta == "both"

    @property
    def no_reward(self) -> str | None:
        """Why the model gives no reward to a response alone; None: it does."""
        name = self.recipe.objective.name
        return None if self.objective.encoding == "separate" else explain_no_reward(name)

    @property
    def no_verbatim_reward(self) -> str | None:
        """Why the model gives no reward to a finished text, whose response is not marked; None: it does."""
        pooling = self.recipe.model.pooling
        if self.no_reward or pooling == "last":
            return self.no_reward
        return f"model.pooling {pooling} reads the tokens of the response, which a finished text does not mark"

    def battle_columns(self, battles: Sequence[Battle]) -> dict[str, Any]:
        """Return columns of `TOKEN_ROW_FEATURES` of battles."""
        names = ("id", *TEXT_COLUMNS)
        columns = {name: [value] * len(battles) for name, value in COLUMN_DEFAULTS.items()}
        columns |= {name: [battle[name] for battle in battles] for name in names}
        return tokenize_columns(columns, self.encoder, choose_orders(self.objective.encoding, self.both_orders))

    def battle_rows(self, battles: Sequence[Battle]) -> list[TokenRow]:
        """Return one token row a battle."""
        columns = self.battle_columns(battles)
        names = ("input_ids", "segment_ids", "branches", "length")
        return [
            dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)
        ]

    def reward_rows(self, conversations: Sequence[tuple[list[str], list[str]]]) -> list[TokenRow]:
        """Return token rows of conversations with an answer each, in order; what they share is computed once.

        Args:
            conversations: the user's turns and the assistant's: [(["What is 2 + 2?"], ["4"]), ...].
        """
        return self._pack([one[:2] for one in self.encoder(*zip(*conversations, strict=True))])

    def verbatim_rows(self, texts: Sequence[str], max_length: int | None, *, shared: bool) -> list[TokenRow]:
        """Return token rows of finished texts, in order, as `PromptEncoder.encode_verbatim` has them.

        Args:
            texts: with their chat template.
            max_length: tokens to cut them to; None: they are not cut.
            shared: whether they begin alike, so that this is computed once.
        """
        ids = [self.encoder.encode_verbatim(text, max_length) for text in texts]
        sequences = [(one, np.zeros(len(one), np.int8)) for one in ids]
        return self._pack(sequences) if shared else [_token_row([one]) for one in sequences]

    def _pack(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[TokenRow]:
        """Return sequences in as few token rows as the tokens of a batch allow."""
        rows: list[TokenRow] = []
        start = 0
        for stop in range(1, len(sequences) + 1):
            row = _token_row(sequences[start:stop])
            if stop > start + 1 and self.predictor.batching.tokens(row) > (self.predictor.budget or row["length"]):
                start, row = stop - 1, _token_row(sequences[stop - 1 : stop])
                rows.append(row)
            else:
                rows[-1:] = [row] if stop > start + 1 else [*rows[-1:], row]
        return rows

    def predictions(self, battles: Sequence[Battle], logits: np.ndarray) -> pd.DataFrame:
        """Return what `predict` predicts of battles, from the logits of their token rows.

        Args:
            battles: n battles.
            logits: (n, n_sequences, n_logits) float32.

        Returns:
            A table of n rows with the columns `IDENTITY_COLUMNS`, `p_*`, `ab_*` and, if both orders are predicted,
            `ba_*`, as in `rewardmodel.predictions`.

        Raises:
            FloatingPointError: a prediction that is NaN or infinite; the battles are named.
        """
        ids = [battle["id"] for battle in battles]
        check_finite(logits, ids, f"NaN or infinite predictions of {{}} ({self.predictor.dtype})")
        orders = self.objective.probabilities_by_order(torch.from_numpy(logits))
        identity: dict[str, Any] = {"id": ids}
        identity |= {f"{name}_chars": [sum(map(len, battle[name])) for battle in battles] for name in TEXT_COLUMNS}
        table = pd.DataFrame(identity | average_orders(*(order.numpy() for order in orders)))
        if self.baseline is not None:
            from rewardmodel.evaluation.text_regression import predict_each  # imports scikit-learn

            table = with_baseline(table, predict_each([self.baseline], gather_battles(battles))[0])
        pairs = [(battle["response_a"], battle["response_b"]) for battle in battles]
        settings = self.recipe.inference
        rules = pair_rules(pairs, settings.tie_if_same, settings.win_if_other_empty)
        return apply_rules(self.calibration.apply(table), rules)

    def predict(self, battles: Sequence[Battle]) -> pd.DataFrame:
        """Return what `predict` predicts of battles; as `predictions`."""
        if not battles:
            return self._no_predictions()
        rows = Dataset.from_dict(self.battle_columns(battles), features=TOKEN_ROW_FEATURES)
        return self.predictions(battles, self.predictor.logits(rows, local_only=True))

    def _no_predictions(self) -> pd.DataFrame:
        """Return the table of no battles; engines ask for it, to learn the columns."""
        nothing = np.empty((0, 3), np.float32)
        columns = average_orders(nothing, nothing if self.both_orders else None)
        return pd.DataFrame(dict.fromkeys(IDENTITY_COLUMNS, pd.Series([], dtype=object)) | columns)


def load_judge(run: str | Path, recipe: Recipe | None = None) -> Judge:
    """Return a run's model in memory. On a GPU the tokens of a batch that fit into free memory are measured now.

    Args:
        run: a run folder, or an export; of one model.
        recipe: overrides the run's own, for another device, precision or way to predict.

    Raises:
        InputError: no trained run, one of several folds, or a backbone that cannot be found.
    """
    folder = Path(run)
    recipe = recipe or load_run_recipe(folder)
    model = single_model(folder)
    objective = find_objective(recipe.objective)
    calibration = read_calibration(folder, recipe)
    baseline = None
    if calibration.blends:
        from rewardmodel.evaluation.text_regression import load_regression

        baseline = load_regression(RunFolder(folder).blend_baseline)
    predictor = load_predictor(recipe.model, model, recipe.inference.batch_tokens)
    encoder = PromptEncoder(predictor.tokenizer, recipe.prompt, objective.encoding)
    judge = Judge(folder, recipe, objective, predictor, encoder, calibration, baseline)
    return replace(judge, predictor=replace(predictor, budget=predictor.find_budget(_longest_row(judge))))


def _longest_row(judge: Judge) -> Dataset:
    """Return the token row of a battle that is cut to the recipe's `prompt.max_length`."""
    words = " ".join(map(str, range(judge.recipe.prompt.max_length)))
    battle = {"id": "longest", **{name: [words + name] for name in TEXT_COLUMNS}}
    return Dataset.from_dict(judge.battle_columns([battle]), features=TOKEN_ROW_FEATURES)


def gather_battles(battles: Sequence[Battle]) -> Dataset:
    """Return battles as a data set in memory."""
    return Dataset(InMemoryTable(build_table(battles)), fingerprint=uuid4().hex)


def parse_battles(rows: Iterable[Mapping[str, Any]], where: str) -> list[Battle]:
    """Return raw rows as battles, without their outcomes.

    Texts are read as `read_battles` reads the competition's format: lists of turns, their JSON, or plain strings. They
    are JSON if all of a row's texts are JSON lists, whatever the rows before.

    Args:
        rows: with prompt, response_a, response_b, and perhaps an id; without one they are numbered from 1.
        where: the name of the source, for error messages.

    Raises:
        InputError: a row that is no battle; the message names row and column.
    """
    battles: list[Battle] = []
    notes = Counter[Note]()
    for number, values in enumerate(rows, start=1):
        if missing := [name for name in TEXT_COLUMNS if name not in values]:
            raise InputError(f"{where}: column '{missing[0]}' is missing; give {', '.join(TEXT_COLUMNS)}")
        strings = [text for name in TEXT_COLUMNS if isinstance(text := values[name], str) and text.strip()]
        row = RawRow(where, number, dict(values), notes, bool(strings) and all(map(looks_like_turns, strings)), 0)
        texts = {name: row.read_turns(name) for name in TEXT_COLUMNS}
        rounds = max(1, *map(len, texts.values()))
        texts = {name: turns or [""] * rounds for name, turns in texts.items()}
        for name in TEXT_COLUMNS:
            if len(texts[name]) != len(texts["prompt"]):
                turns = f"{plural(len(texts[name]), 'turn')}, but the prompt has {len(texts['prompt'])}"
                raise row.error(name, f"{turns}; give one response turn for each prompt turn")
        battles.append({**texts, "id": row.read_text("id") or str(number)})
    return battles


def _token_row(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenRow:
    """Return (ids, segments) of sequences in one token row."""
    packed = pack_sequences([EncodedSequence(*one, (), ()) for one in sequences])
    return {**packed._asdict(), "length": len(packed.input_ids)}
