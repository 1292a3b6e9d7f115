import json

import pytest
import yaml

from rewardmodel.evaluation.results import Evaluation
from rewardmodel.evaluation.run_facts import describe_run, learning_curve, read_text


def write(folder, recipe, environment):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_a_run_is_described_in_one_line(tmp_path):
    environment = {
        "backbone": {"name": "smollm2-135m-instruct"},
        "compute": {"device": "NVIDIA H100", "dtype": "bfloat16", "processes": 2},
        "training": {"battles": 800, "started": "2026-11-07T10:00:00+00:00", "seconds": 163.2},
    }
    recipe = {"data": {"train": "/data/train.csv"}, "model": {"num_hidden_layers": 10}}
    assert describe_run(write(tmp_path, recipe, environment), Evaluation(200, 1)) == (
        "smollm2-135m-instruct (lowest 10 layers) on train.csv: trained on 800 battles, judged on 200 battles of "
        "1 prompt; 7 November 2026, in 3 minutes, on 2 × NVIDIA H100 in bfloat16"
    )


def test_a_k_fold_run_is_on_the_device_of_its_first_fold(tmp_path):
    folds = {name: {"device": "T4", "dtype": "float16", "processes": 1} for name in ("fold-0", "fold-1")}
    folder = write(tmp_path, {}, {"compute": folds})
    assert describe_run(folder, Evaluation(9, 3)) == "judged on 9 battles of 3 prompts; on T4 in float16"


@pytest.mark.parametrize(("seconds", "said"), [(1, "in 1 second"), (40.2, "in 40 seconds"), (9000, "in 2.5 hours")])
def test_a_duration_is_in_the_unit_of_its_size(seconds, said, tmp_path):
    environment = {"training": {"seconds": seconds}}
    assert describe_run(write(tmp_path, {}, environment), Evaluation(1, 1)) == f"judged on 1 battle of 1 prompt; {said}"


@pytest.mark.parametrize(
    ("train", "name"),
    [
        ("sample", "sample"),
        (["a/b/x.csv", {"path": "y.parquet", "weight": 2}], "x.csv, y.parquet"),
        ("owner/set", "owner/set"),
        ("<DataFrame>", "<DataFrame>"),
    ],
)
def test_data_is_named_by_file_or_hub_id(train, name, tmp_path):
    folder = write(tmp_path, {"data": {"train": train}, "model": {"model_name_or_path": "m"}}, {})
    assert describe_run(folder, Evaluation(2, 2)) == f"m on {name}: judged on 2 battles of 2 prompts"


def test_files_that_are_not_there_or_are_broken_are_not_spoken_of(tmp_path):
    assert describe_run(tmp_path, Evaluation(2, 2)) == "judged on 2 battles of 2 prompts"
    (tmp_path / "recipe.yaml").write_text("[")
    (tmp_path / "environment.json").write_text("3")
    assert describe_run(tmp_path, Evaluation(2, 2)) == "judged on 2 battles of 2 prompts"
    assert learning_curve(tmp_path) == learning_curve(None) == ([], [])
    assert read_text(tmp_path / "nowhere") is None
