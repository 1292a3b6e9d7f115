"""The benchmarks, by name: where their data is, how its rows are read, and what is measured; one literal table.

Sources: RewardBench (Lambert et al. 2024), RewardBench 2 (Malik et al. 2025), RM-Bench (Liu et al. 2025), JudgeBench
(Tan et al. 2025), LLMBar (Zeng et al. 2024). Names of subsets, categories and weights are those that they publish.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rewardmodel.benchmarks import questions as read
from rewardmodel.benchmarks import scoring
from rewardmodel.benchmarks.figures import Figure
from rewardmodel.benchmarks.questions import Question, QuestionParts
from rewardmodel.benchmarks.scoring import Scored, Terms
from rewardmodel.config.schema import Source
from rewardmodel.data.raw_row import RawRow
from rewardmodel.errors import InputError, nearest

REWARDBENCH2_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", read.TIES)

REWARDBENCH_CATEGORIES = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
    },
}
"""Category -> weight of each subset in it: numbers of prompts, but for math-prm, which has 447 and weighs as much as
all of the code (`rewardbench/constants.py` of allenai/reward-bench, commit 05a9005)."""

JUDGEBENCH_SOURCES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""Beginning of a source -> its category."""

RM_BENCH_DOMAINS = ("chat", "math", "code", "safety")

LLMBAR_SUBSETS = ("Natural", *(f"Adversarial_{name}" for name in ("Neighbor", "GPTInst", "GPTOut", "Manual")))


@dataclass(frozen=True)
class Scoring:
    """How responses are scored and measured.

    Attributes:
        columns: that the data has.
        parse: raw row -> parts of a question.
        terms: (questions, scores of each) -> numbers by question.
        chance: questions -> the expected terms of a scorer without knowledge.
        figures: (questions, terms) -> what is reported.
        names: columns whose value names a row, where they exist.
        across: whether only pairs of a right and a wrong response matter, so that others are not played.
    """

    columns: tuple[str, ...]
    parse: Callable[[RawRow], QuestionParts]
    terms: Callable[[Sequence[Question], Sequence[Scored]], Terms]
    chance: Callable[[Sequence[Question]], Terms]
    figures: Callable[[Sequence[Question], Terms], list[Figure]]
    names: tuple[str, ...] = ("id",)
    across: bool = False


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: its name for people.
        hub: the data set on the hub; None: there is no default.
        splits: of that data set, one after another.
        scoring: of responses; None: outcome probabilities of battles are measured.
    """

    title: str
    hub: Source | None
    splits: tuple[str, ...]
    scoring: Scoring | None


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        InputError: there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark: no benchmark '{name}'{nearest(name, BENCHMARKS)}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


BENCHMARKS = {
    "rewardbench2": Benchmark(
        "RewardBench 2",
        Source("allenai/reward-bench-2"),
        ("test",),
        Scoring(
            ("id", "prompt", "chosen", "rejected", "num_correct", "total_completions", "subset"),
            partial(read.parse_best_of_n, subsets=REWARDBENCH2_SUBSETS),
            scoring.best_of_n_terms,
            scoring.best_of_n_chance,
            partial(scoring.best_of_n_figures, subsets=REWARDBENCH2_SUBSETS),
        ),
    ),
    "rewardbench": Benchmark(
        "RewardBench",
        Source("allenai/reward-bench"),
        ("filtered",),
        Scoring(
            ("prompt", "chosen", "rejected", "subset"),
            partial(read.parse_pair, subsets=[name for one in REWARDBENCH_CATEGORIES.values() for name in one]),
            scoring.pair_terms,
            scoring.pair_chance,
            partial(scoring.category_figures, categories=REWARDBENCH_CATEGORIES),
        ),
    ),
    "rm_bench": Benchmark(
        "RM-Bench",
        Source("THU-KEG/RM-Bench"),
        ("train",),
        Scoring(
            ("prompt", "chosen", "rejected", "domain"),
            partial(read.parse_styles, domains=RM_BENCH_DOMAINS),
            scoring.style_terms,
            scoring.style_chance,
            partial(scoring.style_figures, domains=RM_BENCH_DOMAINS),
            across=True,
        ),
    ),
    "judgebench": Benchmark(
        "JudgeBench",
        Source("ScalerLab/JudgeBench"),
        ("gpt",),
        Scoring(
            ("question", "response_A", "response_B", "label", "source"),
            partial(read.parse_judgement, sources=JUDGEBENCH_SOURCES),
            scoring.judgement_terms,
            scoring.judgement_chance,
            partial(scoring.judgement_figures, categories=list(JUDGEBENCH_SOURCES.values())),
            names=("pair_id",),
        ),
    ),
    "llmbar": Benchmark(
        "LLMBar",
        Source("princeton-nlp/LLMBar", subset="LLMBar", revision="refs/convert/parquet"),
        LLMBAR_SUBSETS,
        Scoring(
            ("input", "output_1", "output_2", "label"),
            partial(read.parse_instruction, subsets=LLMBAR_SUBSETS),
            scoring.pair_terms,
            scoring.pair_chance,
            partial(scoring.instruction_figures, subsets=LLMBAR_SUBSETS),
        ),
    ),
    "preferences": Benchmark("Preferences", None, (), None),
}
"""Benchmarks by their name on the command line; `preferences` are any labelled battles."""
