"""A recipe and labelled battles -> a trained run folder: `train`."""

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback
from trl import RewardConfig

from rewardmodel.battles import AUGMENTATIONS
from rewardmodel.config.loader import RecipeLike, as_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import EARLY_STOPPING, HEAD_RATE, LORAPLUS, TOKENS
from rewardmodel.data.splits import Parts, fingerprint_parts, load_battles, split, write_training_keys
from rewardmodel.data.teacher import check_teacher, teacher_share, with_soft_outcomes
from rewardmodel.distributed import from_main, is_main, wait_for_all
from rewardmodel.errors import plural
from rewardmodel.model.backbone import Backbone, resolve_backbone
from rewardmodel.model.compatibility import check_head
from rewardmodel.model.features import layer_logits, read_features
from rewardmodel.model.forward import Predictor
from rewardmodel.model.loading import build_model, compile_blocks, load_tokenizer, save_model, trained_layer
from rewardmodel.model.precision import dtype_name
from rewardmodel.model.vocabulary import check_vocabulary
from rewardmodel.objectives import find_objective, fit_tie
from rewardmodel.prompt.tokenization import measure_row_retention, shared_token_fraction, tokenize
from rewardmodel.run_folder import (
    RunFolder,
    add_to_environment,
    alone,
    check_run,
    check_same_inputs,
    last_checkpoint,
    open_run,
    write_environment,
)
from rewardmodel.training.answer_head import answer_rows, calibration_sample, start_from_answers
from rewardmodel.training.arguments import LearningRates, compile_options, training_arguments
from rewardmodel.training.head_fit import Examples, check_groups, fit_last_layer
from rewardmodel.training.trainer import PreferenceTrainer
from rewardmodel.training.training_log import TrainingLog

logger = logging.getLogger(__name__)


@alone
def train(
    recipe: RecipeLike,
    battles: Any = None,
    *,
    parts: Parts | None = None,
    resume: bool = False,
    overwrite: bool = False,
    before_write: Callable[[], None] = lambda: None,
) -> tuple[Path, Parts]:
    """Train a model on labelled battles and save it as a run.

    Args:
        recipe: what to do, or the path or sections of a recipe; `recipe.run_folder` is written.
        battles: a Dataset, a DataFrame, a list of dicts or a path, in the place of `recipe.data.train`.
        parts: the recipe's battles, if they were read before.
        resume: continue an existing run from its last complete checkpoint; a finished one stays as it is.
        overwrite: replace an existing run.
        before_write: called in the main process once all inputs are checked, before anything is written.

    Returns:
        The run folder and its battles, by part.

    Raises:
        InputError: the recipe or the battles cannot be used; nothing was written then.
        FloatingPointError: a loss or a weight became NaN or infinite; the last checkpoint is good.
    """
    # check the recipe, the folder and the machine before anything is read or loaded
    started = datetime.now(UTC)
    recipe = as_recipe(recipe)
    recipe = recipe if battles is None else with_source(recipe, battles)
    objective, run = find_objective(recipe.objective), RunFolder(recipe.run_folder)
    check_head(recipe.model, recipe.objective)
    check_run(recipe, resume, overwrite)
    backbone = resolve_backbone(
        recipe.model, trainer=recipe.trainer, max_length=recipe.prompt.max_length, weights=False
    )
    args = training_arguments(recipe, backbone.dtype, backbone.device)

    # read and tokenise in the main process first: the others then read the cache
    with args.main_process_first():
        parts = parts or split(load_battles(recipe.data, battles), recipe.data.fold)
        check_teacher(parts.training, recipe.objective.name, objective.teacher, _teacher_share(recipe))
        data = fingerprint_parts(parts)
        if resume and run.model.is_dir():
            check_same_inputs(run.path, {"data": data})
            if is_main():
                open_run(recipe, resume, overwrite, before_write)
            logger.info("%s: already trained", run.path)
            return run.path, parts
        tokenizer = load_tokenizer(backbone.folder)
        check_vocabulary(tokenizer, backbone.config)
        rows, validation_rows = _tokenize_parts(parts, tokenizer, recipe)

    # fetch the weights; a resumed run must have the same ones
    backbone = backbone.with_weights()
    environment = {"data": data, **_environment(backbone, args.world_size)}
    if resume:
        check_same_inputs(run.path, environment)
    groups = np.asarray(parts.training["group"][:])
    if recipe.model.freeze_backbone or recipe.model.head_init == "fitted":
        check_groups(groups)

    # train
    model, tokenizer = build_model(backbone, objective.head, args.seed)
    inputs = TrainingInputs(recipe, backbone, model, tokenizer, rows, validation_rows, groups)
    begin = partial(_open, recipe, parts.training, environment, resume, overwrite, before_write)
    (_train_head if recipe.model.freeze_backbone else _train_adapters)(inputs, args, resume, begin)
    if is_main():
        seconds = round((datetime.now(UTC) - started).total_seconds(), 1)
        when = {"started": started.isoformat(timespec="seconds"), "seconds": seconds}
        add_to_environment(run.path, {"training": {"battles": len(parts.training), **when}})
    return run.path, parts


class TrainingInputs(NamedTuple):
    """What training works with.

    Attributes:
        recipe: what to do.
        backbone: under the model.
        model: of `build_model`.
        tokenizer: of the model.
        rows: the training battles, as `prompt.tokenization.TOKEN_ROW_FEATURES`.
        validation_rows: to judge checkpoints on, and to fit the tie parameter on where the loss does not.
        groups: (n_battles,) prompt group of each training battle.
    """

    recipe: Recipe
    backbone: Backbone
    model: Any
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    validation_rows: Dataset
    groups: np.ndarray

    @property
    def predictor(self) -> Predictor:
        """The model as it computes features."""
        budget, backbone = self.recipe.inference.batch_tokens, self.backbone
        return Predictor(self.model, self.tokenizer, backbone.dtype, budget, backbone.feature_cache)


def _train_adapters(inputs: TrainingInputs, args: RewardConfig, resume: bool, begin: Callable[[], None]) -> None:
    """Train the adapters and the head, or all weights, and save the model; `begin` opens the run folder."""
    recipe, run = inputs.recipe, RunFolder(inputs.recipe.run_folder)
    options = compile_options(recipe.trainer)
    if options is not None:
        compile_blocks(inputs.model, **options)
    trainer = PreferenceTrainer(
        inputs.model,
        args,
        inputs.rows,
        inputs.validation_rows,
        inputs.tokenizer,
        recipe.objective,
        inputs.backbone.dtype,
        tokens=(recipe.trainer[TOKENS], recipe.inference.batch_tokens),
        rates=LearningRates(recipe.trainer[HEAD_RATE], recipe.trainer[LORAPLUS]),
    )
    trainer.remove_callback(PrinterCallback)  # prints dictionaries where there is no bar
    trainer.add_callback(TrainingLog())
    if recipe.trainer[EARLY_STOPPING] is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.trainer[EARLY_STOPPING]))
    checkpoint = from_main(lambda: last_checkpoint(run.path)) if resume else None
    begin()
    if not checkpoint:
        HEAD_INITS[recipe.model.head_init](inputs)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.objective.learns_ties:
        trainer.fit_tie()
    trainer.save_to(run.model, inputs.backbone)


def _train_head(inputs: TrainingInputs, args: RewardConfig, resume: bool, begin: Callable[[], None]) -> None:
    """Fit the head's last layer on a frozen backbone and save the model; `begin` opens the run folder."""
    begin()
    recipe, layer = inputs.recipe, trained_layer(inputs.model)
    objective = find_objective(recipe.objective)
    HEAD_INITS[recipe.model.head_init](inputs)
    fit_head(inputs)
    if not objective.learns_ties:
        rewards = layer_logits(layer, read_features(inputs.predictor, inputs.validation_rows))[..., 0]
        labels = np.asarray(inputs.validation_rows["labels"][:])
        torch.nn.init.constant_(layer.tie, fit_tie(rewards, labels, objective.link))
    if is_main():
        save_model(inputs.model, inputs.tokenizer, inputs.backbone, RunFolder(recipe.run_folder).model)
    wait_for_all()


def fit_head(inputs: TrainingInputs) -> None:
    """Fit the head's last layer, in place, to its inputs for the training battles."""
    layer, settings = trained_layer(inputs.model), inputs.recipe.objective
    examples = Examples.of(inputs.rows, read_features(inputs.predictor, inputs.rows), layer.weight.device)
    fit_last_layer(layer, examples, inputs.groups, find_objective(settings), settings)


def answer_head(inputs: TrainingInputs) -> None:
    """Set the head's last layer, in place, to what the backbone's language model would answer."""
    layer, settings = trained_layer(inputs.model), inputs.recipe.objective
    rows = answer_rows(inputs.model, inputs.tokenizer, inputs.backbone)
    sample = inputs.rows.select(calibration_sample(len(inputs.rows)))
    examples = Examples.of(sample, read_features(inputs.predictor, sample), layer.weight.device)
    start_from_answers(layer, rows, examples, find_objective(settings), settings)


HEAD_INITS: dict[str, Callable[[TrainingInputs], None]] = {
    "zero": lambda _: None,
    "fitted": fit_head,
    "answer": answer_head,
}
"""How a new last layer starts, by the recipe's `model.head_init`."""


def _open(
    recipe: Recipe,
    training: Dataset,
    environment: dict[str, Any],
    resume: bool,
    overwrite: bool,
    before_write: Callable[[], None],
) -> None:
    """Open the run folder and write what the run is made of."""
    if is_main():
        write_environment(open_run(recipe, resume, overwrite, before_write), environment)
        write_training_keys(recipe.run_folder, training)
    wait_for_all()


def _teacher_share(recipe: Recipe) -> float | None:
    """Return the share of the teacher in the outcome of battles with votes; None: the objective does not mix them."""
    if not find_objective(recipe.objective).mixes_teacher:
        return None
    return teacher_share(recipe.objective.weight_votes, recipe.objective.weight_teacher)


def _tokenize_parts(parts: Parts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the tokenised training and validation battles, and log what truncation leaves of the former."""
    encoding, num_proc = find_objective(recipe.objective).encoding, recipe.trainer.get("dataset_num_proc")
    rows = tokenize_training(parts.training, tokenizer, recipe)
    validation = tokenize(parts.validation, tokenizer, recipe.prompt, num_proc, encoding=encoding)
    kept = measure_row_retention(rows)
    shares = len(rows[0]["branches"]) > 2
    logger.info(
        "%s to train on, %d for validation; max_length %d cuts %.1f %% of battles and keeps %.1f %% of the "
        "responses' tokens%s",
        plural(len(rows), "battle"),
        len(validation),
        recipe.prompt.max_length,
        100 * kept["battles_cut"],
        100 * kept["responses_kept"],
        f"; its sequences share {100 * shared_token_fraction(rows):.1f} % of their tokens" if shares else "",
    )
    return rows, validation


def tokenize_training(training: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Dataset:
    """Return battles as token rows to train on, in the orders of A and B that the recipe trains in."""
    objective, num_proc = find_objective(recipe.objective), recipe.trainer.get("dataset_num_proc")
    swaps = recipe.data.swap_augmentation if objective.encoding == "joint" else "none"  # separate: there is no order
    training = training if objective.teacher else with_soft_outcomes(training, _teacher_share(recipe))
    training = AUGMENTATIONS[swaps](training, recipe.data.seed)
    both = swaps == "both"
    return tokenize(training, tokenizer, recipe.prompt, num_proc, encoding=objective.encoding, both_orders=both)


def with_source(recipe: Recipe, battles: Any) -> Recipe:
    """Return the recipe with `data.train` naming what was given in its place: a path, or `<DataFrame>`."""
    given = str(battles) if isinstance(battles, str | Path) else f"<{type(battles).__name__}>"
    return replace(recipe, data=replace(recipe.data, train=given))


def _environment(backbone: Backbone, processes: int) -> dict[str, Any]:
    """Return what environment.json records of the backbone and of the hardware."""
    device = backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "backbone": {"name": backbone.model.model_name_or_path, "fingerprint": backbone.fingerprint},
        "compute": {"device": name, "dtype": dtype_name(backbone.dtype), "processes": processes},
    }
