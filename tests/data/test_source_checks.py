import logging

import pytest

from rewardmodel.config.schema import DataConfig, Source
from rewardmodel.data.readers import COMPRESSIONS, READERS
from rewardmodel.data.source_checks import COMPRESSED_ENDINGS, ENDINGS, announce, check_source, check_sources, is_on_hub
from rewardmodel.errors import InputError


def test_the_endings_are_those_that_have_a_reader():
    assert set(ENDINGS) == READERS.keys()
    assert set(COMPRESSED_ENDINGS) == COMPRESSIONS.keys()


@pytest.mark.parametrize(
    ("path", "expected"),
    [("lmsys/arena-55k", True), ("data/train.csv", False), ("data/train.csv.gz", False), ("a/b/c", False)],
)
def test_a_name_with_one_slash_and_no_ending_can_be_on_the_hub(path, expected):
    assert is_on_hub(path) == expected


def test_every_source_of_a_recipe_is_named_or_refused(tmp_path):
    for name in ("a.csv", "b.csv", "teacher.parquet", "sample.csv"):
        (tmp_path / name).touch()
    a, b, gone = (str(tmp_path / name) for name in ("a.csv", "b.csv", "gone.csv"))
    teacher, sample = str(tmp_path / "teacher.parquet"), str(tmp_path / "sample.csv")
    data = DataConfig(train=[a, Source("me/battles"), Source(b, teacher=teacher)], test=b, sample_submission=sample)
    assert check_sources(data) == [a, "me/battles", b, b]
    for broken in (
        DataConfig(train=gone),
        DataConfig(train=[a, gone]),
        DataConfig(test=gone),
        DataConfig(train=Source(a, teacher=gone)),
        DataConfig(test=a, sample_submission=gone),
    ):
        with pytest.raises(InputError, match=r"gone\.csv: no such file; give "):
            check_sources(broken)
    check_source("sample")


def test_what_is_read_is_said_if_the_cache_can_be_written(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        announce(["train.csv", "test.csv"])
    assert caplog.messages == ["reading train.csv, test.csv …"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("REWARDMODEL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        InputError, match=r"^REWARDMODEL_CACHE: .*cache: .*file cannot be written to \(Not a directory\)"
    ):
        announce(["train.csv"])
