import bitsandbytes as bnb
import pytest
import torch

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.fp8 import Fp8Linear
from rewardmodel.planning.fake_layers import Fake4bitLinear, Fake8bitLinear, FakeFp8Linear, count_quantised_bytes

NESTED = ModelConfig(load_in_4bit=True)
PLAIN = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=False)
EIGHT = ModelConfig(load_in_8bit=True)
FP8 = ModelConfig(load_in_fp8=True)


def test_constants_of_quantisation_are_counted():
    assert count_quantised_bytes(4096, NESTED, 64) == 2048 + 64 + 4
    assert count_quantised_bytes(4096, PLAIN, 64) == 2048 + 64 * 4
    assert count_quantised_bytes(4096, EIGHT, 64) == 4096 + 64 * 4
    layer = Fp8Linear(torch.nn.Linear(64, 48, bias=False))
    assert count_quantised_bytes(48 * 64, FP8, 48) == sum(weight.nbytes for weight in layer.parameters())


@pytest.mark.parametrize("config", [NESTED, PLAIN])
def test_a_4_bit_layer_is_as_large_as_bitsandbytes_own(config):
    nested = config.use_bnb_nested_quant
    weight = bnb.nn.Params4bit(
        torch.randn(512, 256), requires_grad=False, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    state = weight.quant_state
    held = weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
    assert count_quantised_bytes(512 * 256, config, 512) == held


@pytest.mark.parametrize(("kind", "config"), [(Fake4bitLinear, NESTED), (Fake8bitLinear, EIGHT), (FakeFp8Linear, FP8)])
def test_layers_pass_shapes_and_gradients_on(kind, config):
    layer = kind(torch.nn.Linear(8, 6), config, torch.float32)
    given = torch.randn(3, 8, requires_grad=True)
    output = layer(given)
    assert output.shape == (3, 6)
    output.sum().backward()
    assert given.grad.shape == (3, 8)
    assert [name for name, weight in layer.named_parameters() if weight.requires_grad] == ["bias"]
