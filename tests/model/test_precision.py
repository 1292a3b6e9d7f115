import pytest
import torch
from builders import make_backbone

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.families import find_family
from rewardmodel.model.precision import autocast, compute_device, compute_dtype

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """Let torch see CUDA devices of a capability, or none: cuda((8, 0)), cuda(None)."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def see(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return see


@pytest.mark.parametrize(
    ("wish", "capability", "expected"),
    [
        ("auto", None, "cpu"),
        ("cpu", None, "cpu"),
        ("cpu", (9, 0), "cpu"),
        ("auto", (9, 0), "cuda:0"),
        ("cuda", (7, 5), "cuda:0"),
    ],
)
def test_the_device_is_the_one_that_is_wished_for_and_there(wish, capability, expected, cuda):
    cuda(capability)
    assert compute_device(ModelConfig(device=wish)) == torch.device(expected)


def test_cuda_that_is_not_there_is_refused(cuda):
    cuda(None)
    with pytest.raises(InputError, match=r"model\.device: cuda is asked for, but .* use --model\.device cpu or auto"):
        compute_device(ModelConfig(device="cuda"))


def test_each_process_of_a_launch_has_a_device_of_its_own(cuda, monkeypatch):
    cuda((8, 0))
    for rank in ("0", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert compute_device(ModelConfig()) == torch.device("cuda", int(rank))
        assert compute_device(ModelConfig(device="cpu")) == CPU


def computes(config):
    """Return device and precision of a resolved backbone."""
    backbone = resolve_backbone(config)
    return backbone.device, backbone.dtype


@pytest.mark.parametrize(
    ("family", "capability", "expected"),
    [
        ("llama", (9, 0), torch.bfloat16),
        ("llama", (7, 5), torch.float16),
        ("gemma2", (7, 5), torch.float32),
        ("olmo2", (7, 5), torch.float32),
        ("olmo2", (8, 6), torch.bfloat16),
    ],
)
def test_the_family_in_the_folder_decides_on_the_precision_with_the_hardware(
    family, capability, expected, cuda, tmp_path
):
    cuda(capability)
    folder = make_backbone(family, tmp_path)
    assert computes(ModelConfig(str(folder))) == (torch.device("cuda", 0), expected)


def test_a_precision_that_is_asked_for_is_taken(cuda, backbone):
    cuda((7, 5))
    low, full = (ModelConfig(str(backbone("gemma2")), dtype=dtype) for dtype in ("bfloat16", "float32"))
    device = compute_device(low)
    assert compute_dtype(low, device, find_family("gemma2")) == torch.bfloat16
    with pytest.raises(InputError, match=r"model\.dtype: bfloat16 is emulated below compute capability 8\.0"):
        computes(low)
    cuda((8, 0))
    assert computes(low) == (device, torch.bfloat16)
    assert computes(full) == (device, torch.float32)
    cuda(None)
    assert computes(low) == (CPU, torch.bfloat16)
    assert computes(full) == (CPU, torch.float32)
    with pytest.raises(InputError, match=r"model\.dtype: float16 does not train on a CPU"):
        computes(ModelConfig(str(backbone("llama")), dtype="float16"))


def test_a_forward_pass_computes_in_the_precision_and_in_float32_as_it_is():
    one, other = torch.eye(2), torch.eye(2, dtype=torch.float64)
    with autocast(CPU, torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (one @ one).dtype == torch.float32
        assert (other @ other).dtype == torch.float64
        assert not torch.is_autocast_enabled("cpu")
