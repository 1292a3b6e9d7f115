"""Two tiny models in memory, one that compares and one that gives rewards, and their servers in process."""

import dataclasses

import pytest
from builders import battle_frame, small_recipe, write_untrained_run
from fastapi.testclient import TestClient

from rewardmodel.config.schema import ObjectiveConfig
from rewardmodel.data.formats import read_battles
from rewardmodel.inference.judge import load_judge
from rewardmodel.serving.app import build_app


@pytest.fixture(scope="session")
def joint_run(backbone, tmp_path_factory):
    """Return the folder of a run that compares two responses, of random weights."""
    return write_untrained_run(small_recipe(backbone("llama"), tmp_path_factory.mktemp("joint")))


@pytest.fixture(scope="session")
def separate_run(backbone, tmp_path_factory):
    """Return the folder of a run that scores each response alone, of random weights."""
    recipe = small_recipe(backbone("llama"), tmp_path_factory.mktemp("separate"))
    prompt = dataclasses.replace(recipe.prompt, template="response")
    return write_untrained_run(dataclasses.replace(recipe, objective=ObjectiveConfig(name="davidson"), prompt=prompt))


@pytest.fixture(scope="session")
def joint_judge(joint_run):
    return load_judge(joint_run)


@pytest.fixture(scope="session")
def separate_judge(separate_run):
    return load_judge(separate_run)


@pytest.fixture(scope="session")
def joint(joint_judge):
    """Return a client of a server of the model that compares."""
    with TestClient(build_app(joint_judge, ["joint"])) as client:
        yield client


@pytest.fixture(scope="session")
def separate(separate_judge):
    """Return a client of a server of the model that gives rewards."""
    with TestClient(build_app(separate_judge, ["separate"])) as client:
        yield client


@pytest.fixture(scope="session")
def battles():
    """Return 80 battles without outcomes."""
    frame = battle_frame(20)
    return read_battles(frame.drop(columns=[name for name in frame if name.startswith("winner")]))
