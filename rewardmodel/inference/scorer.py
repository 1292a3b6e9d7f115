"""A run -> a function over parts of a table, for engines that map one over many machines; it pickles without a model.

Ray Data, Spark and `datasets` each have their own way to split a table, move its parts and repeat what failed. They
only need a function that takes a part and returns one of as many rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rewardmodel.errors import InputError
from rewardmodel.inference.battles import single_model
from rewardmodel.run_folder import load_run_recipe

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from rewardmodel.inference.judge import Judge

Part = TypeVar("Part", "pd.DataFrame", Mapping[str, Any])


class Scorer:
    """Predicts parts of a table of battles with one model, which each process loads at its first part.

    A part is a DataFrame or a dict of columns, with `prompt`, `response_a`, `response_b` and perhaps `id`, as the
    competition's format has them. The answer is of the same type and has a row for each of the part's, in order: `id`,
    `p_model_a`, `p_model_b`, `p_tie` (float64), and the same of each order in `ab_*` and `ba_*` (float32), as `predict`
    has them for the same battles. Nothing is written, and nothing is kept from part to part, so that a part
    may be given again.

    Args:
        run: a run folder, or an export; of one model, at a path that all machines have.
        overrides: keys of the run's recipe, as typed: `["--model.device", "cuda"]`.

    Raises:
        InputError: no trained run there, or one of several folds. A part that is no table of battles raises it too.
    """

    def __init__(self, run: str | Path, overrides: Sequence[str] = ()) -> None:
        self.run = Path(run).absolute()
        self.overrides = list(overrides)
        single_model(self.run)
        load_run_recipe(self.run, self.overrides)
        self._judge: Judge | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: where the model is, not the model."""
        return {**vars(self), "_judge": None}

    def __call__(self, part: Part) -> Part:
        """Return the predictions of a part."""
        import pandas as pd

        from rewardmodel.inference.judge import load_judge, parse_battles

        columns = {str(name): list(part[name]) for name in part}
        if isinstance(part, Mapping):
            lengths = {name: len(values) for name, values in columns.items()}
            if len(set(lengths.values())) > 1:
                raise InputError(f"{self.run}: columns of different lengths: {lengths}; give a row of each")
        if self._judge is None:
            recipe = load_run_recipe(self.run, self.overrides)
            self._judge = load_judge(self.run, recipe)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        table = self._judge.predict(parse_battles(rows, "battles"))
        names = [name for name in table if name == "id" or "p_" in str(name)]
        table = table[[name for name in names if not str(name).startswith("baseline_")]]
        if isinstance(part, pd.DataFrame):
            return table
        arrays: dict[str, np.ndarray] = {str(name): table[name].to_numpy() for name in table}
        return arrays
