import pytest
import torch
from transformers import LlamaConfig

from rewardmodel.errors import InputError
from rewardmodel.planning.devices import DEVICES, GIB, count_flops, find_device


def test_gpus_are_known_by_name():
    t4 = find_device("T4")
    assert (t4.kind, t4.capability, t4.measured) == ("cuda", (7, 5), False)
    assert 14 * GIB < t4.memory <= 16 * GIB
    assert t4.rate(torch.float16) == 65e12
    assert t4.rate(torch.float32) == 8.1e12
    for device in DEVICES.values():
        assert device.half > device.single


def test_a_name_that_is_not_in_the_table_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"^--device: no 'A100'.*; there are: cpu, T4, .*A100-80GB"):
        find_device("A100")


def test_the_machine_at_hand_is_measured():
    cpu = find_device("cpu")
    assert (cpu.kind, cpu.capability, cpu.measured) == ("cpu", None, True)
    assert cpu.memory > GIB
    assert cpu.single > 1e8


def test_operations_are_known_by_hand():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=3)
    dense, attention = 2 * 1000 * 10, 2 * 3 * 4 * 16 * 100
    assert count_flops(config, 1000, 10, 100, 0.0) == dense + attention
    assert count_flops(config, 1000, 10, 100, 1.0) == 2 * dense + 3 * attention  # frozen weights: once more
    assert count_flops(config, 1000, 10, 100, 2.0) == 3 * dense + 3 * attention  # weights that train: twice more
