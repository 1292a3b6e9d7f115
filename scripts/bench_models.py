"""Backbones to measure: a shape's name in, a classifier of it out, ours or stock; and what the device can do at most.

Shapes of 4 to 9 billion weights are random: made on the device layer by layer and quantised at once, so that neither
a download nor host memory is needed. A random backbone computes as fast as a trained one.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""The adapters of every competitor, in PEFT's words."""


@dataclass(frozen=True)
class Shape:
    """A backbone and how much of it is measured.

    Attributes:
        config: of the random backbone, in transformers' words; None: real weights of the shape's name.
        max_length: most tokens of a sequence.
        four_bits: NF4 with double quantisation, or 16 bits.
        checkpointing: recompute activations of each layer in the backward pass.
        training_battles: of one measurement, after `WARM` to warm up; 8 per optimiser step.
        inference_battles: the same, each predicted in both orders.
        stock_attention: of the stock competitors; None: transformers' default.
        first_layer: layers before it have no adapters, of no competitor, and no backward pass.
    """

    config: dict[str, Any] | None
    max_length: int = 2048
    four_bits: bool = True
    checkpointing: bool = True
    training_battles: int = 48
    inference_battles: int = 64
    stock_attention: str | None = None
    first_layer: int = 0


SHAPES = {
    "llama-3-8b": Shape(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        }
    ),
    # Some releases of transformers give Gemma 2 to torch's fused attention, which leaves the cap on its logits out.
    "gemma-2-9b": Shape(
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        stock_attention="eager",
    ),
    "qwen3-4b": Shape(
        {
            "model_type": "qwen3",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
        }
    ),
    "smollm2-135m-instruct": Shape(
        None,
        four_bits=False,
        checkpointing=False,
        training_battles=32,
        inference_battles=32,
        first_layer=15,  # with adapters everywhere, stock batches of 8 take more than 24 GiB
    ),
    "tiny": Shape(
        {
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        max_length=1024,
        four_bits=False,
        checkpointing=False,
    ),
    # what Llama does not have: a cap on attention's logits, layers with a window shorter than the sequences, wide heads
    "tiny-gemma2": Shape(
        {
            "model_type": "gemma2",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 64,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        max_length=1024,
        four_bits=False,
        stock_attention="eager",
    ),
}
"""What can be measured; the first three are for a GPU, the last two for a test of the scripts without one."""


def backbone_folder(name: str, folder: Path) -> Path:
    """Return the folder of a shape's backbone: tokenizer, configuration and, unless they are drawn, weights."""
    from transformers import AutoConfig

    from rewardmodel.model.weights import fetch_backbone

    config = SHAPES[name].config
    if config is None:
        return fetch_backbone(name)
    folder = folder / name
    tokenizer = text_tokenizer() or unlettered_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    AutoConfig.for_model(**config, **tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_tokenizer() -> Any:
    """Return SmolLM2's tokenizer, whose ids every shape has, or None where its package is not installed."""
    from rewardmodel.errors import InputError
    from rewardmodel.model.loading import load_tokenizer
    from rewardmodel.model.weights import fetch_backbone

    try:
        return load_tokenizer(fetch_backbone("smollm2-135m-instruct"))
    except InputError:
        return None


def unlettered_tokenizer() -> Any:
    """Return a tokenizer that only knows padding and end, for battles that are made of ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        unk_token="<unk>",
    )


@contextmanager
def random_weights(seed: int, device: torch.device) -> Iterator[None]:
    """Let transformers' `from_pretrained` draw weights where it would read them: on a device, unless told otherwise.

    What it would leave in the host's memory, to be quantised later, is drawn on the device too: that is much faster.
    """
    from transformers import PreTrainedModel

    upstream = PreTrainedModel.__dict__["from_pretrained"]
    PreTrainedModel.from_pretrained = classmethod(partial(_draw_model, seed, device))
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = upstream


def _draw_model(
    seed: int,
    device: torch.device,
    cls: Any,
    folder: Path,
    *_: Any,
    config: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str | None = None,
    device_map: dict[str, Any] | None = None,
    quantization_config: Any = None,
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,  # no weights are read
    **labels: Any,
) -> Any:
    """Return a model of a folder's configuration, each module drawn on its device and quantised before the next.

    The arguments are those of transformers' `from_pretrained`. With `output_loading_info` it also returns what
    transformers reports of loading: here that nothing is missing.
    """
    from transformers import AutoConfig

    if config is None:
        config = AutoConfig.from_pretrained(folder, **labels)
    device = torch.device((device_map or {"": device})[""])
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype, **attention)
    if quantization_config is not None:
        from transformers.integrations import replace_with_bnb_linear

        replace_with_bnb_linear(model, quantization_config.llm_int8_skip_modules, quantization_config)
        model.is_loaded_in_4bit = True
    torch.manual_seed(seed)
    for module in model.modules():
        if "Linear4bit" in type(module).__name__:
            _quantise(module, dtype, device)
        elif module._parameters or module._buffers:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model.eval(), nothing) if output_loading_info else model.eval()


@torch.no_grad()
def _quantise(linear: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Draw the weight of a bitsandbytes layer, which quantises it on its way to the device."""
    from bitsandbytes.nn import Params4bit

    old = linear.weight
    drawn = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device).normal_(std=0.02)
    settings = {name: getattr(old, name) for name in ("compress_statistics", "quant_type", "quant_storage")}
    linear.weight = Params4bit(drawn, requires_grad=False, module=linear, **settings).to(device)


def our_config(plan: Any) -> Any:
    """Return the plan's backbone, quantisation and adapters as rewardmodel takes them."""
    from rewardmodel.config.schema import ModelConfig

    keys = {
        "model_name_or_path": str(plan.folder),
        "device": plan.device.type,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "attn_implementation": plan.attention,
        "load_in_4bit": plan.four_bits,
        "lora_r": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_dropout": LORA["lora_dropout"],
        "lora_target_modules": LORA["target_modules"],
        "lora_first_layer": plan.first_layer,
        **({"load_in_fp8": True} if plan.fp8 else {}),
    }
    return ModelConfig(**keys | plan.keys_of("model"))


def our_model(plan: Any, objective: str = "cross_entropy") -> tuple[Any, Any]:
    """Return rewardmodel's classifier for an objective, with adapters, and its tokenizer."""
    from rewardmodel.config.schema import ObjectiveConfig
    from rewardmodel.model.backbone import resolve_backbone
    from rewardmodel.model.loading import build_model
    from rewardmodel.objectives import find_objective

    head = find_objective(ObjectiveConfig(objective)).head
    return build_model(resolve_backbone(our_config(plan)), head, plan.seed)


def stock_model(plan: Any, num_labels: int) -> tuple[Any, Any]:
    """Return transformers' own classifier under PEFT, as our_config's but for the code that computes; its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=plan.dtype,
        llm_int8_skip_modules=["score"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        plan.folder,
        num_labels=num_labels,
        dtype=plan.dtype,
        device_map={"": plan.device},
        **({"quantization_config": bits} if plan.four_bits else {}),
        **({"attn_implementation": plan.stock_attention} if plan.stock_attention else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(plan.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.score.float()
    layers = list(range(plan.first_layer, model.config.num_hidden_layers)) if plan.first_layer else None
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], layers_to_transform=layers, **LORA)
    return get_peft_model(model, lora), tokenizer


@contextmanager
def apart(model: Any) -> Iterator[None]:
    """Let each linear layer of our model compute alone in the block, as PEFT and transformers have it."""
    linear = [module for module in model.modules() if hasattr(module, "in_features") and "forward" in vars(module)]
    together = [(module, vars(module).pop("forward")) for module in linear]  # not norms and MLPs, which liger replaced
    try:
        yield
    finally:
        for module, forward in together:
            module.forward = forward


@torch.no_grad()
def draw_head(model: Any, seed: int) -> None:
    """Give the head that trains the same drawn weights in every competitor."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and ".score." in name and weight.ndim == 2:
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(drawn / weight.shape[1] ** 0.5)


@cache
def non_embedding_weights(folder: Path, layers: int | None = None) -> int:
    """Return how many weights of a backbone, or of its lowest layers, are neither embedding nor head."""
    from transformers import AutoConfig, AutoModel

    from rewardmodel.model.families import lowest_layers

    with torch.device("meta"):
        model = AutoModel.from_config(lowest_layers(AutoConfig.from_pretrained(folder), layers))
    return sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name)


def model_flops(folder: Path, lengths: list[int], first_layer: int | None, layers: int | None = None) -> float:
    """Return the operations that sequences of these lengths need, however they are computed.

    A weight costs 2 a token forward and, frozen under LoRA, 2 more backward. Causal attention costs
    2 layers · heads · head size · length² a sequence forward, and twice that more backward. Layers before
    `first_layer` have no backward pass; None: no layer has. Adapters, head, recomputation and padding count nothing;
    no window of the shapes for a GPU is shorter than their sequences. `layers`: the backbone has only its lowest ones.
    """
    from transformers import AutoConfig

    from rewardmodel.model.families import lowest_layers

    config = lowest_layers(AutoConfig.from_pretrained(folder), layers)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2.0 * config.num_hidden_layers * config.num_attention_heads * head * sum(n * n for n in lengths)
    dense = 2.0 * non_embedding_weights(folder, layers) * sum(lengths)
    back = 0 if first_layer is None else 1 - first_layer / config.num_hidden_layers
    return dense * (1 + back) + attention * (1 + 2 * back)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product, the best of up to ten."""
    size = matrix_size(device)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / best_seconds(device, lambda: one @ other)


def float8_matrix_rate(device: torch.device) -> float:
    """Return the same of float8 (e4m3), with a scale for each row of both factors, to bfloat16.

    Raises:
        RuntimeError: the device or this release of torch cannot.
    """
    size = matrix_size(device) if device.type == "cuda" else 256  # some CPUs emulate it
    one, other = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scales = torch.ones(size, 1, device=device), torch.ones(1, size, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(one, other.t(), *scales, out_dtype=torch.bfloat16)

    return 2.0 * size**3 / best_seconds(device, product)


def matrix_size(device: torch.device) -> int:
    """Return how many rows and columns the factors of a large matrix product have."""
    return 8192 if device.type == "cuda" else 2048


def best_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the least time that work takes, of up to ten times in two seconds, after one to warm up."""
    seconds: list[float] = []
    timed(device, work)
    while len(seconds) < 10 and sum(seconds) < 2:
        seconds.append(timed(device, work))
    return min(seconds)


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Return the seconds that work takes on a device: on a GPU, between events before it and after."""
    start = mark(device)
    work()
    end = mark(device)
    synchronise(device)
    return seconds_between(start, end)


def mark(device: torch.device) -> Any:
    """Return a point in time of a device, without waiting for it: an event of a GPU, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two points in time of a device that has reached both."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor() -> str:
    """Return the name of the processor and how many threads compute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def profiled(plan: Any, work: Callable[[], Any]) -> None:
    """Run work under torch's profiler and print what took longest."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if plan.device.type == "cuda" else [])]
    with profile(activities=kinds) as seen:
        work()
        synchronise(plan.device)
    by = f"self_{plan.device.type}_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80), file=sys.stderr)


class Counter:
    """Counts the tokens that go through a model's embedding, padding included."""

    def __init__(self, model: Any) -> None:
        self.tokens = self.batches = 0
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self.count)

    def count(self, _: Any, given: tuple) -> None:
        """Count one batch."""
        self.tokens += given[0].numel()
        self.batches += 1
