"""How reading, folding and tokenising battles cost grows, and how tokenising compares with a plain `map`.

    python scripts/bench_battles.py train.csv --rows 57477 --million --json scripts/results/battles.json

The labelled file is repeated, with a mark in every text so that prompts stay apart, up to the rows asked for. Each
measurement is a separate process, on one core for the tokenisers (RAYON_NUM_THREADS=1). Memory is the peak of
anonymous pages (what the process itself holds); pages of the memory-mapped battles come and go as the system likes,
and their peak is reported separately.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path


def repeated(source: Path, rows: int, target: Path) -> int:
    """Write `rows` battles made of those of `source` as a CSV and return its bytes."""
    import csv

    csv.field_size_limit(sys.maxsize)
    with source.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        battles = list(reader)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, battles[0])
        writer.writeheader()
        for number in range(rows):
            battle = dict(battles[number % len(battles)], id=number)
            for name in ("prompt", "response_a", "response_b"):
                battle[name] = battle[name].replace('["', f'["{number // len(battles)} ', 1)
            writer.writerow(battle)
    return target.stat().st_size


class Memory(threading.Thread):
    """Watches this process: `anonymous` and `resident` are peaks in GiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = 0.0
        self.start()

    def run(self) -> None:
        """Look twenty times a second."""
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(status["RssAnon"].split()[0]) / 2**20)
            self.resident = max(self.resident, int(status["VmRSS"].split()[0]) / 2**20)
            time.sleep(0.05)


def read_and_fold(path: str) -> dict:
    """Read, validate, group and deal a file."""
    from rewardmodel.data.folds import assign_folds, assign_groups
    from rewardmodel.data.formats import read_battles

    times = [time.perf_counter()]
    battles = read_battles(path)
    times.append(time.perf_counter())
    battles = assign_groups(battles)
    times.append(time.perf_counter())
    battles = assign_folds(battles, 5)
    times.append(time.perf_counter())
    seconds = {name: round(times[n + 1] - times[n], 1) for n, name in enumerate(("read", "group", "fold"))}
    return {"battles": len(battles), "seconds": seconds | {"all": round(times[-1] - times[0], 1)}}


def tokenise(path: str, how: str, backbone: str) -> dict:
    """Tokenise a file's battles: `ours`, or `plain`, a `map` of the tokenizer over the same texts joined."""
    from rewardmodel.config.schema import PromptConfig
    from rewardmodel.data.formats import read_battles
    from rewardmodel.model.loading import load_tokenizer
    from rewardmodel.prompt.tokenization import measure_row_retention, tokenize

    tokenizer = load_tokenizer(Path(backbone))
    battles = read_battles(path)
    found = {}
    if how == "ours":
        start = time.perf_counter()
        found = measure_row_retention(tokenize(battles, tokenizer, PromptConfig(max_length=1024)))
    else:
        texts = battles.map(joined, batched=True, remove_columns=battles.column_names)
        start = time.perf_counter()
        texts.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=1024), batched=True)
    seconds = time.perf_counter() - start
    speed = {"seconds": round(seconds, 2), "battles_a_second": round(len(battles) / seconds)}
    return {"battles": len(battles), **speed, **found}


def joined(batch: dict) -> dict:
    """Return each battle's turns in one text."""
    columns = (batch[name] for name in ("prompt", "response_a", "response_b"))
    return {"text": ["\n".join(turn for turns in texts for turn in turns) for texts in zip(*columns, strict=True)]}


MEASUREMENTS = {"read_and_fold": read_and_fold, "tokenise": tokenise}


def measured(script: str, name: str, *arguments: str) -> dict:
    """Run one measurement of a script in a separate process with a separate cache."""
    with tempfile.TemporaryDirectory() as cache:
        own = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, script, "--measure", name, *arguments],
            env=os.environ | own | {"REWARDMODEL_CACHE": cache},
            check=True,
            text=True,
            stdout=subprocess.PIPE,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {' '.join(arguments[1:2])}: {found}", flush=True)
    return found


def answer(measurements: dict[str, Callable[..., dict]]) -> bool:
    """Do what `measured` started this process for, print it with the peak of memory, and return whether it was so."""
    if sys.argv[1:2] != ["--measure"]:
        return False
    memory = Memory()
    found = measurements[sys.argv[2]](*sys.argv[3:])
    peak = {"anonymous_gib": round(memory.anonymous, 2), "resident_gib": round(memory.resident, 2)}
    print(json.dumps({**found, **peak}))
    return True


def tell(figures: dict, path: Path | None) -> None:
    """Print figures as JSON, and write them to a file if there is one to write."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main() -> None:
    """Parse, measure, write JSON."""
    if answer(MEASUREMENTS):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="a labelled file of the competition")
    parser.add_argument("--rows", type=int, default=57_477, help="battles to tokenise")
    parser.add_argument("--million", type=int, default=1_000_000, help="battles to read and fold; 0: none")
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    from rewardmodel.model.weights import fetch_backbone

    backbone = str(fetch_backbone(options.backbone, weights=False))
    figures: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "tokenise": [], "read_and_fold": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "battles.csv"
        for rows in (options.rows // 8, options.rows):
            repeated(options.train, rows, path)
            ours, plain = (measured(__file__, "tokenise", str(path), how, backbone) for how in ("ours", "plain"))
            ratio = round(ours["battles_a_second"] / plain["battles_a_second"], 2)
            figures["tokenise"].append({"ours": ours, "plain": plain, "speed_ours_to_plain": ratio})
        for rows in (options.million // 8, options.million) if options.million else ():
            size = repeated(options.train, rows, path)
            figures["read_and_fold"].append(
                {"csv_gib": round(size / 2**30, 2), **measured(__file__, "read_and_fold", str(path))}
            )
    tell(figures, options.json)


if __name__ == "__main__":
    main()
