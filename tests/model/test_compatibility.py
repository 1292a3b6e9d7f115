import dataclasses

import pytest

from rewardmodel.config.schema import ModelConfig
from rewardmodel.distributed import Launch
from rewardmodel.errors import InputError
from rewardmodel.model.compatibility import CHECKS, incompatibilities, refuse
from rewardmodel.model.configuration import Configuration

GOOD = Configuration(ModelConfig(), "llama", 16, "cuda", "bfloat16", (9, 0), trainer={})
FSDP = Launch(2, "fsdp", 2)
EFFICIENT = Launch(2, "fsdp", 2, True)
FLASH = {"attn_implementation": "flash_attention_2"}
ABSENT = "no_such_package"


def configured(model=None, **changes) -> Configuration:
    return dataclasses.replace(GOOD, model=ModelConfig(**(model or {})), **changes)


CASES = [
    (configured({"load_in_4bit": True, "load_in_8bit": True}), "exclude each other"),
    (configured({"load_in_4bit": True, "load_in_fp8": True}), "exclude each other; set one of them only"),
    (configured({"load_in_fp8": True}, stored_bits=4), "model.load_in_fp8: the backbone is stored in 4 bits; leave it"),
    (configured({"load_in_fp8": True}, capability=(8, 6)), "units from compute capability 8.9 .*; set load_in_4bit or"),
    (configured({"load_in_fp8": True, "use_dora": True}), "model.use_dora: PEFT takes the norms .*; set it false"),
    (configured({"load_in_fp8": True, "use_peft": False}), "cannot train itself; leave it true"),
    (configured({"load_in_fp8": True}, launch=FSDP), "model.load_in_fp8: FSDP spreads .*; set load_in_4bit, or launch"),
    (configured({"freeze_backbone": True, "use_peft": False}), "use_peft is false, which trains all weights; set one"),
    (
        configured({"freeze_backbone": True, "keep_head": True}),
        "model.keep_head: freeze_backbone fits a new last",
    ),
    (configured({"freeze_backbone": True}, launch=FSDP), "these do not; launch with recipes/accelerate/ddp.yaml"),
    (configured({"head_init": "fitted", "keep_head": True}), "model.head_init: keep_head starts from the head that is"),
    (configured({"head_init": "answer", "keep_head": True}), "model.head_init: keep_head starts from the head that is"),
    (configured({"head_init": "answer", "num_hidden_layers": 1}), "the language model answers from its last layer"),
    (configured({"head_init": "fitted"}, launch=FSDP), "holds the backbone whole before training; launch with"),
    (configured({"load_in_4bit": True, "use_peft": False}), "cannot train itself; leave it true"),
    (configured(capability=(7, 5)), r"bfloat16 is emulated below .*T4.*; set auto, float16 or float32"),
    (configured(dtype="float16", model_type="gemma2"), "leave float16's range .*; set auto"),
    (
        configured({"attn_implementation": "sdpa"}, model_type="gemma2"),
        "'sdpa' is not known to compute gemma2; use one",
    ),
    (configured(FLASH, dtype="float16", capability=(7, 5), here=False), "needs a GPU of compute"),
    (configured(FLASH, device="cpu", capability=None, here=False), "needs a GPU of compute"),
    (configured(FLASH, dtype="float32", here=False), "bfloat16 and float16 only"),
    (configured(FLASH), "package flash-attn, which is not installed"),
    (configured({"attn_implementation": "flex_attention"}, device="cpu", capability=None), "no backward pass on a CPU"),
    (configured({"lora_r": 0}), "model.lora_r: 0; the rank is at least 1"),
    (configured({"lora_first_layer": 16}), "model.lora_first_layer: 16, but the backbone has layers 0 to 15"),
    (configured(trainer={"gradient_checkpointing_kwargs": {"use_reentrant": True}}), "set use_reentrant false"),
    (configured({"freeze_backbone": True}, trainer={"torch_compile": True}), "takes less than compiling; leave it out"),
    (configured({"load_in_fp8": True}, trainer={"torch_compile": True}), "fails to trace layers of model.load_in_fp8"),
    (configured(launch=FSDP, trainer={"torch_compile": True}), "launch with recipes/accelerate/ddp.yaml"),
    (configured(trainer={"torch_compile": True}), r"trainer.torch_compile: needs a C\+\+ compiler, .* leave it out"),
    (configured(model_type="gemma2"), "flex_attention needs a C compiler, .* set eager"),
    (
        configured({"attn_implementation": "varlen"}, dtype="float16", capability=(7, 5)),
        "varlen needs a GPU of compute",
    ),
    (configured({"attn_implementation": "varlen"}, dtype="float32"), "varlen computes in bfloat16 and float16 only"),
    (configured({"attn_implementation": "varlen"}), "varlen needs torch 2.11 or later; leave it out, or upgrade"),
    (configured(trainer={"optim": "lomo"}), "trainer.optim: lomo and adalomo update weights in every backward pass"),
    (
        configured({"use_liger_kernel": True}, device="cpu", capability=None),
        "use_liger_kernel: needs a GPU; set it false",
    ),
    (
        configured({"use_liger_kernel": True}, model_type="gemma"),
        r"not known for gemma \(silu\), but for gemma2 \(gelu_p",
    ),
    (configured({"use_liger_kernel": True}), r"needs the package liger-kernel; run: pip install 'rewardmodel\[gpu\]'"),
    (configured({"use_liger_kernel": True}, activation="relu"), r"not known for llama \(relu\), .* llama \(silu\)"),
    (
        configured({"use_liger_kernel": True}, trainer={"torch_compile": True}, here=False),
        "torch_compile generates kernels for the",
    ),
    (configured(trainer={"deepspeed": "zero2.json"}), "give them to the launcher instead"),
    (configured(trainer={"fsdp": True}), "give them to the launcher instead"),
    (configured(launch=Launch(2, "fsdp", 1)), "set fsdp_version 2"),
    (configured(launch=FSDP, dtype="float16"), "cast every weight to float16, the float32 head too"),
    (configured({"load_in_8bit": True}, launch=FSDP), "model.load_in_8bit: FSDP"),
    (configured({"load_in_4bit": True}, launch=EFFICIENT), "set it false .*fsdp2_qlora.yaml"),
    (configured({"load_in_4bit": True, "use_dora": True}, launch=FSDP), "model.use_dora: PEFT"),
    (configured(launch=EFFICIENT, model_type="olmo2"), "tried on its weights, which only the first process has"),
    (configured(launch=FSDP, trainer={"optim": "paged_adamw_8bit"}), "set adamw_torch"),
]


@pytest.fixture(autouse=True)
def no_optional_packages(monkeypatch):
    """Let none of the packages be there that only some configurations need."""
    monkeypatch.setattr(Configuration, "lacks", lambda self, *packages: self.here)


@pytest.mark.parametrize(("wrong", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_what_cannot_work_is_said_in_one_line_with_the_fix(wrong, message, monkeypatch):
    monkeypatch.setattr(Configuration, "lacks_compiler", "compiler" in message)
    monkeypatch.setattr("rewardmodel.model.configuration.HAS_VARLEN", "torch 2.11" not in message)
    with pytest.raises(InputError, match=message) as caught:
        refuse(wrong)
    assert "\n" not in str(caught.value)
    assert len(incompatibilities(wrong)) == 1


def test_every_check_has_a_case(monkeypatch):
    monkeypatch.setattr(Configuration, "lacks_compiler", True)
    for check in CHECKS:
        assert any(check.wrong(wrong) for wrong, _ in CASES), check.message


@pytest.mark.parametrize(
    "good",
    [
        GOOD,
        configured(dtype="float16", capability=(7, 5)),
        configured(dtype="float32", capability=(7, 5), model_type="gemma2"),
        configured({"load_in_4bit": True}),
        configured({"freeze_backbone": True, "load_in_4bit": True, "lora_r": 0}),
        configured({"load_in_4bit": True}, launch=FSDP),
        configured({"load_in_4bit": True}, launch=Launch(2, "ddp")),
        configured({"load_in_8bit": True}, launch=Launch(2, "ddp")),
        configured({"load_in_fp8": True}, launch=Launch(2, "ddp")),
        configured({"load_in_fp8": True}, capability=(8, 9)),
        configured({"load_in_fp8": True}, device="cpu", capability=None, dtype="float32"),
        configured({"use_dora": True}, launch=EFFICIENT),
        configured({"use_peft": False, "lora_first_layer": 99}),
        configured(FLASH, here=False),
        configured(trainer={"torch_compile": True}),
        configured(trainer={"optim": "paged_adamw_8bit", "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ],
)
def test_what_works_is_let_through(good):
    assert incompatibilities(good) == []
    refuse(good)


def test_a_model_that_only_predicts_is_not_asked_what_training_needs():
    flex = configured({"attn_implementation": "flex_attention", "lora_r": 0}, device="cpu", capability=None)
    assert len(incompatibilities(flex)) == 2
    assert incompatibilities(dataclasses.replace(flex, trainer=None)) == []


def test_all_are_listed_and_the_first_is_raised_with_their_number():
    wrong = configured({"lora_r": 0, "lora_first_layer": 20, "load_in_8bit": True}, launch=FSDP)
    assert [line.split(":")[0] for line in incompatibilities(wrong)] == [
        "model.lora_r", "model.lora_first_layer", "model.load_in_8bit",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"^model\.lora_r.*\(and 2 more; `rewardmodel doctor` lists all\)$"):
        refuse(wrong)
