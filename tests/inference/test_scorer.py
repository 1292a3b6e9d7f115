"""A scorer over parts of a table, alone and in the engines that map it; those that are not installed are skipped."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import battle_frame, small_recipe, write_untrained_run
from datasets import Dataset

from rewardmodel import Scorer, predict
from rewardmodel.errors import InputError
from rewardmodel.inference import judge as module

RECIPES = Path(__file__).parents[2] / "recipes" / "README.md"
NAMES = [f"{order}p_{name}" for order in ("", "ab_", "ba_") for name in ("model_a", "model_b", "tie")]


@pytest.fixture(scope="module")
def run(backbone, tmp_path_factory):
    return write_untrained_run(small_recipe(backbone("llama"), tmp_path_factory.mktemp("scored")))


@pytest.fixture(scope="module")
def frame():
    frame = battle_frame(6)
    return frame.drop(columns=[name for name in frame if name.startswith("winner")])


@pytest.fixture(scope="module")
def table(run, frame):
    return predict(run, frame)


@pytest.fixture(scope="module")
def scorer(run):
    return Scorer(run)


def test_a_table_gets_what_predict_says_to_the_last_digit(scorer, frame, table):
    found = scorer(frame)
    assert list(found) == ["id", *NAMES]
    assert found["id"].tolist() == table["id"].tolist()
    for name in NAMES:
        assert found[name].tolist() == table[name].tolist()
    columns = {name: frame[name].tolist() for name in frame}
    assert all(np.array_equal(scorer(columns)[name], found[name]) for name in NAMES)


def test_texts_may_be_json_turns_or_plain(scorer, frame):
    found = scorer(frame)
    texts = ["prompt", "response_a", "response_b"]
    turns = frame.assign(**{name: frame[name].map(json.loads) for name in texts})
    plain = frame.assign(**{name: turns[name].str[0] for name in texts})
    arrays = frame.assign(**{name: turns[name].map(np.array) for name in texts})
    for other in (turns, plain, arrays):
        assert scorer(other)[NAMES].equals(found[NAMES])


def test_no_rows_give_no_rows(scorer, frame):
    empty = scorer(frame[:0])
    assert list(empty) == ["id", *NAMES]
    assert len(empty) == 0


def test_it_pickles_without_its_model_and_leaves_nothing_behind(scorer, run, frame, monkeypatch, tmp_path):
    scorer(frame[:2])
    data = pickle.dumps(scorer)
    assert len(data) < 1000
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(data)
    assert again(frame[:3])[NAMES].equals(scorer(frame[:3])[NAMES])
    assert not any(Path(tmp_path).rglob("*"))


def test_its_model_is_loaded_once_at_the_first_part(run, frame, monkeypatch):
    loads, load = [], module.load_judge
    monkeypatch.setattr(module, "load_judge", lambda *given: loads.append(1) or load(*given))
    scorer = Scorer(run)
    assert not loads
    scorer(frame[:2])
    scorer(frame[2:4])
    assert len(loads) == 1


def test_what_is_no_table_of_battles_is_refused(scorer, frame, tmp_path):
    with pytest.raises(InputError, match="column 'response_b' is missing"):
        scorer(frame.drop(columns="response_b"))
    with pytest.raises(InputError, match="row 2, column 'prompt': 3 is not a list"):
        scorer({"prompt": ["a", 3], "response_a": ["b", "b"], "response_b": ["c", "c"]})
    with pytest.raises(InputError, match="columns of different lengths"):
        scorer({"prompt": ["a"], "response_a": ["b", "b"], "response_b": ["c"]})
    with pytest.raises(InputError, match=r"no recipe\.yaml there"):
        Scorer(tmp_path)
    with pytest.raises(InputError, match="unknown key"):
        Scorer(scorer.run, ["--inference.nope", "1"])


def test_datasets_maps_it(scorer, frame, table):
    found = example("datasets", scorer=scorer, dataset=Dataset.from_pandas(frame, preserve_index=False))
    assert found.column_names[: len(frame.columns)] == list(frame)
    assert np.abs(np.array(found["p_tie"][:]) - table["p_tie"]).max() <= 1e-6


def example(engine, **names):
    """Return what the line of the documentation for an engine makes."""
    (line,) = re.findall(rf"^scored = (.+)  # {engine}$", RECIPES.read_text(), re.MULTILINE)
    return eval(line, names)


def spark_schema():
    """Return the schema that the documentation makes."""
    (block,) = re.findall(r"```python\n(names = .*?)```", RECIPES.read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    return names["schema"]


def test_the_documented_schema_has_the_columns_of_the_answer(scorer, frame):
    assert [column.split()[0] for column in spark_schema().split(", ")] == list(scorer(frame[:1]))


@pytest.mark.slow  # starts a cluster of two workers, each of which imports torch
def test_ray_maps_it(scorer, frame, table):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        rows = ray.data.from_pandas(frame).repartition(4)
        found = example("Ray Data", scorer=scorer, rows=rows).to_pandas()
    finally:
        ray.shutdown()
    compare_by_id(found, table)


@pytest.mark.slow  # starts a JVM
def test_spark_maps_it(scorer, frame, table):
    sql = pytest.importorskip("pyspark.sql")
    session = sql.SparkSession.builder.master("local[2]").getOrCreate()
    try:
        table_of = session.createDataFrame(frame).repartition(3)
        found = example("Spark", scorer=scorer, table=table_of, schema=spark_schema()).toPandas()
    finally:
        session.stop()
    compare_by_id(found, table)


def compare_by_id(found: pd.DataFrame, table: pd.DataFrame) -> None:
    """Compare predictions whose rows may be in any order; each battle is there once."""
    assert sorted(found["id"]) == sorted(table["id"])
    apart = found.set_index("id")[NAMES] - table.set_index("id")[NAMES]
    assert apart.abs().max(axis=None) <= 1e-6
