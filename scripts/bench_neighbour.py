"""How much a busy neighbour slows training down, by how waiting OpenMP threads wait.

    python scripts/bench_neighbour.py --json scripts/results/neighbour.json

The figures are those of a machine that nothing else uses.

Every setting is a separate process, with these environment variables. Each computes forward and backward passes of
the same random Llama, in turns, alone and beside processes that are always busy, so that whatever else the machine
does is spread over all of them. Figures are medians of milliseconds a pass, the fastest pass, and the median of the
ratios to OpenMP's defaults in the same round.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from bench_battles import tell

from rewardmodel.processors import WAITING

READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
"""Variables that a setting has, or leaves out."""

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "rewardmodel": {"OMP_WAIT_POLICY": WAITING},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}

BUSY = "while True: pass"
"""The program of a neighbour."""

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1000,
}
"""Of SmolLM2-135M, but for the number of layers and the words."""


def answer_passes(layers: int, tokens: int) -> None:
    """Compute a pass for each line of standard input, and print its milliseconds: the process of a setting."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(num_hidden_layers=layers, **SHAPE))
    ids = torch.randint(SHAPE["vocab_size"], (2, tokens))
    for _ in sys.stdin:
        start = time.perf_counter()
        model(ids).last_hidden_state.square().mean().backward()
        model.zero_grad()
        print(1000 * (time.perf_counter() - start), flush=True)


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Yield a process that is killed at the end."""
    variables = {name: value for name, value in os.environ.items() if name not in READ} | environment
    process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen) -> float:
    """Return the milliseconds of the next pass of a process."""
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(command: list[str], rounds: int, neighbours: int) -> dict:
    """Return milliseconds of each setting, alone and beside neighbours, and ratios to the default.

    Args:
        command: starts the process of a setting.
        rounds: passes of each setting, alone and beside neighbours.
        neighbours: processes that are always busy.
    """
    found: dict[str, dict[str, list[float]]] = {place: {name: [] for name in SETTINGS} for place in ("alone", "beside")}
    with ExitStack() as opened:
        processes = {name: opened.enter_context(started(command, values)) for name, values in SETTINGS.items()}
        for process in processes.values():
            ask(process)  # to warm up
        for _ in range(rounds):
            for place, busy in (("alone", 0), ("beside", neighbours)):
                with ExitStack() as beside:
                    for _ in range(busy):
                        beside.enter_context(started([sys.executable, "-c", BUSY], {}))
                    for name, process in processes.items():
                        found[place][name].append(ask(process))
    return {
        place: {name: _summary(times, here["default"]) for name, times in here.items()} for place, here in found.items()
    }


def _summary(times: list[float], default: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(times, default, strict=True)]
    return {"milliseconds": round(median(times)), "fastest": round(min(times)), "ratio": round(median(ratios), 3)}


def main() -> None:
    """Parse, measure in turns, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="passes of each setting, alone and beside neighbours")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--tokens", type=int, default=256, help="of each of two sequences")
    parser.add_argument("--neighbours", type=int, default=1, help="processes that are always busy")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer_passes(options.layers, options.tokens)
        return
    command = [sys.executable, __file__, "--layers", str(options.layers), "--tokens", str(options.tokens), "--answer"]
    load = [round(one, 1) for one in os.getloadavg()]
    figures = {"cores": len(os.sched_getaffinity(0)), "neighbours": options.neighbours, "rounds": options.rounds}
    figures |= {"layers": options.layers, "tokens": options.tokens}
    figures |= {"load_before": load, **measure(command, options.rounds, options.neighbours)}
    tell(figures, options.json)


if __name__ == "__main__":
    main()
