"""A recipe -> its log loss by number of training battles: `measure_learning_curve`.

Every point is a model that is trained on some of the prompts and judged on the same held-out ones. On a frozen backbone
a point is a head; for any other recipe it is a whole training, whose model is removed once it has predicted. Points
that are finished are kept: the same command goes on from them.
"""

import gc
import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from rewardmodel.battles import data_fingerprint, outcomes
from rewardmodel.config.loader import RecipeLike, as_recipe, dump_recipe
from rewardmodel.config.schema import Recipe
from rewardmodel.config.trainer import EARLY_STOPPING
from rewardmodel.data.folds import draw_rows, train_mask
from rewardmodel.data.splits import Parts, load_battles
from rewardmodel.distributed import from_main, is_main, wait_for_all
from rewardmodel.errors import InputError, plural
from rewardmodel.evaluation.learning_curve import LearningCurve, summarise_curve
from rewardmodel.files import check_writable, lock_output, read_arrays, write_arrays, write_json, write_text
from rewardmodel.metrics import log_loss, log_loss_terms
from rewardmodel.run_folder import RunFolder

logger = logging.getLogger(__name__)

SMALLEST, STEP = 125, 2.0
"""Training battles of the first size, and about how many times larger each of the next is."""

DRAWS = 5
"""Draws of the training prompts for each size but the largest, which has all of them."""


@dataclass(frozen=True)
class Point:
    """A model of the curve: on which rows of the battles it trains, and which it is judged on."""

    fold: int
    size: int
    draw: int
    training: np.ndarray
    judged: np.ndarray

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return f"fold-{self.fold}-battles-{self.size}-draw-{self.draw}"


def measure_learning_curve(
    recipe: RecipeLike,
    output: str | Path,
    *,
    sizes: Sequence[int] = (),
    draws: int = DRAWS,
    all_folds: bool = False,
) -> LearningCurve:
    """Measure a recipe's learning curve, and write learning_curve.json and learning_curve.html.

    Args:
        recipe: what to train, or its path, or its sections; its `data.fold` is held out. `trainer.output_dir`,
            calibration and blend do not count, and the held-out battles choose no checkpoint: the last one predicts.
        output: folder to write; finished points in it are kept.
        sizes: numbers of training battles; by default from `SMALLEST` on, about doubling, to all.
        draws: of the training prompts, for each size but the largest; the sizes of a draw contain each other.
        all_folds: hold out each fold in turn, so that every battle is judged: as many times the work.

    Raises:
        InputError: the recipe or its battles cannot be used, or sizes that there are not enough battles for.
    """
    recipe, output = as_recipe(recipe), Path(output)
    if draws < 1:
        raise InputError(f"--draws: {draws}; give at least 1")
    check_writable(output, "--output")
    with lock_output(output):
        battles = load_battles(recipe.data)
        points = plan_points(battles, recipe, sizes, draws, all_folds)

        from rewardmodel.model.backbone import resolve_backbone  # torch from here on

        weights = resolve_backbone(recipe.model, trainer=recipe.trainer, max_length=recipe.prompt.max_length)
        found = _measure(recipe, battles, points, output, _identify(recipe, battles, weights.fingerprint))
        curve = _summarise(recipe, battles, points, found)
        if is_main():
            from rewardmodel.evaluation.curve_page import render_curve

            write_json(output / "learning_curve.json", asdict(curve))
            write_text(output / "learning_curve.html", render_curve(curve))
    return curve


def plan_points(battles: Dataset, recipe: Recipe, sizes: Sequence[int], draws: int, all_folds: bool) -> list[Point]:
    """Return the models to train, the smallest first.

    Raises:
        InputError: there is nothing to train on, or sizes that there are not enough battles for.
    """
    plain = battles.with_format(None)
    fold, groups = np.asarray(plain["fold"][:]), np.asarray(plain["group"][:])
    folds = range(recipe.data.folds) if all_folds else [recipe.data.fold]
    available = {number: np.flatnonzero(train_mask(fold, number)) for number in folds}
    most = min(map(len, available.values()))
    chosen = sorted(set(sizes)) or _default_sizes(most)
    if chosen[0] < 2 or chosen[-1] > most:
        raise InputError(f"--sizes: {plural(most, 'battle')} train; give sizes from 2 to that")
    points = []
    for size in chosen:
        for number, rows in available.items():
            judged = np.flatnonzero(fold == number)
            if size == most:  # all of them, in every draw
                points.append(Point(number, size, 0, rows, judged))
                continue
            for draw in range(draws):
                own = rows[draw_rows(groups[rows], size, recipe.data.seed + draw)]
                points.append(Point(number, size, draw, own, judged))
    return points


def _default_sizes(most: int) -> list[int]:
    """Return sizes in equal ratios of about `STEP` from `SMALLEST` to all: 125, 252, 508, 1023, 2063."""
    smallest = min(SMALLEST, max(most // 8, 2))
    steps = max(round(np.log(most / smallest) / np.log(STEP)), 1)
    return sorted({round(smallest * (most / smallest) ** (step / steps)) for step in range(steps + 1)})


def _identify(recipe: Recipe, battles: Dataset, fingerprint: str | None) -> str:
    """Return a digest of what points depend on: what another recipe, data or backbone gave is not mixed in."""
    trainer = {**recipe.trainer, "output_dir": ""}
    data = replace(recipe.data, test=None, sample_submission=None, fold=0)
    own = dump_recipe(replace(recipe, trainer=trainer, data=data))
    return hashlib.blake2b(f"{own}{data_fingerprint(battles)}{fingerprint}".encode(), digest_size=6).hexdigest()


def _measure(recipe: Recipe, battles: Dataset, points: list[Point], output: Path, key: str) -> dict[str, np.ndarray]:
    """Return the predictions of every point, (n_judged, 3), by name, those of an earlier call out of its files."""
    folder = output / "points" / key
    found: dict[str, np.ndarray] = from_main(lambda: _read(folder, points))
    todo = [point for point in points if point.name not in found]
    frozen = recipe.model.freeze_backbone
    kind = ("head to fit", "heads to fit") if frozen else ("training", "trainings")
    logger.info(
        "%d to %d battles, %s: %d %s%s",
        points[0].size,
        points[-1].size,
        plural(len(points), "point"),
        len(todo),
        kind[len(todo) != 1],
        f", {len(found)} done before" if found else "",
    )
    if not todo:
        return found
    made = _fit(recipe, battles, todo) if frozen else _train(recipe, battles, todo, folder)
    true = outcomes(battles)
    for number, (point, predicted) in enumerate(zip(todo, made, strict=True), start=1):
        if is_main():
            write_arrays(folder / f"{point.name}.npz", predicted=predicted)
        found[point.name] = predicted
        loss = log_loss(predicted.astype(np.float64), true[point.judged])
        logger.info("%d of %d: %s: log loss %.4f", number, len(todo), point.name, loss)
    return found


def _read(folder: Path, points: list[Point]) -> dict[str, np.ndarray]:
    """Return the predictions of finished points by name; a file that cannot be read is made again."""
    found = {}
    for point in points:
        for (predicted,) in read_arrays(folder, f"{point.name}.npz", ("predicted",)):
            found[point.name] = predicted
    return found


def _fit(recipe: Recipe, battles: Dataset, points: Iterable[Point]) -> Iterator[np.ndarray]:
    from rewardmodel.training.head_subsets import fit_subsets

    return fit_subsets(recipe, battles, [(point.training, point.judged) for point in points])


def _train(recipe: Recipe, battles: Dataset, points: Iterable[Point], folder: Path) -> Iterator[np.ndarray]:
    """Yield the predictions of each point by a model that is trained for it, and removed afterwards.

    The validation part of these runs is what they train on: a tie parameter that the objective does not learn is fitted
    to it, and the judged battles have no part in the run.
    """
    import torch

    from rewardmodel.inference.predict import predict_with
    from rewardmodel.model.loading import load_predictor
    from rewardmodel.predictions import predicted
    from rewardmodel.training.train import train

    nothing = battles.select([])
    for point in points:
        run, training = folder / point.name, battles.select(point.training)
        keys = {"output_dir": str(run), "eval_strategy": "no", EARLY_STOPPING: None}
        data = replace(recipe.data, test=None, sample_submission=None)
        own = replace(recipe, data=data, trainer={**recipe.trainer, **keys})
        train(own, parts=Parts(training, training, nothing, nothing), resume=RunFolder(run).recipe.is_file())
        predictor = load_predictor(own.model, RunFolder(run).model, own.inference.batch_tokens)
        table = predict_with(predictor, own, battles.select(point.judged))
        yield predicted(table).astype(np.float32)
        del predictor
        gc.collect()  # frees this model before the next one loads
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        wait_for_all()
        if is_main():
            shutil.rmtree(run, ignore_errors=True)
            RunFolder(run).lock.unlink(missing_ok=True)


def _summarise(recipe: Recipe, battles: Dataset, points: list[Point], found: dict[str, np.ndarray]) -> LearningCurve:
    """Return the curve of all points; with several folds, each draw's losses are of the battles of all of them."""
    true, groups = outcomes(battles), np.asarray(battles.with_format(None)["group"][:])
    sizes = sorted({point.size for point in points})
    judged = np.concatenate([point.judged for point in points if (point.size, point.draw) == (sizes[-1], 0)])
    counts, losses = [], []
    for size in sizes:
        own = [point for point in points if point.size == size]
        draws = sorted({point.draw for point in own})
        counts.append(float(np.mean([len(point.training) for point in own])))
        losses.append(np.stack([_losses_of([one for one in own if one.draw == draw], found, true) for draw in draws]))
    shares = true[np.unique(np.concatenate([point.training for point in points]))]
    decided = np.nanmean(shares[:, :2])
    prior = np.tile([decided, decided, np.nanmean(shares[:, 2])], (len(judged), 1))
    name = Path(recipe.trainer["output_dir"]).name
    return summarise_curve(name, counts, losses, groups[judged], log_loss(prior, true[judged]))


def _losses_of(points: list[Point], found: dict[str, np.ndarray], true: np.ndarray) -> np.ndarray:
    """Return the loss of each judged battle, fold after fold, (n_judged,) float64."""
    return np.concatenate(
        [log_loss_terms(found[point.name].astype(np.float64), true[point.judged]) for point in points]
    )
