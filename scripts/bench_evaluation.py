"""Time and memory of evaluating a predictions file of the competition's size, bootstrap and audits included.

    python scripts/bench_evaluation.py --rows 57477 --json scripts/results/evaluation.json

The predictions are drawn: logits, outcomes from them, both orders with noise, 50 model names, lengths like the arena's.
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from bench_battles import tell


def drawn_predictions(rows: int, seed: int = 0) -> pd.DataFrame:
    """Return a predictions table of `rows` labelled battles in groups of one to three."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, 3))
    lengths = np.exp(random.normal(6.9, 0.9, size=(rows, 3))).astype(int)
    logits[:, 0] += 0.3 * np.log(lengths[:, 1] / lengths[:, 2])

    def probabilities(noise: float) -> np.ndarray:
        raised = np.exp(logits + noise * random.normal(size=logits.shape))
        return raised / raised.sum(axis=1, keepdims=True)

    winner = (probabilities(0).cumsum(axis=1) > random.random((rows, 1))).argmax(axis=1)
    orders = {"ab": probabilities(0.3), "ba": probabilities(0.3)}
    names = np.array(
        [f"{family}-{number}" for family in ("gpt", "claude", "llama", "gemma", "mistral") for number in range(10)]
    )
    columns: dict = {"id": np.arange(rows).astype(str), "group": np.sort(random.integers(0, rows * 9 // 10, rows))}
    columns |= {"source": random.choice(["arena", "other"], rows)}
    columns |= {name: random.choice(names, rows) for name in ("model_a", "model_b")}
    columns |= {f"winner_{name}": (winner == n).astype(float) for n, name in enumerate(("model_a", "model_b", "tie"))}
    parts = ("p_model_a", "p_model_b", "p_tie")
    columns |= dict(zip(parts, ((orders["ab"] + orders["ba"]) / 2).T, strict=True))
    columns |= {
        f"{order}_{name}": column for order, p in orders.items() for name, column in zip(parts, p.T, strict=True)
    }
    columns |= {
        "turns": random.choice([1, 1, 1, 2, 3], rows),
        "script": random.choice(["Latin", "Han", "Cyrillic"], rows),
    }
    texts = ("prompt", "response_a", "response_b")
    columns |= {f"{name}_chars": lengths[:, n] for n, name in enumerate(texts)}
    columns |= {
        name: ["lorem ipsum " * (min(size, 1500) // 12) for size in lengths[:, n]] for n, name in enumerate(texts)
    }
    return pd.DataFrame(columns)


def main() -> None:
    """Draw, evaluate in a separate process, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        start = time.perf_counter()
        from rewardmodel.evaluation.evaluate import evaluate

        evaluation = evaluate(options.measure)
        seconds = round(time.perf_counter() - start, 1)
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        print(json.dumps({"battles": evaluation.battles, "seconds_with_imports": seconds, "peak_gib": peak}))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        drawn_predictions(options.rows).to_parquet(run / "validation.parquet", index=False)
        figures = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        for name, path in (("predictions file", run / "validation.parquet"), ("run, with calibration", run)):
            with os.popen(f"{sys.executable} {__file__} --measure {path}") as output:
                figures[name] = json.loads(output.read())
    tell(figures, options.json)


if __name__ == "__main__":
    main()
