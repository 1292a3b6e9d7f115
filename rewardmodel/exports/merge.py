"""A trained run in, one model without an adapter out: merged in float32, written a tensor at a time.

An adapter belongs to the weights that it was trained on. If those were quantised, they are quantised again as loading
did it and dequantised, what the adapter adds is added in float32, and only the sum is cast. The whole model is never
in memory: only the tensor at work and the output shard are.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from rewardmodel.config.schema import Recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.weight_files import SHARD, parameter_names, weight_files, write_shards
from rewardmodel.files import write_json
from rewardmodel.model.backbone import saved_backbone_folder
from rewardmodel.model.families import find_family, lowest_layers
from rewardmodel.model.heads import classifier_class, head_names
from rewardmodel.model.loading import label_names, load_tokenizer
from rewardmodel.model.precision import bits_and_bytes, compute_device, dtype_name
from rewardmodel.model.saved_model import ADAPTER_FILE, is_adapter, read_about
from rewardmodel.objectives import HeadShape
from rewardmodel.run_folder import BACKBONE_FILE, RunFolder, load_run_recipe, model_folder

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's weights."""

TIE = ".tie"
"""The tie parameter of a reward head, which a plain classifier has no place for: it goes into `BACKBONE_FILE`."""

Tensors = Iterator[tuple[str, torch.Tensor]]


class Trained(NamedTuple):
    """A run that is trained: its folder, its recipe, and the precision that its backbone's weights were loaded in."""

    folder: Path
    recipe: Recipe
    dtype: torch.dtype

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return model_folder(self.folder)


def trained(folder: Path) -> Trained:
    """Return a run that is trained.

    Raises:
        InputError: no run, no model in it, or an environment.json that does not tell its precision.
    """
    recipe = load_run_recipe(folder)
    read_about(RunFolder(folder).model)
    try:
        compute = json.loads(RunFolder(folder).environment.read_text(encoding="utf-8"))["compute"]
        dtype = getattr(torch, compute["dtype"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{RunFolder(folder).environment}: no compute.dtype there; give a folder that train made"
        ) from error
    return Trained(folder, recipe, dtype if recipe.model.use_peft else torch.float32)


def merge(
    run: Trained, folder: Path, dtype: torch.dtype, requantise: BitsAndBytesConfig | None = None, shard: int = SHARD
) -> None:
    """Write a run's model with its adapter merged: configuration, weights as safetensors, tokenizer, `BACKBONE_FILE`.

    Args:
        run: with an adapter, or fully fine-tuned, which has nothing to merge.
        folder: where to; plain transformers loads the model from there.
        dtype: of the weights written; the head stays float32, unless `requantise`.
        requantise: bitsandbytes settings to quantise what was merged once more; none: not at all.
        shard: bytes of an output file.

    Raises:
        InputError: a backbone that is not there, is another, or cannot be merged a tensor at a time.
        FloatingPointError: a weight that is no finite number.
    """
    about = read_about(run.model)
    backbone = saved_backbone_folder(run.recipe.model, run.model)
    settings = AutoConfig.from_pretrained(backbone, **label_names(HeadShape(**about["head"])))
    settings = lowest_layers(settings, run.recipe.model.num_hidden_layers)
    if getattr(settings, "quantization_config", None):
        raise InputError(f"{backbone}: its weights are quantised in their files, which merging does not read")
    streams = Merging(run, backbone, settings, HeadShape(**about["head"]), dtype, requantise)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(streams.tensors(), folder, shard)
    tokenizer = load_tokenizer(run.model)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    settings.architectures = [type(streams.model).__name__]
    settings.dtype = dtype
    settings.get_text_config().pad_token_id = settings.pad_token_id = tokenizer.pad_token_id
    if requantise:
        settings.quantization_config = requantise
    settings.save_pretrained(folder)
    bits = (4 if requantise.load_in_4bit else 8) if requantise else None
    about["merged"] = {"dtype": dtype_name(dtype), "bits": bits}
    write_json(folder / BACKBONE_FILE, about | ({} if streams.tie is None else {"tie": streams.tie}))


class Merging:
    """The weights of a merged model, one after another.

    Args:
        run: as `merge` has it, and so on.
        backbone: the folder whose weights are read.
        settings: the model's configuration.
        head: the shape of its head.
        dtype: of the weights to yield.
        requantise: bitsandbytes settings for them.

    Attributes:
        model: the classifier without any weights in memory.
        tie: the tie parameter, once `tensors` is through, if there is one.
    """

    def __init__(
        self,
        run: Trained,
        backbone: Path,
        settings: Any,
        head: HeadShape,
        dtype: torch.dtype,
        requantise: BitsAndBytesConfig | None,
    ) -> None:
        config = run.recipe.model
        self.run, self.dtype, self.device = run, dtype, compute_device(config)
        self.loaded = torch.float32 if find_family(settings.model_type).float32_weights else run.dtype
        self.tie: float | None = None
        quantised = config.load_in_4bit or config.load_in_8bit

        def bare(settings_of_quantiser: BitsAndBytesConfig | None) -> tuple[Any, Any]:
            with torch.device("meta"):
                model = classifier_class(settings, config.pooling, head)(settings)
            if settings_of_quantiser is None:
                return model, None
            quantizer = AutoHfQuantizer.from_config(settings_of_quantiser, pre_quantized=False)
            quantizer.preprocess_model(model=model, device_map=None)
            return model, quantizer

        self.model, self.quantizer = bare(bits_and_bytes(config, run.dtype) if quantised else None)
        self.target, self.requantizer = bare(requantise)
        self.heads = tuple(f"{name}." for name in head_names(self.model))
        self.files = weight_files(backbone)
        self.adapter = Adapter(run.model) if is_adapter(run.model) else None

    def tensors(self) -> Tensors:
        """Yield every tensor of the merged model's files: name, and content on the CPU."""
        loaded_into = parameter_names(self.model, self.files)
        lacking = [name for name, _ in self.model.named_parameters() if name not in loaded_into.values()]
        if self.adapter:
            lacking = [name for name in lacking if not name.startswith(self.heads) and name not in self.adapter.saved]
        if lacking:
            raise InputError(f"{next(iter(self.files.values())).parent}: no weights of {lacking[0]} in its files")
        for key, name in loaded_into.items():
            if self.adapter and name.startswith(self.heads):
                continue  # of another task; the adapter brings its own
            with safe_open(self.files[key], "pt") as file:
                value = file.get_tensor(key)
            yield from self._written(key, name, self._merged(name, value))
        if self.adapter:
            for name in sorted(self.adapter.saved):
                yield from self._written(name, name, self.adapter.read(name))
            self.adapter.check_all_merged()

    def _merged(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a weight of the backbone as the trained model computes with it, adapter included."""
        if not value.is_floating_point():
            return value
        value = value.to(self.device, self.loaded)
        if self.quantizer and self.quantizer.param_needs_quantization(self.model, name):
            value = dequantise(quantise(value, name, self.model, self.quantizer))
        module = name.removesuffix(".weight")
        return self.adapter.merge(module, value.float()) if self.adapter and module in self.adapter.layers else value

    def _written(self, key: str, name: str, value: torch.Tensor) -> Tensors:
        """Yield a tensor as it goes to disk: cast, quantised once more, or the head as it is."""
        if name.endswith(TIE):
            self.tie = float(value)
            return
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(f"{self.run.folder}: {name} has values that are no finite numbers")
        if name.startswith(self.heads):
            # Beside quantised weights transformers casts nothing that it loads, and so could not compute the head.
            yield key, value.to(self.dtype if self.requantizer else torch.float32).cpu().contiguous()
            return
        value = value.to(self.dtype) if value.is_floating_point() else value
        if self.requantizer and self.requantizer.param_needs_quantization(self.target, name):
            yield from quantised_files(key, quantise(value, name, self.target, self.requantizer))
            return
        yield key, value.cpu().contiguous()


class Adapter:
    """The adapter of a saved model: LoRA layers to merge, and the modules that were trained whole.

    Args:
        folder: of the saved model, in PEFT's layout.

    Attributes:
        layers: the parts of each adapted layer (`lora_A.weight`, ...), by the layer's name.
        saved: names of the weights that were trained whole: the head.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ADAPTER_FILE
        self.config = LoraConfig.from_pretrained(folder)
        self.config.init_lora_weights = False  # they are read, so none need be drawn
        self.layers: dict[str, dict[str, str]] = {}
        self.saved: set[str] = set()
        self.merged: set[str] = set()
        with safe_open(self.file, "pt") as file:
            keys = list(file.keys())
        for key in keys:
            layer, found, part = key.removeprefix(PREFIX).partition(".lora_")
            if found:
                self.layers.setdefault(layer, {})[f"lora_{part}"] = key
            else:
                self.saved.add(layer)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name without PEFT's prefix."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(PREFIX + name)

    def merge(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the float32 weight of a linear layer with the adapter added by PEFT's own arithmetic."""
        parts = {part: self.read(f"{layer}.{part}").to(weight.device) for part in self.layers[layer]}
        if {"lora_A.weight", "lora_B.weight"} - parts.keys() or weight.ndim != 2:
            raise InputError(f"{self.file}: {layer} has an adapter of a kind that cannot be merged; export the adapter")
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        rank = len(parts["lora_A.weight"])
        adapted = LoraLinear(base, "default", config=self.config, r=rank, lora_alpha=self.config.lora_alpha)
        homes = {
            "lora_A.weight": lambda: adapted.lora_A["default"],
            "lora_B.weight": lambda: adapted.lora_B["default"],
            "lora_magnitude_vector": lambda: adapted.lora_magnitude_vector["default"],
        }
        for part, value in parts.items():
            homes[part]().weight.data = value.float()
        adapted.merge()
        self.merged.add(layer)
        return base.weight.data

    def check_all_merged(self) -> None:
        """Raise InputError if a layer of the adapter met no weight of the backbone."""
        for layer in self.layers.keys() - self.merged:
            raise InputError(f"{self.file}: {layer} has no weight of its own in the backbone's files to merge into")


def quantise(value: torch.Tensor, name: str, model: Any, quantizer: Any) -> Any:
    """Return a weight quantised as transformers does when it loads one: bitsandbytes' Params4bit or Int8Params."""
    weight = quantizer.get_quantize_ops().convert({name: value}, model=model, full_layer_name=name)[name]
    module = model.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "quant_state"):
        module.quant_state = None  # bitsandbytes leaves it there, and so the constants of all layers in memory
    return weight


def dequantise(weight: Any) -> torch.Tensor:
    """Return a quantised weight in float32."""
    if hasattr(weight, "SCB"):
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    weight.quant_state.dtype = torch.float32
    return dequantize_4bit(weight.data, weight.quant_state)


def quantised_files(key: str, weight: Any) -> Tensors:
    """Yield a quantised weight and its constants as bitsandbytes saves them."""
    yield key, weight.data.cpu()
    if hasattr(weight, "SCB"):
        module = key.removesuffix("weight")
        yield f"{module}SCB", weight.SCB.cpu()
        yield f"{module}weight_format", torch.tensor(0, dtype=torch.uint8)
        return
    for part, value in weight.quant_state.as_dict(packed=True).items():
        yield f"{key}.{part}", value.cpu()
