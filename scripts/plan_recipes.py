r"""What `rewardmodel doctor` says of time and memory of the large recipes on GPUs that people have, as one table.

    python scripts/plan_recipes.py --json scripts/results/recipes.json
    python scripts/plan_recipes.py --recipes gemma2_9b_qlora --keys model.lora_first_layer=16
    python scripts/plan_recipes.py --backbones folder       # configurations and tokenizers in folder/gemma-2-9b-it, …

The battles are as many and as long as those of the competition. Only configurations and tokenizers are fetched. Nothing
here is measured: times assume a share of each GPU's listed speed (`doctor` states it).
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_battles import tell

RECIPES = Path(__file__).parents[1] / "recipes"

LARGE = ("gemma2_2b_qlora", "gemma2_9b_qlora", "llama3_8b_qlora", "qwen3_1_7b_qlora", "qwen3_4b_qlora")

MACHINES = {"H100": 1, "A100-80GB": 1, "L4": 1, "T4": 2}
"""GPUs by name, and how many of them."""


def plan(name: str, words: list[str], backbones: Path | None) -> dict[str, Any]:
    """Return hours and GiB of a recipe on each machine; a machine on which it does not run has the reason."""
    from rewardmodel import load_recipe
    from rewardmodel.distributed import Launch
    from rewardmodel.planning.doctor import doctor
    from rewardmodel.planning.gpus import GIB

    recipe = load_recipe(RECIPES / f"{name}.yaml", words)
    if backbones:
        folder = backbones / Path(recipe.model.model_name_or_path).name
        recipe = replace(recipe, model=replace(recipe.model, model_name_or_path=str(folder)))
    found: dict[str, Any] = {}
    for device, count in MACHINES.items():
        diagnosis = doctor(recipe, device, Launch(count, "ddp" if count > 1 else ""), others=False)
        if diagnosis.estimate is None:
            found[f"{count} x {device}"] = {"problems": diagnosis.problems}
            continue
        hours, memory = diagnosis.estimate.hours, diagnosis.estimate.training
        found[f"{count} x {device}"] = {
            "hours": round(hours.total, 2),
            "training_hours": round(hours.training, 2),
            "gib_at_least": round(memory.least / GIB, 1),
            "fits": memory.fits,
            "precision": diagnosis.precision.partition(":")[0],
        }
    return found


def main() -> None:
    """Parse, plan, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=LARGE, metavar="NAME", help="default: the large ones")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipes, changed")
    parser.add_argument("--backbones", type=Path, help="folder with a folder for each backbone, by its name on the hub")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    words = [f"--{word}" for word in options.keys]
    found = {name: plan(name, words, options.backbones) for name in options.recipes}
    tell({"keys": options.keys, "recipes": found}, options.json)
    for name, machines in found.items():
        cells = [
            f"{one['hours']:.1f} h, {one['gib_at_least']:.0f} GiB" if "hours" in one else "no"
            for one in machines.values()
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
