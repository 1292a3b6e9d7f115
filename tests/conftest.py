"""No network, a cache of this session alone, and the fixtures that many tests share."""

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ["REWARDMODEL_USER_CACHE"] = os.environ.get("REWARDMODEL_CACHE", "")
os.environ["REWARDMODEL_CACHE"] = tempfile.mkdtemp(prefix="rewardmodel-tests-")

import pandas as pd
import pytest
from builders import battle_frame, make_backbone, make_tokenizer, small_recipe
from fresh import run_command


def pytest_collection_finish():
    """Exempt what was imported by now from garbage collection: each time a model is loaded it would take .3 s."""
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_is_not_set_up():
    """Undo what the command line does to the logger of the package: its handler writes to the output of one test."""
    ours = logging.getLogger("rewardmodel")
    ours.handlers, ours.propagate = [], True


def pytest_sessionfinish():
    """Remove the cache of this session."""
    shutil.rmtree(os.environ["REWARDMODEL_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Return the folder of a tiny backbone: backbone("llama")."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_backbone(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """Return the tiny tokenizer."""
    return make_tokenizer()


@pytest.fixture
def frame() -> pd.DataFrame:
    """Return 48 labelled battles of 12 prompts."""
    return battle_frame()


@pytest.fixture
def recipe(backbone, tmp_path):
    """Return a recipe that trains a tiny Llama in a second, in float32 on the CPU."""
    return small_recipe(backbone("llama"), tmp_path)


@pytest.fixture
def read_back_in_a_fork(monkeypatch):
    """Read exports back in a fork in the place of a new interpreter."""
    monkeypatch.setattr("rewardmodel.exports.parity.subprocess", SimpleNamespace(run=run_command))


@pytest.fixture
def user_cache(monkeypatch):
    """Let converted real backbones be found in, and kept in, the user's own cache."""
    if os.environ["REWARDMODEL_USER_CACHE"]:
        monkeypatch.setenv("REWARDMODEL_CACHE", os.environ["REWARDMODEL_USER_CACHE"])
    else:
        monkeypatch.delenv("REWARDMODEL_CACHE")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real battles, or skip."""
    folder = os.environ.get("REWARDMODEL_REAL_DATA")
    if not folder:
        pytest.skip("REWARDMODEL_REAL_DATA is not set: no real battles to test on")
    return Path(folder)
