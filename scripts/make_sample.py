"""Graded answers (scripts/sample_answers/*.yaml) in, the packaged demonstration battles out.

Every pair of answers to a prompt becomes a battle in the competition's CSV format: the higher grade wins,
equal grades tie. The winner's position is balanced, and the run prints what could give the outcome away.
Run it again after editing the answers; the result is committed and depends on nothing but them.
"""

import csv
import itertools
import json
import random
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "rewardmodel" / "data" / "sample"
COLUMNS = ["id", "model_a", "model_b", "prompt", "response_a", "response_b"]
OUTCOMES = ["winner_model_a", "winner_model_b", "winner_tie"]
TEST_EVERY = 9  # one prompt in nine is kept for test.csv, whatever its category


def read_prompts() -> list[dict]:
    """Return every prompt entry, files and entries in a fixed order."""
    prompts = []
    for path in sorted((HERE / "sample_answers").glob("*.yaml")):
        prompts += yaml.safe_load(path.read_text(encoding="utf-8"))
    return prompts


def battles_of(prompt: dict, coin: random.Random) -> list[dict]:
    """Return all pairs of one prompt's answers; winners stand in A and in B equally often (to one)."""
    pairs = list(itertools.combinations(range(len(prompt["answers"])), 2))
    coin.shuffle(pairs)
    grades = [answer["grade"] for answer in prompt["answers"]]
    winner_first = itertools.cycle(coin.sample([True, False], 2))
    battles = []
    for one, two in pairs:
        high, low = sorted((one, two), key=lambda answer: -grades[answer])
        first, second = (high, low) if next(winner_first) else (low, high)
        difference = grades[first] - grades[second]
        battles.append(
            {
                "model_a": f"grade-{grades[first]}",
                "model_b": f"grade-{grades[second]}",
                "prompt": json.dumps(prompt["prompt"], ensure_ascii=False),
                "response_a": json.dumps(prompt["answers"][first]["text"], ensure_ascii=False),
                "response_b": json.dumps(prompt["answers"][second]["text"], ensure_ascii=False),
                "winner_model_a": int(difference > 0),
                "winner_model_b": int(difference < 0),
                "winner_tie": int(difference == 0),
            }
        )
    return battles


def write(path: Path, battles: list[dict], columns: list[str], first_id: int) -> None:
    """Write battles as CSV, numbered from `first_id`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for number, battle in enumerate(battles, start=first_id):
            writer.writerow({"id": number, **battle})


def report(battles: list[dict]) -> None:
    """Print the outcome shares and how often the longer response wins, which should be near a half."""
    shares = {key: sum(battle[key] for battle in battles) / len(battles) for key in OUTCOMES}
    decided = [battle for battle in battles if not battle["winner_tie"]]
    longer_wins = sum(
        (len(battle["response_a"]) > len(battle["response_b"])) == bool(battle["winner_model_a"]) for battle in decided
    ) / len(decided)
    print(f"{len(battles)} battles, " + ", ".join(f"{key} {share:.3f}" for key, share in shares.items()))
    print(f"the longer response wins {longer_wins:.3f} of decided battles")


def main() -> None:
    """Write train.csv (labelled) and test.csv (unlabelled, other prompts)."""
    prompts = read_prompts()
    coin = random.Random(0)
    train, test = [], []
    for number, prompt in enumerate(prompts):
        battles = battles_of(prompt, coin)
        if number % TEST_EVERY == TEST_EVERY - 1:
            test += battles[:2]
        else:
            train += battles
    coin.shuffle(train)
    print(f"{len(prompts)} prompts, {sum(len(prompt['answers']) for prompt in prompts)} answers")
    report(train)
    write(SAMPLE / "train.csv", train, [*COLUMNS, *OUTCOMES], first_id=1)
    write(SAMPLE / "test.csv", test, [name for name in COLUMNS if not name.startswith("model_")], first_id=9001)


if __name__ == "__main__":
    main()
