"""A backbone's configuration and a recipe in, bytes by component out: nothing is loaded, and nothing is computed.

The model is made of tensors that have a shape and no content (torch's FakeTensorMode), quantised layers and adapters
included, and the code that trains runs over it: what is alive at its worst moment is what memory is needed for. So
any architecture, attention and checkpointing counts as it is written, without a formula for each.
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
from torch.utils._pytree import tree_leaves

from rewardmodel.config.schema import ModelConfig
from rewardmodel.model.attention import packed_name
from rewardmodel.model.batching import pack, pad
from rewardmodel.model.families import HEADS
from rewardmodel.model.heads import classifier_class, head_names
from rewardmodel.model.loading import unwrap
from rewardmodel.model.lora import add_lora
from rewardmodel.model.packing import is_packed, may_pack
from rewardmodel.model.precision import autocast
from rewardmodel.objectives import HeadShape
from rewardmodel.planning.fake_layers import NESTED, ByteDropout, EightBits, FourBits

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """What is to be held in memory.

    Attributes:
        model: of the recipe.
        backbone: its transformers configuration.
        head: its shape.
        dtype: that the backbone computes in.
        attention: the implementation.
        gpu: whether on a GPU, whose dropout keeps a byte a number and whose adapters copy no input.
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
class Usage:
    """Bytes of what stays, on one device.

    Attributes:
        parameters: how many weights the backbone has, quantised or not.
        embedding: how many of them are a table of tokens.
        weights: bytes of them, of constants of quantisation, and of buffers.
        adapters: bytes of what trains: adapters and head, or all weights.
        gradients: of what trains.
        optimiser: states of what trains.
        largest_layer: bytes of the largest layer, which FSDP gathers whole.
    """

    parameters: int
    embedding: int
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    largest_layer: int


class Planned:
    """A model without content, to be asked what it needs.

    Attributes:
        usage: what stays in memory.
        layers: of the backbone.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = _model(plan)
        with self.mode:
            _on_cpu(self.model)
        self.packs = is_packed(self.model)
        self.usage = _usage(self.model, plan)

    def forward_peak(self, lengths: list[list[int]]) -> int:
        """Return the bytes that predicting a batch takes at most, beyond the weights.

        Args:
            lengths: `branches` of `prompt.tokenization.TOKEN_ROW_FEATURES`, of each battle.
        """
        self.model.eval()

        def work(batch: dict[str, Any]) -> None:
            with torch.no_grad(), self._computing():
                self.model(**batch).logits.float()

        return self._peak(work, lengths)

    def training_peak(self, lengths: list[list[int]]) -> int:
        """Return the same of a micro-batch's forward and backward pass, beyond weights, gradients and optimiser."""
        self.model.train()
        if self.plan.checkpointing:
            checkpoint(self.model)
        with self.mode:  # gradients of the micro-batch before
            for weight in self.model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None

        def work(batch: dict[str, Any]) -> None:
            with self._computing():
                logits = self.model(**batch).logits
            logits.float().sum().backward()

        return self._peak(work, lengths)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute as the trainer does; adapters ask CUDA's autocast whether to copy their input."""
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", self.plan.gpu and self.plan.dtype != torch.float32)
        try:
            with autocast(CPU, _stored(self.plan.dtype)):
                yield
        finally:
            torch.set_autocast_enabled("cuda", before)

    def _peak(self, work: Callable[[dict[str, Any]], None], lengths: list[list[int]]) -> int:
        rows = [_row(branches) for branches in lengths]
        batch = pack(rows) if self.packs else pad(rows, 0)
        batch = {
            name: self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        live = Live([*self.model.parameters(), *self.model.buffers(), *tree_leaves(batch)])
        with self.mode, live:
            work(batch)
        return live.peak


def checkpoint(model: Any) -> None:
    """Let a model recompute each layer in the backward pass, as the trainer does."""
    name = "activation_checkpointing_enable"  # in later releases of transformers 5
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


class Live(TorchDispatchMode):
    """Watches the tensors that are made: `peak` is the most bytes of them that were alive at once.

    Args:
        known: what is there before, and stays: not counted.
    """

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.now = self.peak = 0
        tensors = [one for one in known if isinstance(one, torch.Tensor)]
        tensors += [one.grad for one in tensors if one.grad is not None]
        self._seen = {one.untyped_storage()._cdata for one in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
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

        def gone() -> None:
            self._seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def optimiser_bytes(name: str, sizes: list[int]) -> int:
    """Return the bytes of an optimiser's states for float32 weights of these sizes.

    Two float32 states a weight as of AdamW, unless the name says otherwise: lion and adagrad have one, adafactor rows
    and columns only, sgd none. bitsandbytes keeps 8 bits of states with a float32 constant for `NESTED` of them, but
    float32 for tensors of less than 4,096 weights.
    """
    states = 0 if name.startswith(("sgd", "adafactor")) else 1 if "lion" in name or "adagrad" in name else 2
    if "8bit" not in name:
        return 4 * states * sum(sizes)
    return sum(states * (4 * size if size < 4096 else size + 4 * -(-size // NESTED)) for size in sizes)


def _model(plan: Plan) -> Any:
    """Return the classifier, with its adapters, as it is trained."""
    config, model = copy.deepcopy(plan.backbone), plan.model
    config.num_labels = plan.head.num_labels
    kind = "eager" if plan.attention == "eager" else "sdpa"  # all fused kernels keep the same
    dtype = _stored(plan.dtype) if model.use_peft else torch.float32
    made: Any = classifier_class(config, model.pooling, plan.head)._from_config(
        config, dtype=dtype, attn_implementation="eager"
    )
    made.config.get_text_config()._attn_implementation = packed_name(kind) if may_pack(made) else kind
    heads = head_names(made)
    if model.load_in_4bit or model.load_in_8bit:
        _quantise(made, model, dtype)
    for name in heads:
        made.get_submodule(name).float()
    if model.use_peft:
        made = add_lora(made, model)
    if plan.gpu:
        for module in list(made.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.Dropout):
                    setattr(module, name, ByteDropout(child.p))
    return made


def _on_cpu(model: torch.nn.Module) -> None:
    """Put tensors without content that count as the CPU's in the place of those of the meta device."""
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


def _quantise(made: Any, model: ModelConfig, dtype: torch.dtype) -> None:
    """Put layers of quantised size in the place of linear ones, as transformers does."""
    kind = FourBits if model.load_in_4bit else EightBits
    for name, child in list(made.named_modules()):
        if type(child) is torch.nn.Linear and not {*name.split(".")} & {*HEADS}:
            made.set_submodule(name, kind(child, model, dtype))
    made.is_loaded_in_4bit, made.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit


def _usage(model: Any, plan: Plan) -> Usage:
    training = {id(weight): weight for weight in model.parameters() if weight.requires_grad}
    sizes = [weight.numel() for weight in training.values()]
    trained = sum(weight.nbytes for weight in training.values())
    every = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    held = sum(one.nbytes for one in every.values())
    linear = [module for module in model.modules() if isinstance(module, FourBits | EightBits)]
    whole = unwrap(model)
    backbone = getattr(whole, whole.base_model_prefix).named_parameters()
    count = sum(weight.numel() for name, weight in backbone if "lora_" not in name) + sum(
        module.in_features * module.out_features - module.weight.numel() for module in linear
    )
    layers: Any = next((one for one in model.modules() if isinstance(one, torch.nn.ModuleList)), [])
    largest = max((sum(weight.nbytes for weight in layer.parameters()) for layer in layers), default=0)
    optimiser = optimiser_bytes(plan.optimiser, sizes)
    embedding = model.get_input_embeddings().weight.numel()
    return Usage(count, embedding, held - trained, trained, trained, optimiser, largest)


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Return a precision of the same size that the CPU's operations know."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _row(branches: list[int]) -> dict[str, Any]:
    """Return a row of `prompt.tokenization.TOKEN_ROW_FEATURES` without content: its second half are responses."""
    length = sum(branches)
    half = length // 2
    segments = [0] * half + [1 + number % 2 for number in range(length - half)]
    return {"input_ids": [0] * length, "segment_ids": segments, "branches": branches, "length": length}
