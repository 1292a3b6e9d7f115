"""What the scikit-learn baselines reach, and what they cost at the size of the competition.

    python scripts/bench_baseline.py train.csv --rows 57477 --json scripts/results/baseline.json

Log losses are those of the file itself, five folds grouped by prompt. Time and memory are of its battles repeated, with
a mark in every text, up to the rows asked for: one `fit_predict` (four folds train, one is predicted) and `baseline`
(all five folds). The repeated battles are no test of the baselines (every answer is in all folds), so their log loss is
not reported. Each measurement is a separate process; memory is the peak of anonymous pages.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench_battles import answer, measured, repeated, tell

FOLDS = 5


def log_losses(path: str) -> dict:
    """Evaluate the baselines on the battles of a file."""
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles
    from rewardmodel.evaluation.baselines import baseline, measure_baselines

    table = baseline(load_battles(DataConfig(train=path, folds=FOLDS)))
    rounded = {
        name: {metric: {part: round(value, 4) for part, value in asdict(one).items()} for metric, one in found.items()}
        for name, found in measure_baselines(table).items()
    }
    return {"battles": len(table), "folds": FOLDS, "baselines": rounded}


def cost(path: str, verb: str) -> dict:
    """Fit and predict once, or run `baseline`, on the battles of a file."""
    from rewardmodel.config.schema import DataConfig
    from rewardmodel.data.splits import load_battles, split
    from rewardmodel.evaluation.baselines import baseline, fit_baselines, measure_baselines, predict_baselines

    start = time.perf_counter()
    battles = load_battles(DataConfig(train=path, folds=FOLDS))
    loaded = time.perf_counter()
    if verb == "baseline":
        measure_baselines(baseline(battles))
    else:
        parts = split(battles, 0)
        predict_baselines(fit_baselines(parts.training), parts.validation)
    seconds = {"load": round(loaded - start, 1), verb: round(time.perf_counter() - loaded, 1)}
    return {"battles": len(battles), "seconds": seconds, "torch_imported": "torch" in sys.modules}


MEASUREMENTS = {"log_losses": log_losses, "cost": cost}


def main() -> None:
    """Parse, measure, write JSON."""
    if answer(MEASUREMENTS):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a labelled file of the competition")
    parser.add_argument("--rows", type=int, default=57_477, help="battles to measure time and memory with")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    figures["log_losses"] = measured(__file__, "log_losses", str(options.train))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "battles.csv"
        repeated(options.train, options.rows, path)
        figures["cost"] = {verb: measured(__file__, "cost", str(path), verb) for verb in ("fit_predict", "baseline")}
    tell(figures, options.json)


if __name__ == "__main__":
    main()
