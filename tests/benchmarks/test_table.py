from rewardmodel.benchmarks.questions import TIES
from rewardmodel.benchmarks.table import BENCHMARKS, REWARDBENCH2_SUBSETS, REWARDBENCH_CATEGORIES


def test_weights_are_those_that_rewardbench_publishes():
    prompts = {category: sum(weights.values()) for category, weights in REWARDBENCH_CATEGORIES.items()}
    assert prompts == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert sum(len(weights) for weights in REWARDBENCH_CATEGORIES.values()) == 23
    assert TIES in REWARDBENCH2_SUBSETS


def test_every_benchmark_but_preferences_has_data_on_the_hub():
    assert [name for name, one in BENCHMARKS.items() if one.hub is None] == ["preferences"]
    assert all(one.splits for one in BENCHMARKS.values() if one.hub)
