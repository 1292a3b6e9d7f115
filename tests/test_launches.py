from pathlib import Path

import pytest

from rewardmodel.distributed import Launch, current_launch, read_launch
from rewardmodel.errors import InputError

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"WORLD_SIZE": "4"}, Launch(4, "ddp")),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            Launch(2, "fsdp", 2, True),
        ),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, Launch(2, "fsdp", 1, False)),
    ],
)
def test_the_launcher_is_known_by_its_variables(environment, expected):
    assert current_launch(environment) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one_gpu", Launch()),
        ("ddp", Launch(2, "ddp")),
        ("cpu_ddp", Launch(2, "ddp")),
        ("two_nodes", Launch(16, "ddp")),
        ("fsdp2", Launch(2, "fsdp", 2, True)),
        ("fsdp2_qlora", Launch(2, "fsdp", 2, False)),
    ],
)
def test_the_configurations_of_the_repository_are_read(name, expected):
    assert read_launch(CONFIGS / f"{name}.yaml") == expected
    assert read_launch(CONFIGS / f"{name}.yaml", 3).processes == 3


def test_deepspeed_is_refused_by_either_way_in(tmp_path):
    message = "DeepSpeed is not supported; launch with recipes/accelerate/ddp.yaml or fsdp2.yaml"
    with pytest.raises(InputError, match=message):
        current_launch({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: DEEPSPEED\n")
    with pytest.raises(InputError, match=rf"^{config}: distributed_type: {message}"):
        read_launch(config, 2)


@pytest.mark.parametrize(
    "text",
    [
        *(None, "a: [", "just words", "num_processes: 2\n"),
        "distributed_type: MULTI_GPU\nnum_processes: two\n",
        "distributed_type: FSDP\nfsdp_config: 2\n",
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path):
    path = tmp_path / "launch.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="not a configuration of accelerate"):
        read_launch(path)
