"""A backbone's configuration and a recipe -> bytes of memory, by running the model without loading or computing it.

The model is built of fake tensors, which have a shape and no content (torch's FakeTensorMode), with quantised layers
and adapters, and the code that trains runs on it: the peak of the bytes alive is the memory that is needed. Any
architecture, attention and checkpointing is counted as it is written, without a formula for each.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.attention import LOADED_AS, PACKED_PREFIX
from rewardmodel.model.batching import pad
from rewardmodel.model.families import HEADS
from rewardmodel.model.fp8 import layers_to_quantise
from rewardmodel.model.fusion import fuse_projections
from rewardmodel.model.heads import classifier_class, head_names
from rewardmodel.model.loading import unwrap
from rewardmodel.model.lora import add_lora
from rewardmodel.model.packing import is_packed, may_pack, packing_of
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import HeadShape
from rewardmodel.planning.fake_layers import (
    Fake4bitLinear,
    Fake8bitLinear,
    FakeFp8Linear,
    FakeGpuDropout,
    join_fake_layers,
)
from rewardmodel.planning.workload import Branches


@dataclass(frozen=True)
class MemorySpec:
    """A model whose memory is to be estimated.

    Attributes:
        model: section of the recipe.
        backbone: its transformers configuration.
        head: its shape.
        dtype: precision of the forward pass.
        attention: the implementation, a key of `model.attention.KERNELS`.
        gpu: whether on a GPU, where dropout keeps one byte per element and adapters do not copy their input.
        optimiser: TRL's name of it.
        checkpointing: whether layers are recomputed in the backward pass.
    """

    model: ModelConfig
    backbone: Any
    head: HeadShape
    dtype: torch.dtype
    attention: str
    gpu: bool
    optimiser: str = "adamw_torch_fused"
    checkpointing: bool = False


@dataclass(frozen=True)
class ModelSize:
    """What stays in memory on one device.

    Attributes:
        parameters: number of weights of the backbone, quantised or not.
        embedding: number of those in the token embeddings.
        weights: bytes of frozen weights, quantisation constants and buffers.
        adapters: bytes of trained weights: adapters and head, or all weights.
        gradients: bytes of their gradients.
        optimiser: bytes of their optimiser states.
        largest_layer: bytes of the largest layer, which FSDP gathers whole.
    """

    parameters: int
    embedding: int
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    largest_layer: int


class FakeModel:
    """A classifier of fake tensors that runs forward and backward passes to measure their memory.

    Attributes:
        size: what stays in memory.
    """

    def __init__(self, spec: MemorySpec) -> None:
        self.spec = spec
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = _build_classifier(spec)
        with self.mode:
            _move_to_fake_cpu(self.model)
            if spec.model.use_peft:
                fuse_projections(self.model, join_fake_layers)
        self.packs = is_packed(self.model)
        self.size = _measure_size(self.model, spec)

    def forward_peak(self, lengths: Branches) -> int:
        """Return the peak bytes of predicting a batch, beyond the weights.

        Args:
            lengths: of each battle, like `[[10, 30, 30], [12, 80, 80]]`.
        """
        self.model.eval()

        def predict(batch: dict[str, Any]) -> None:
            with torch.no_grad(), self._autocast():
                self.model(**batch).logits.float()

        return self._measure_peak(predict, lengths)

    def training_peak(self, lengths: Branches) -> int:
        """Return the peak bytes of a micro-batch's forward and backward pass, beyond weights, gradients and optimiser.

        Args:
            lengths: as of `forward_peak`.
        """
        self.model.train()
        if self.spec.checkpointing:
            enable_checkpointing(self.model)
        with self.mode:  # the gradients that earlier micro-batches left
            for weight in self.model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None

        def train(batch: dict[str, Any]) -> None:
            with self._autocast():
                logits = self.model(**batch).logits
            logits.float().sum().backward()

        return self._measure_peak(train, lengths)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Compute in the precision that the trainer computes in; PEFT copies inputs unless CUDA's autocast is on."""
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.spec.gpu and self.spec.dtype != torch.float32)
        try:
            with autocast(torch.device("cpu"), _cpu_dtype(self.spec.dtype)):
                yield
        finally:
            torch.set_autocast_enabled("cuda", before)

    def _measure_peak(self, work: Callable[[dict[str, Any]], None], lengths: Branches) -> int:
        rows = [_make_row(branches) for branches in lengths]
        batch = packing_of(self.model)(rows) if self.packs else pad(rows, 0)
        batch = tree_map_only(torch.Tensor, self.mode.from_tensor, batch)
        memory = PeakMemory([*self.model.parameters(), *self.model.buffers(), *tree_leaves(batch)])
        with self.mode, memory:
            work(batch)
        return memory.peak


def enable_checkpointing(model: Any) -> None:
    """Let a model recompute each layer in the backward pass, as the trainer does."""
    name = "activation_checkpointing_enable"  # in later releases of transformers 5
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active.

    Args:
        known: tensors that exist before and stay; they and their gradients are not counted.

    Attributes:
        now: bytes that are allocated.
        peak: the most bytes that were allocated at once.
    """

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [one for one in known if isinstance(one, torch.Tensor)]
        tensors += [one.grad for one in tensors if one.grad is not None]
        self._seen = {one.untyped_storage()._cdata for one in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that it made."""
        made = func(*args, **(kwargs or {}))
        for one in (made,) if isinstance(made, torch.Tensor) else tree_leaves(made):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in self._seen:
                    self._count(storage)
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._seen.add(key)
        self.now += size

        def forget() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


def count_optimiser_bytes(name: str, sizes: list[int]) -> int:
    """Return the bytes of an optimiser's states for float32 weights.

    Two float32 states per weight, as of AdamW, unless the name says otherwise: lion and adagrad have one, adafactor
    keeps rows and columns only, sgd nothing. bitsandbytes' 8-bit optimisers keep a byte per state and a float32
    constant per 256 states, but float32 states for tensors of fewer than 4,096 weights.

    Args:
        name: TRL's name of the optimiser.
        sizes: number of weights of each tensor.
    """
    states = 0 if name.startswith(("sgd", "adafactor")) else 1 if "lion" in name or "adagrad" in name else 2
    if "8bit" not in name:
        return 4 * states * sum(sizes)
    return sum(states * (4 * size if size < 4096 else size + 4 * -(-size // 256)) for size in sizes)


def _build_classifier(spec: MemorySpec) -> Any:
    """Return the classifier with its adapters as it is trained, on the current default device."""
    config, model = copy.deepcopy(spec.backbone), spec.model
    config.num_labels = spec.head.num_labels
    # flex_attention and flash attention keep for the backward pass what varlen keeps, which runs on fake tensors
    kind = spec.attention if spec.attention in ("eager", "sdpa") else "varlen"
    dtype = _cpu_dtype(spec.dtype) if model.use_peft else torch.float32
    made: Any = classifier_class(config, model.pooling, spec.head)._from_config(
        config, dtype=dtype, attn_implementation="eager"
    )
    plain = LOADED_AS.get(kind, kind)
    made.config.get_text_config()._attn_implementation = PACKED_PREFIX + kind if may_pack(made) else plain
    heads = head_names(made)
    if model.load_in_4bit or model.load_in_8bit or model.load_in_fp8:
        _replace_linear_layers(made, model, dtype)
    for name in heads:
        made.get_submodule(name).float()
    if model.use_peft:
        made = add_lora(made, model)
    if spec.gpu:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Dropout):
                    setattr(module, name, FakeGpuDropout(child.p))
    return made


def _move_to_fake_cpu(model: torch.nn.Module) -> None:
    """Replace a model's meta tensors by fake tensors on the CPU; weights that are shared stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and id(weight) not in made:
                content = torch.empty_like(weight, device="cpu")
                made[id(weight)] = torch.nn.Parameter(content, requires_grad=weight.requires_grad)
            if weight is not None:
                module._parameters[name] = made[id(weight)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _replace_linear_layers(made: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Replace linear layers outside the head by fake quantised ones, as transformers or `model.fp8` does."""
    if model.load_in_fp8:
        for name in layers_to_quantise(made):
            made.set_submodule(name, FakeFp8Linear(made.get_submodule(name), model, dtype))
        return
    kind = Fake4bitLinear if model.load_in_4bit else Fake8bitLinear
    for name, child in list(made.named_modules()):
        if type(child) is torch.nn.Linear and not {*name.split(".")} & {*HEADS}:
            made.set_submodule(name, kind(child, model, dtype))
    made.is_loaded_in_4bit, made.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit


def _measure_size(model: Any, spec: MemorySpec) -> ModelSize:
    # bytes of trained weights, and of everything else; a shared weight counts once
    training = {id(weight): weight for weight in model.parameters() if weight.requires_grad}
    trained_bytes = sum(weight.nbytes for weight in training.values())
    held = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    held_bytes = sum(one.nbytes for one in held.values())
    optimiser = count_optimiser_bytes(spec.optimiser, [weight.numel() for weight in training.values()])

    # number of the backbone's weights; a quantised tensor has as many bytes as elements, not as weights
    whole = unwrap(model)
    backbone = getattr(whole, whole.base_model_prefix).named_parameters()
    count = sum(weight.numel() for name, weight in backbone if "lora_" not in name)
    for module in model.modules():
        if isinstance(module, Fake4bitLinear | Fake8bitLinear | FakeFp8Linear):
            count += module.in_features * module.out_features - module.weight.numel()
    embedding = model.get_input_embeddings().weight.numel()

    # the largest layer
    layers: Any = next((one for one in model.modules() if isinstance(one, torch.nn.ModuleList)), [])
    largest = max((sum(weight.nbytes for weight in layer.parameters()) for layer in layers), default=0)
    return ModelSize(count, embedding, held_bytes - trained_bytes, trained_bytes, trained_bytes, optimiser, largest)


def _cpu_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a precision of the same size that operations on the CPU support."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _make_row(branches: list[int]) -> dict[str, Any]:
    """Return a row of tokens (`TOKEN_ROW_FEATURES`) of these lengths; ids are 0, the second half are responses."""
    length = sum(branches)
    half = length // 2
    segments = [0] * half + [1 + number % 2 for number in range(length - half)]
    return {"input_ids": [0] * length, "segment_ids": segments, "branches": branches, "length": length}
