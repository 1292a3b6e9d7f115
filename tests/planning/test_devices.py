from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from rewardmodel.errors import InputError
from rewardmodel.planning.devices import check_kernels, count_flops, find_device
from rewardmodel.planning.gpus import GIB


@pytest.mark.parametrize(
    ("built", "capability", "works"),
    [
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (6, 0), False),
        (["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], (7, 5), True),
        (["sm_50", "sm_60", "sm_70", "sm_75", "sm_90"], (6, 0), True),  # a build for CUDA 12.6
        (["sm_100", "sm_120", "sm_75", "sm_90a"], (7, 0), False),
        ([], (6, 0), False),
    ],
)
def test_a_gpu_at_hand_is_refused_if_this_build_of_torch_has_no_kernels_for_it(built, capability, works, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if works:
        check_kernels("Tesla P100-PCIE-16GB", capability)
        return
    with pytest.raises(InputError, match=r"^Tesla P100-PCIE-16GB has compute capability .*; choose a newer GPU"):
        check_kernels("Tesla P100-PCIE-16GB", capability)


def test_it_is_refused_before_anything_is_computed_on_it(monkeypatch):
    properties = SimpleNamespace(name="Tesla P100-PCIE-16GB", major=6, minor=0, total_memory=16 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    monkeypatch.setattr("rewardmodel.planning.devices.measure_matmul", lambda *_: pytest.fail("computed"))
    with pytest.raises(InputError, match=r"compute capability 6\.0"):
        find_device(None)


@pytest.mark.slow  # seconds a case
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
