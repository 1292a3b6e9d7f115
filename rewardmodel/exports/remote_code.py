"""A merged model whose head plain transformers does not have -> the code that loads it there, next to its weights.

The code is `exports.modeling_responses` with the backbone's class in the place of Llama's. `auto_map` in config.json
names it, and transformers runs it with `trust_remote_code=True`.
"""

import json
from pathlib import Path

import transformers

from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.exports import modeling_responses
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.exports.modeling_responses import ResponsesForSequenceClassification
from rewardmodel.files import write_json, write_text
from rewardmodel.model.heads import PooledHead, classifier_class
from rewardmodel.model.loading import load_tokenizer
from rewardmodel.model.saved_model import read_about
from rewardmodel.objectives import HeadShape, find_objective
from rewardmodel.prompt.encoder import PromptEncoder

WRITTEN_FOR = transformers.LlamaForSequenceClassification.__name__
"""The class of transformers that the code is written for; those of other decoders have the same parts."""


def check_remote_code(run: TrainedRun, config: transformers.PreTrainedConfig) -> None:
    """Raise InputError unless there is code for a run's head on the backbone of a configuration."""
    kind = classifier_class(config, run.recipe.model.pooling, HeadShape(**read_about(run.model)["head"]))
    if not issubclass(kind, PooledHead) or not hasattr(transformers, kind.__name__):
        raise InputError(
            f"{run.folder}: model.pair_ties: of backbones of type '{config.model_type}' only rewardmodel loads such a "
            "head; use --kind adapter, or accept that with --rewardmodel-only"
        )


def write_remote_code(recipe: Recipe, folder: Path) -> None:
    """Write the code next to a merged model, and what it reads into config.json.

    Plain transformers without the code then finds a head of another size than config.json says, and refuses it.

    Args:
        recipe: of the run.
        folder: of the merged model.
    """
    file = folder / "config.json"
    config, objective = json.loads(file.read_text(encoding="utf-8")), find_objective(recipe.objective)
    encoder = PromptEncoder(load_tokenizer(folder), recipe.prompt, objective.encoding)
    about = read_about(folder)
    code, ours = Path(modeling_responses.__file__), ResponsesForSequenceClassification.__name__
    text = code.read_text(encoding="utf-8").replace(WRITTEN_FOR, config["architectures"][0])
    write_text(folder / code.name, text)

    config["architectures"] = [ours]
    config["auto_map"] = {"AutoModelForSequenceClassification": f"{code.stem}.{ours}"}
    if objective.head.tie:
        config["id2label"], config["label2id"] = {"0": "reward", "1": "tie"}, {"reward": 0, "tie": 1}
    config["reward_head"] = {
        "objective": recipe.objective.name,
        "pooling": recipe.model.pooling,
        "responses": encoder.responses,
        "tie": about.get("tie"),
        "pair_ties": about["head"]["pairs"],
        "template": encoder.template.text,
        "markers": encoder.markers.pattern,
        "max_length": encoder.max_length,
    }
    write_json(file, config)
