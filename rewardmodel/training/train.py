"""A recipe and labelled battles in, a trained run folder out: `train`."""

import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from trl import RewardConfig

from rewardmodel.battles import AUGMENTATIONS
from rewardmodel.config.schema import ModelConfig, Recipe
from rewardmodel.config.trainer import EARLY_STOPPING, HEAD_RATE, LORAPLUS, TOKENS
from rewardmodel.data.splits import Parts, fingerprints, load_battles, split, write_training_keys
from rewardmodel.data.teacher import check_taught, with_soft_outcomes
from rewardmodel.distributed import from_main, is_main, wait_for_all
from rewardmodel.model.compatibility import check_ties, refuse
from rewardmodel.model.features import feature_folder, features, layer_logits
from rewardmodel.model.loading import build_model, load_tokenizer, save_model, trained_layer
from rewardmodel.model.precision import check_positions, placement, setup
from rewardmodel.model.weights import fingerprint, resolve
from rewardmodel.objectives import find_objective, fit_tie
from rewardmodel.prompt.tokenization import retention, saved, tokenize
from rewardmodel.run_folder import RunFolder, check_run, check_same_inputs, last_checkpoint, open_run, write_environment
from rewardmodel.training.arguments import Rates, training_arguments
from rewardmodel.training.head_fit import Examples, check_groups, fit_last_layer
from rewardmodel.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    battles: Any = None,
    *,
    parts: Parts | None = None,
    resume: bool = False,
    overwrite: bool = False,
    opening: Callable[[], None] = lambda: None,
) -> tuple[Path, Parts]:
    """Train a model on labelled battles and save it as a run.

    Args:
        recipe: what to do; `recipe.run_folder` is written.
        battles: a Dataset, a DataFrame or a path in the place of `recipe.data.train`.
        parts: its battles, if they were read before.
        resume: continue the run that is there from its last complete checkpoint; one that is done stays as it is.
        overwrite: replace the run that is there.
        opening: is called in the main process once all that was given is found good, before anything is written.

    Returns:
        The run folder and its battles, by part.

    Raises:
        InputError: what was given cannot be used; nothing was written then.
    """
    recipe = recipe if battles is None else with_source(recipe, battles)
    objective = find_objective(recipe.objective)
    check_ties(recipe.model, recipe.objective)
    check_run(recipe, resume, overwrite)
    config = resolve(recipe.model.model_name_or_path, recipe.model.model_revision, weights=False)
    check_positions(config, recipe.prompt.max_length)
    device, dtype = placement(recipe.model, config)
    refuse(setup(recipe.model, config, recipe.trainer))
    args = training_arguments(recipe, dtype, device)
    with args.main_process_first():  # the others then find in the cache what it read
        parts = parts or split(load_battles(recipe.data, battles), recipe.data.fold)
        check_taught(parts.training, recipe.objective.name, objective.teacher)
        data = fingerprints(parts)
        if resume and RunFolder(recipe.run_folder).model.is_dir():
            check_same_inputs(recipe.run_folder, {"data": data})
            if is_main():
                open_run(recipe, resume, overwrite, opening)
            logger.info("%s: already trained", recipe.run_folder)
            return recipe.run_folder, parts
        rows, validation_rows = _rows(parts, load_tokenizer(config), recipe)
    backbone = resolve(recipe.model.model_name_or_path, recipe.model.model_revision)
    facts = {"data": data, **_facts(recipe.model, backbone, device, dtype, args.world_size)}
    if resume:
        check_same_inputs(recipe.run_folder, facts)
    groups = np.asarray(parts.training["group"][:])
    if recipe.model.freeze_backbone or recipe.model.head_init == "fitted":
        check_groups(groups)
    model, tokenizer = build_model(recipe.model, objective.head, args.seed)
    work = Work(model, tokenizer, rows, validation_rows, groups, recipe, dtype)
    begin = partial(_begin, recipe, parts.training, facts, resume, overwrite, opening)
    (_train_head if recipe.model.freeze_backbone else _train_adapters)(work, args, resume, begin)
    return recipe.run_folder, parts


class Work(NamedTuple):
    """What a training works with.

    Attributes:
        model: of `build_model`.
        tokenizer: of the model.
        rows: the training battles, of `prompt.tokenization.ROWS`.
        validation_rows: what checkpoints are judged on, and the tie parameter is fitted on if the loss leaves it alone.
        groups: (n_battles,) the prompt group of each training battle.
        recipe: what to do.
        dtype: precision of the backbone.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    validation_rows: Dataset
    groups: np.ndarray
    recipe: Recipe
    dtype: torch.dtype


def _train_adapters(work: Work, args: RewardConfig, resume: bool, begin: Callable[[], None]) -> None:
    """Train what of a model trains, after calling `begin` when everything is checked, and save the model as a run's."""
    recipe = work.recipe
    tokens = (recipe.trainer[TOKENS], recipe.inference.batch_tokens)
    rates = Rates(recipe.trainer[HEAD_RATE], recipe.trainer[LORAPLUS])
    trainer = PreferenceTrainer(
        work.model, args, work.rows, work.validation_rows, work.tokenizer, recipe.objective, work.dtype, tokens, rates
    )
    if recipe.trainer[EARLY_STOPPING] is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.trainer[EARLY_STOPPING]))
    checkpoint = from_main(lambda: last_checkpoint(recipe.run_folder)) if resume else None
    begin()
    if recipe.model.head_init == "fitted" and not checkpoint:
        fit_head(work)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.objective.learns_ties:
        trainer.fit_tie()
    trainer.save_to(RunFolder(recipe.run_folder).model, recipe.model)


def _train_head(work: Work, args: RewardConfig, resume: bool, begin: Callable[[], None]) -> None:
    """Call `begin`, fit the head's last layer on a frozen backbone, and save the model as a run's."""
    begin()
    objective, layer = find_objective(work.recipe.objective), trained_layer(work.model)
    fit_head(work)
    if not objective.learns_ties:
        rewards = layer_logits(layer, _features(work, work.validation_rows))[..., 0]
        labels = np.asarray(work.validation_rows["labels"][:])
        torch.nn.init.constant_(layer.tie, fit_tie(rewards, labels, objective.link))
    if is_main():
        save_model(work.model, work.tokenizer, work.recipe.model, RunFolder(work.recipe.run_folder).model)
    wait_for_all()


def fit_head(work: Work) -> None:
    """Fit the head's last layer, in place, to what it reads of the training battles."""
    layer, settings = trained_layer(work.model), work.recipe.objective
    examples = Examples.of(work.rows, _features(work, work.rows), layer.weight.device)
    fit_last_layer(layer, examples, work.groups, find_objective(settings), settings)


def _features(work: Work, rows: Dataset) -> np.ndarray:
    """Return what the head's last layer reads of rows, (n_battles, n_sequences, width) float32."""
    return features(
        work.model, trained_layer(work.model), rows, work.tokenizer.pad_token_id, work.dtype,
        feature_folder(work.recipe.model, work.dtype), work.recipe.inference.batch_tokens,
    )  # fmt: skip


def _begin(
    recipe: Recipe, training: Dataset, facts: dict, resume: bool, overwrite: bool, opening: Callable[[], Any]
) -> None:
    """Open the run folder and write what the run is made of."""
    if is_main():
        write_environment(open_run(recipe, resume, overwrite, opening), facts)
        write_training_keys(recipe.run_folder, training)
    wait_for_all()


def _rows(parts: Parts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Return the tokenised training and validation battles, and log what truncation leaves of the former."""
    num_proc, objective = recipe.trainer.get("dataset_num_proc"), find_objective(recipe.objective)
    training = parts.training if objective.teacher else with_soft_outcomes(parts.training)
    encoding = objective.encoding
    swaps = recipe.data.swap_augmentation if encoding == "joint" else "none"  # else there is no order
    training = AUGMENTATIONS[swaps](training, recipe.data.seed)
    both = swaps == "both"
    rows = tokenize(training, tokenizer, recipe.prompt, num_proc, encoding=encoding, both_orders=both)
    validation = tokenize(parts.validation, tokenizer, recipe.prompt, num_proc, encoding=encoding)
    kept = retention(rows)
    logger.info(
        "%d battles to train on, %d for validation; max_length %d cuts %.1f %% of battles and keeps %.1f %% of the "
        "responses' tokens%s",
        len(rows), len(validation), recipe.prompt.max_length,
        100 * kept["battles_cut"], 100 * kept["responses_kept"],
        f"; its sequences share {100 * saved(rows):.1f} % of their tokens" if len(rows[0]["branches"]) > 2 else "",
    )  # fmt: skip
    return rows, validation


def with_source(recipe: Recipe, battles: Any) -> Recipe:
    """Return the recipe with `data.train` telling what was given in its place."""
    given = str(battles) if isinstance(battles, str | Path) else f"<{type(battles).__name__}>"
    return replace(recipe, data=replace(recipe.data, train=given))


def _facts(config: ModelConfig, backbone: Path, device: torch.device, dtype: torch.dtype, processes: int) -> dict:
    """Return what a run remembers of its backbone and of what it computes on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "backbone": {"name": config.model_name_or_path, "fingerprint": fingerprint(backbone)},
        "compute": {"device": name, "dtype": str(dtype).removeprefix("torch."), "processes": processes},
    }
