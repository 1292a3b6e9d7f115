import pytest
import torch
from builders import pack
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.model.backbone import resolve_backbone
from rewardmodel.model.heads import POOLINGS, FloatHead, FloatLinear, PairTieHead, PooledHead, TieHead, classifier_class
from rewardmodel.model.loading import load_classifier
from rewardmodel.objectives import JOINT_HEAD, SEPARATE_HEAD

HIDDEN = torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80], [16, 160]])
INDICES = {
    "last": torch.tensor([1, 4]),
    "responses": torch.tensor([0, 1, 2, 4, 3]),
    "response_of": torch.tensor([0, 1, 2, 2, 3]),
}
"""Two sequences, of places 0 and 1, and 2 to 4."""


def pooled(name, hidden=HIDDEN, **changes):
    return POOLINGS[name](hidden, **{**INDICES, **changes})


def test_the_last_token_is_read_of_each_sequence():
    assert pooled("last").tolist() == [[2, 20], [16, 160]]


def test_the_means_of_both_responses_are_read_side_by_side():
    assert pooled("responses").tolist() == [[1, 10, 2, 20], [10, 100, 8, 80]]


def test_a_response_that_has_no_token_is_read_as_zeros():
    some = {"responses": torch.tensor([0, 3]), "response_of": torch.tensor([0, 3])}
    assert pooled("responses", **some).tolist() == [[1, 10, 0, 0], [0, 0, 8, 80]]
    none = {name: torch.zeros(0, dtype=torch.int64) for name in some}
    assert pooled("responses", **none).tolist() == [[0] * 4] * 2


def test_means_of_half_precision_are_summed_in_float32():
    states = torch.full((3000, 1), 1.01, dtype=torch.bfloat16)
    indices = {"last": torch.tensor([2999]), "responses": torch.arange(3000), "response_of": torch.zeros(3000).long()}
    found = POOLINGS["responses"](states, **indices)
    assert found.dtype == torch.float32
    assert found[0, 0] == pytest.approx(states[0].item(), abs=1e-5)


def test_what_is_read_learns_and_nothing_else_does():
    hidden = HIDDEN.clone().requires_grad_()
    pooled("last", hidden).sum().backward()
    assert hidden.grad[:, 0].tolist() == [0, 1, 0, 0, 1]
    hidden.grad = None
    pooled("responses", hidden).sum().backward()
    assert hidden.grad[:, 0].tolist() == [1, 1, 0.5, 1, 0.5]


def test_a_tie_head_states_a_reward_and_the_same_tie_parameter_everywhere():
    head = TieHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, -1]]))
        head.tie.fill_(0.25)
    outputs = head(torch.tensor([[1.0, 1], [0, 2], [5, 0]]))
    assert outputs.tolist() == [[2, 0.25], [-2, 0.25], [15, 0.25]]
    outputs[:, 1].sum().backward()
    assert head.tie.grad.item() == 3
    assert head.weight.grad.tolist() == [[0, 0]]


@pytest.fixture
def load(backbone):
    """Return a classifier on a tiny Llama, its head filled with ones."""

    def loaded(head, pooling):
        config = ModelConfig(str(backbone("llama")), device="cpu", dtype="float32", pooling=pooling)
        model = load_classifier(resolve_backbone(config), head).eval()
        torch.nn.init.ones_(model.score.weight)
        return model

    return loaded


ROW = {"input_ids": [5, 6, 7, 8, 9], "segment_ids": [0, 1, 1, 2, 0], "branches": [0, 5], "length": 5}


@pytest.mark.parametrize(
    ("head", "pooling", "width"),
    [
        (JOINT_HEAD, "last", 64),
        (JOINT_HEAD, "responses", 128),
        (SEPARATE_HEAD, "last", 64),
        (SEPARATE_HEAD, "responses", 64),
    ],
)
def test_the_head_is_as_wide_as_what_it_reads(head, pooling, width, load):
    model = load(head, pooling)
    assert model.score.weight.shape == (head.num_labels, width)
    assert model.score.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "pooling", "read"),
    [
        (JOINT_HEAD, "last", [[4]]),
        (JOINT_HEAD, "responses", [[1, 2], [3]]),
        (SEPARATE_HEAD, "last", [[4]]),
        (SEPARATE_HEAD, "responses", [[1, 2]]),
    ],
)
def test_logits_are_those_of_the_states_that_the_head_reads(head, pooling, read, load):
    model = load(head, pooling)
    with torch.no_grad():
        found = model(**pack([ROW])).logits
        model.config._attn_implementation = "eager"
        hidden = model.model(torch.tensor([ROW["input_ids"]])).last_hidden_state[0]
    expected = sum(hidden[places].mean(dim=0).sum() for places in read)
    assert found[0].tolist() == pytest.approx([expected.item(), 0] if head.tie else [expected.item()] * 3, abs=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_joint_head_is_a_class_of_transformers_own_name(pooling):
    found = classifier_class(LlamaConfig(), pooling, JOINT_HEAD)
    assert found.__name__ == "LlamaForSequenceClassification"
    assert found.__module__ == "transformers.models.llama.modeling_llama"
    assert (found.pooling, found.shape) == (pooling, JOINT_HEAD)


def test_a_layer_of_the_head_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, states = FloatLinear(64, 3), torch.randn(5, 64)
    expected = layer(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(states), expected)
        assert layer(states.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("config", "kind"), [(GPT2Config(), PooledHead), (BertConfig(), FloatHead)])
def test_decoders_read_a_pooling_and_encoders_what_their_class_reads(config, kind):
    assert classifier_class(config, "last", JOINT_HEAD).__mro__[1] is kind


def test_another_pooling_is_for_decoders():
    with pytest.raises(InputError, match=r"^model\.pooling: 'responses' is for decoders; .* type 'bert'"):
        classifier_class(BertConfig(), "responses", JOINT_HEAD)


@pytest.mark.parametrize("config", [ViTConfig(), T5Config()], ids=lambda config: config.model_type)
def test_a_backbone_without_a_classifier_of_one_sequence_is_refused(config):
    with pytest.raises(
        InputError, match=rf"^model\.model_name_or_path: a backbone of type '{config.model_type}' has no"
    ):
        classifier_class(config, "last", JOINT_HEAD)


def test_last_token_and_means_are_read_side_by_side():
    assert pooled("last_and_responses").tolist() == [[2, 20, 1, 10, 2, 20], [16, 160, 10, 100, 8, 80]]


def test_ties_of_pairs_are_known_by_their_distance_and_their_mean_in_either_order():
    head = PairTieHead(2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, -1]]))
        head.tie.fill_(0.5)
        head.tie_apart.copy_(torch.tensor([2.0, 10]))
        head.tie_mean.copy_(torch.tensor([-1.0, 4]))
    states = torch.tensor([[1.0, 2], [4, 1], [0, 0], [0, 0], [7, 7]])
    tie = 0.5 + 2 * 3 + 10 * 1 - (1 + 4) / 2 + 4 * (2 + 1) / 2
    rewards = [1.0, 11.0, 0.0, 0.0, 14.0]
    expected = torch.tensor([rewards, [tie, tie, 0.5, 0.5, 0.5]]).T
    assert torch.allclose(head(states), expected)
    assert torch.allclose(head(states[[1, 0]]), expected[[1, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(head(states), expected)
    assert head(states[:1]).tolist() == [[1.0, 0.5]]


def test_a_new_pair_head_states_what_a_tie_head_states(load):
    model = load(SEPARATE_HEAD._replace(pairs=True), "last_and_responses")
    assert type(model.score) is PairTieHead
    assert model.score.in_features == 2 * model.config.hidden_size
    assert not any(weight.any() for weight in (model.score.tie, model.score.tie_apart, model.score.tie_mean))
