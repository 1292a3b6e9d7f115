import dataclasses
import json

import pytest
import torch
from builders import ENCODERS, SETTINGS, stored
from transformers import AutoConfig

from rewardmodel.distributed import Launch
from rewardmodel.errors import InputError
from rewardmodel.planning import doctor as planning
from rewardmodel.planning import estimate
from rewardmodel.planning.diagnosis import format_doctor
from rewardmodel.planning.doctor import doctor
from rewardmodel.planning.estimate import MemoryNeeds
from rewardmodel.planning.gpus import DEVICES, GIB
from rewardmodel.planning.scenario import Scenario
from rewardmodel.planning.workload import Workload

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


@pytest.fixture
def changed(recipe):
    """Return a function that changes keys of the tiny recipe's model."""

    def made(**keys):
        model = {"device": "auto", "dtype": "auto", **keys}
        return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **model))

    return made


@pytest.fixture(scope="module")
def diagnoses():
    """Return the diagnoses of the recipe that tests of this module share."""
    return {}


@pytest.fixture
def diagnose(changed, diagnoses):
    """Return a function that diagnoses the recipe with changed keys of the model; the same is diagnosed once."""

    def made(name, optim=None, **keys):
        key = (name, optim, *sorted(keys.items()))
        if key not in diagnoses:
            recipe = changed(**keys)
            recipe.trainer.update({} if optim is None else {"optim": optim})
            diagnoses[key] = doctor(recipe, name)
        return diagnoses[key]

    return made


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """Let the speed of this CPU be given, not measured."""
    monkeypatch.setattr("rewardmodel.planning.devices.measure_matmul", lambda device, dtype: 1e11)


LISTED = planning.DEVICES
"""The GPUs that doctor estimates for where no test changes that."""


@pytest.fixture(autouse=True)
def few_gpus(monkeypatch):
    """Let few GPUs be estimated beside the one that is asked for: each costs as much again."""
    few = {name: DEVICES[name] for name in ("T4", "L4", "A100-80GB")}
    monkeypatch.setattr(planning, "DEVICES", few)


@pytest.fixture
def large(backbone, tmp_path):
    """Return the folder of a backbone of eight billion weights, of which there is only the configuration."""
    folder = tmp_path / "large"
    folder.mkdir()
    for path in backbone("llama").iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **LLAMA_8B}))
    return folder


def test_a_recipe_that_fits_is_printed_as_a_table(diagnose):
    found = diagnose("T4")
    assert found.problems == []
    assert found.estimate.training.fits
    assert found.estimate.inference.fits
    assert found.precision.startswith("float16: no bfloat16 below compute capability 8.0")
    said = format_doctor(found)
    assert "tokens that fit" in said
    assert "T4: 14.7 GiB" in said
    assert LISTED is DEVICES
    for name in set(planning.DEVICES) - {"T4"}:
        assert f"  {name}" in said
    assert all(len(line) < 400 for line in said.splitlines())


def test_the_time_of_fitting_the_head_is_printed_where_it_is_done(diagnose):
    fitted, zero = (format_doctor(one) for one in (diagnose("T4", head_init="fitted"), diagnose("T4")))
    assert "time       fitting the head " in fitted
    assert "time       training " in zero


@pytest.mark.slow  # seconds a case
def test_compiling_is_advised_where_it_saves_more_time_than_it_takes(changed, diagnose, monkeypatch):
    few = diagnose("T4")
    assert few.estimate.faster == []
    assert "torch_compile" not in format_doctor(few)
    monkeypatch.setattr("rewardmodel.planning.estimate.COMPILE_SECONDS", 0.0)
    recipe = changed()
    found = doctor(recipe, "T4")
    fewer = sum(estimate.OPERATIONS[True]) / sum(estimate.OPERATIONS[False])
    (faster,) = found.estimate.faster
    assert faster.hours == pytest.approx(fewer * found.estimate.hours.training)
    assert "\nfaster     trainer.torch_compile true: training " in format_doctor(found)
    recipe.trainer["torch_compile"] = True
    assert doctor(recipe, "T4").estimate.faster == []


def test_the_machine_at_hand_is_taken_where_none_is_named(diagnose):
    found = diagnose("cpu", "paged_adamw_8bit", device="cpu")
    assert found.device.kind == "cpu"
    assert "process" in found.estimate.training.parts
    assert found.problems == []


def test_what_would_make_training_fit_is_reported(changed, monkeypatch):
    def estimated(scenario):
        return MemoryNeeds({}, 20 * GIB, scenario.recipe.model.load_in_4bit, 100, 100)

    monkeypatch.setattr(planning, "estimate_training", estimated)
    found = doctor(changed(), "T4")
    steps = "trainer.gradient_checkpointing true, model.load_in_4bit true"
    (problem,) = found.problems
    assert problem.startswith("training needs at least 20.0 GiB, for one battle at a time, and T4 has 14.7; set")
    assert problem.endswith(found.estimate.fix)
    assert found.estimate.fix == f"set {steps}: 20.0 GiB"
    assert "too large" in format_doctor(found)


def test_without_a_fix_a_larger_gpu_is_advised(changed, backbone, monkeypatch):
    needs = MemoryNeeds({}, 20 * GIB, False, 100, 0)
    monkeypatch.setattr(planning, "estimate_training", lambda scenario: needs)
    config = AutoConfig.from_pretrained(backbone("llama"))
    workload = Workload(4, 1, [[0, 40]], [[0, 40]], "made for this test")
    scenario = Scenario(changed(), config, DEVICES["T4"], torch.float16, Launch(), workload)
    assert planning._find_fix(scenario) is None
    problem = planning._describe_shortage("training", needs, DEVICES["T4"], None)
    assert problem.endswith("; use a larger GPU, or a smaller backbone")


def checkpointed(recipe):
    recipe.trainer["gradient_checkpointing"] = True
    return recipe


@pytest.mark.slow
def test_an_8b_model_is_larger_than_a_t4_in_16_bits_and_smaller_in_4(changed, large):
    whole = doctor(changed(model_name_or_path=str(large)), "T4")
    (problem,) = whole.problems
    assert problem.startswith("training needs at least 1")
    assert "set trainer.gradient_checkpointing true, model.load_in_4bit true" in problem
    assert "8,030,261,248" not in whole.backbone  # without the head for words
    assert "7,504,924,672 weights in 32 layers" in whole.backbone
    assert whole.estimate.inference.parts["weights"] == pytest.approx(2 * 7_504_924_672, rel=0.001)
    found = doctor(checkpointed(changed(model_name_or_path=str(large), load_in_4bit=True)), "T4")
    assert found.problems == []
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    joined = 32 * (4096 * 4096 + 2 * 4096 * 1024)  # queries, keys and values: their constants are float32
    constants = (linear - joined) * (1 / 64 + 4 / 64 / 256) + joined * 4 / 64
    expected = linear * 0.5 + constants + 2 * (7_504_924_672 - linear)
    assert found.estimate.training.parts["weights"] == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(
    ("keys", "device", "launched", "starts"),
    [
        ({"dtype": "bfloat16"}, "T4", None, ["model.dtype: bfloat16 is emulated"]),
        ({"dtype": "float16"}, "cpu", None, ["model.dtype: float16 does not train on a CPU"]),
        ({"device": "cpu"}, "H100", None, ["model.device: cpu is requested"]),
        (
            {"load_in_4bit": True, "lora_r": 0},
            "A100-80GB",
            Launch(8, "fsdp", 1),
            ["model.lora_r: 0", "fsdp_version: FSDP 1 flattens"],
        ),
    ],
)
def test_all_that_cannot_work_is_listed(changed, keys, device, launched, starts):
    found = doctor(changed(**keys), device, launched)
    assert len(found.problems) == len(starts)
    for problem, start in zip(found.problems, starts, strict=True):
        assert problem.startswith(start)
    assert "memory" not in format_doctor(found)


def test_what_the_trainer_refuses_is_a_problem_too(changed, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    recipe = changed()
    recipe.trainer["report_to"] = "wandb"
    diagnosis = doctor(recipe, "cpu")
    assert len(diagnosis.problems) == 1
    assert diagnosis.problems[0].startswith("trainer.report_to: the package of wandb is not installed")
    assert diagnosis.estimate is None


def test_gemma_computes_in_float32_on_a_t4_and_the_reason_is_given(changed, backbone):
    found = doctor(changed(model_name_or_path=str(backbone("gemma2")), lora_r=0), "T4")  # without memory: quick
    assert "float32: no bfloat16 below compute capability 8.0, and gemma2's activations leave" in found.precision
    assert "8 times slower" in found.precision
    assert found.attention.startswith("eager: gemma2's default on this device; keeps length²")


def test_a_gpu_that_cannot_is_named_with_the_reason_among_the_others(diagnose):
    others = {other.device.name: other for other in diagnose("H100", dtype="bfloat16").estimate.others}
    assert others["T4"].problem.startswith("model.dtype: bfloat16 is emulated")
    assert others["L4"].training.fits


@pytest.mark.slow
def test_fp8_is_for_gpus_that_have_it_and_emulated_on_a_cpu(diagnose, changed):
    found = diagnose("H100", load_in_fp8=True)
    assert ", fp8 e4m3, " in found.backbone
    others = {other.device.name: other for other in found.estimate.others}
    assert others["A100-80GB"].problem.startswith("model.load_in_fp8: a GPU has fp8 units from compute capability 8.9")
    assert others["L4"].problem is None
    assert others["L4"].training.fits
    here = diagnose("cpu", device="cpu", load_in_fp8=True)
    assert here.problems == []
    assert "note       model.load_in_fp8: a CPU has no fp8 units" in format_doctor(here)


def test_what_is_only_worth_knowing_is_no_problem(diagnose):
    found = diagnose("cpu", "paged_adamw_8bit", device="cpu")
    assert found.problems == []
    assert "note       trainer.optim: on a CPU bitsandbytes does not page" in format_doctor(found)


def test_a_backbone_that_is_not_there_is_refused(changed):
    with pytest.raises(InputError, match=r"model\.model_name_or_path: hub id 'no/where'"):
        doctor(changed(model_name_or_path="no/where"), "T4")
    with pytest.raises(InputError, match="--device: no device 'T5'"):
        doctor(changed(), "T5")


QUICK = [("roberta", 4)]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *QUICK,
        *(
            pytest.param(name, bits, marks=pytest.mark.slow)
            for name in ENCODERS
            for bits in (None, 4)
            if (name, bits) not in QUICK
        ),
    ],
)
def test_encoders_are_estimated_too(name, bits, changed, backbone):
    asked = changed(model_name_or_path=str(backbone(name)), load_in_4bit=bits == 4)
    found = doctor(dataclasses.replace(asked, prompt=dataclasses.replace(asked.prompt, template="encoder")), "T4")
    assert found.problems == []
    assert found.estimate.training.fits


@pytest.mark.slow
def test_a_backbone_that_is_stored_quantised_counts_as_what_it_is(changed, diagnose, backbone, tmp_path):
    folder = stored(backbone("llama"), tmp_path, SETTINGS["as is"])
    found = doctor(changed(model_name_or_path=str(folder)), "T4")
    asked = diagnose("T4", load_in_4bit=True, use_bnb_nested_quant=False)
    assert "stored in 4 bits" in found.backbone
    plain = diagnose("T4")
    held, as_asked, unquantised = (one.estimate.training.parts["weights"] for one in (found, asked, plain))
    assert held < unquantised
    assert held == pytest.approx(as_asked, rel=0.05)
