import dataclasses

import pytest

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.configuration import Configuration, default_attention
from rewardmodel.model.families import find_family

HERE = Configuration(ModelConfig(), "llama", 16, "cuda", "bfloat16", (9, 0), trainer={})
ABSENT = "no_such_package"


@pytest.mark.parametrize(
    ("family", "dtype", "capability", "expected"),
    [
        ("llama", "bfloat16", (9, 0), "varlen"),
        ("llama", "float32", (9, 0), "sdpa"),
        ("llama", "float16", (7, 5), "sdpa"),
        ("llama", "bfloat16", None, "sdpa"),
        ("gemma2", "bfloat16", (8, 0), "flex_attention"),
        ("gemma2", "float32", (7, 5), "eager"),
        ("gemma2", "bfloat16", None, "eager"),
        ("olmo2", "bfloat16", (9, 0), "eager"),
    ],
)
def test_the_default_attention_is_the_first_that_works(family, dtype, capability, expected, monkeypatch):
    assert default_attention(find_family(family), dtype, capability) == expected
    monkeypatch.setattr("rewardmodel.model.configuration.HAS_VARLEN", False)
    older = "sdpa" if expected == "varlen" else expected
    assert default_attention(find_family(family), dtype, capability) == older


def test_packages_are_looked_for_only_where_they_count():
    assert HERE.lacks(ABSENT)
    assert not HERE.lacks(ABSENT, "torch")
    assert not dataclasses.replace(HERE, here=False).lacks(ABSENT)


def test_a_compiler_is_looked_for_only_where_it_counts(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert HERE.lacks_compiler
    assert not dataclasses.replace(HERE, here=False).lacks_compiler
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang++" else None)
    assert not HERE.lacks_compiler
