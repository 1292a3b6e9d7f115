import pytest
import torch

from rewardmodel.errors import InputError
from rewardmodel.planning.gpus import DEVICES, GIB, check_device


def test_gpus_are_known_by_name():
    t4 = DEVICES["T4"]
    assert (t4.kind, t4.capability, t4.measured) == ("cuda", (7, 5), False)
    assert 14 * GIB < t4.memory <= 16 * GIB
    assert t4.rate(torch.float16) == 65e12
    assert t4.rate(torch.float32) == 8.1e12
    for device in DEVICES.values():
        assert device.half > device.single


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("T5", r"^--device: no device 'T5' \(did you mean 'T4'\?\); known: cpu, T4, .*A100-80GB"),
        ("gpu", r"^--device: no device 'gpu' \(did you mean 'cpu'\?\); known: "),
        ("quantum", r"^--device: no device 'quantum'; known: cpu, "),
    ],
)
def test_a_name_that_is_not_in_the_table_is_refused_with_those_that_are(name, message):
    with pytest.raises(InputError, match=message):
        check_device(name)


@pytest.mark.parametrize("name", [None, "cpu", *DEVICES])
def test_the_others_pass(name):
    check_device(name)


def test_a_geforce_has_the_rate_of_sums_in_float32():
    for name in ("RTX-3090", "RTX-4090", "RTX-5070-Ti", "RTX-5080", "RTX-5090"):
        assert DEVICES[name].half == pytest.approx(2 * DEVICES[name].single, rel=0.01)


def test_the_table_goes_by_memory():
    sizes = [device.memory for device in DEVICES.values()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("name", "capability"), [("P100", "6.0"), ("V100", "7.0")])
def test_a_gpu_that_torch_has_no_kernels_for_is_refused_by_name(name, capability):
    with pytest.raises(InputError, match=rf"^--device: {name} has compute capability {capability}.*T4 x2$"):
        check_device(name)
