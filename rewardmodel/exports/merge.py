"""A trained run -> one model without an adapter, merged in float32 and written a tensor at a time.

An adapter belongs to the weights that it was trained on. If those were quantised, they are quantised again as loading
did it and dequantised, the adapter's update is added in float32, and only the sum is cast. The whole model is never in
memory: only the current tensor and the output shard are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from rewardmodel.errors import InputError
from rewardmodel.exports.checks import TrainedRun
from rewardmodel.exports.weight_files import find_weight_files, match_parameters, write_shards
from rewardmodel.files import write_json
from rewardmodel.model.backbone import saved_backbone_folder
from rewardmodel.model.families import find_family, lowest_layers
from rewardmodel.model.fp8 import dequantise_rows, layers_to_quantise, quantise_rows
from rewardmodel.model.heads import classifier_class, head_names
from rewardmodel.model.loading import label_names, load_tokenizer
from rewardmodel.model.precision import bits_and_bytes, compute_device, dtype_name
from rewardmodel.model.saved_model import ADAPTER_FILE, is_adapter, read_about
from rewardmodel.objectives import HeadShape
from rewardmodel.run_folder import BACKBONE_FILE

NamedTensors = Iterator[tuple[str, torch.Tensor]]


def merge_run(
    run: TrainedRun, folder: Path, dtype: torch.dtype, *, to_4_bits: bool = False, shard_bytes: int = 2 * 10**9
) -> None:
    """Write a run's model with its adapter merged: configuration, weights as safetensors, tokenizer, `BACKBONE_FILE`.

    Args:
        run: with an adapter, or fully fine-tuned, which has nothing to merge.
        folder: where to; plain transformers loads the model from there.
        dtype: of the weights written; the head stays float32, unless `to_4_bits`.
        to_4_bits: quantise the merged weights to 4 bits, as the recipe's `model` section says.
        shard_bytes: size of an output file; a larger tensor gets a separate file.

    Raises:
        InputError: the backbone is not there, or is another one, or cannot be merged a tensor at a time.
        FloatingPointError: a weight is NaN or infinite.
    """
    # the model as a plain classifier
    about, model_recipe = read_about(run.model), run.recipe.model
    backbone = saved_backbone_folder(model_recipe, run.model)
    head = HeadShape(**about["head"])
    config = AutoConfig.from_pretrained(backbone, **label_names(head))
    config = lowest_layers(config, model_recipe.num_hidden_layers)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{backbone}: its weights are stored quantised, which merging cannot read; use adapter")
    target = bits_and_bytes(replace(model_recipe, load_in_4bit=True, load_in_8bit=False), dtype) if to_4_bits else None

    # weights
    merged = MergedModel(run, backbone, config, head, dtype, target)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(merged.tensors(), folder, shard_bytes)

    # tokenizer, configuration, and what only rewardmodel reads
    tokenizer = load_tokenizer(run.model)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    config.architectures = [type(merged.model).__name__]
    config.dtype = dtype
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if target:
        config.quantization_config = target
    config.save_pretrained(folder)
    about["merged"] = {"dtype": dtype_name(dtype), "bits": 4 if to_4_bits else None}
    write_json(folder / BACKBONE_FILE, about | ({} if merged.tie is None else {"tie": merged.tie}))


class MergedModel:
    """A merged model whose weights are computed one after another.

    Args:
        run: as of `merge_run`.
        backbone: folder of the weights under the run's adapter, or of the run's own if it was trained whole.
        config: the model's transformers configuration.
        head: the shape of its head.
        dtype: of the weights to yield.
        target: bitsandbytes settings to quantise them by; None: they are not quantised.

    Attributes:
        model: the classifier as it was loaded for training, on the meta device.
        tie: the tie parameter, once `tensors` is exhausted; None: the head has none.
    """

    def __init__(
        self,
        run: TrainedRun,
        backbone: Path,
        config: Any,
        head: HeadShape,
        dtype: torch.dtype,
        target: BitsAndBytesConfig | None,
    ) -> None:
        recipe, trained_dtype = run.recipe.model, getattr(torch, run.dtype)
        self.run, self.dtype, self.device = run, dtype, compute_device(recipe)
        self.loaded_dtype = torch.float32 if find_family(config.model_type).float32_weights else trained_dtype
        self.tie: float | None = None

        def build(settings: BitsAndBytesConfig | None) -> tuple[Any, Any]:
            """Return the classifier on the meta device, and transformers' quantizer for it."""
            with torch.device("meta"):
                model = classifier_class(config, recipe.pooling, head)(config)
            if settings is None:
                return model, None
            quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
            quantizer.preprocess_model(model=model, device_map=None)
            return model, quantizer

        quantised = recipe.load_in_4bit or recipe.load_in_8bit
        self.model, self.quantizer = build(bits_and_bytes(recipe, trained_dtype) if quantised else None)
        self.target_model, self.target_quantizer = build(target)
        self.fp8_layers = {*layers_to_quantise(self.model)} if recipe.load_in_fp8 else set()
        self.heads = tuple(f"{name}." for name in head_names(self.model))
        self.files = find_weight_files(backbone)
        self.adapter = SavedAdapter(run.model) if is_adapter(run.model) else None

    def tensors(self) -> NamedTensors:
        """Yield every tensor of the merged model's files: name, and content on the CPU.

        Raises:
            InputError: a weight is missing in the backbone's files, or part of the adapter has no weight there.
            FloatingPointError: a weight is NaN or infinite.
        """
        # check that all weights are there before any is read
        parameters = match_parameters(self.model, self.files)  # {"norm.weight": "model.norm.weight"}
        missing = [name for name, _ in self.model.named_parameters() if name not in parameters.values()]
        if self.adapter:
            missing = [name for name in missing if not name.startswith(self.heads) and name not in self.adapter.saved]
        if missing:
            folder = next(iter(self.files.values())).parent
            raise InputError(f"{folder}: no weights of {missing[0]} in its files; fetch the backbone again")

        # the backbone's, merged
        for key, name in parameters.items():
            if self.adapter and name.startswith(self.heads):
                continue  # a head for another task; the adapter has the trained one
            with safe_open(self.files[key], "pt") as file:
                value = file.get_tensor(key)
            yield from self._cast(key, name, self._merge(name, value))

        # those that were trained whole
        if self.adapter:
            for name in sorted(self.adapter.saved):
                yield from self._cast(name, name, self.adapter.read(name))
            self.adapter.check_all_merged()

    def _merge(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a weight of the backbone as the trained model computes with it, adapter included."""
        if not value.is_floating_point():
            return value
        value = value.to(self.device, self.loaded_dtype)
        if self.quantizer and self.quantizer.param_needs_quantization(self.model, name):
            value = dequantise_weight(quantise_weight(value, name, self.model, self.quantizer))
        module = name.removesuffix(".weight")
        if module in self.fp8_layers:
            value = dequantise_rows(*quantise_rows(value))
        if self.adapter and module in self.adapter.layers:
            return self.adapter.add_update(module, value.float())
        return value

    def _cast(self, key: str, name: str, value: torch.Tensor) -> NamedTensors:
        """Yield a tensor as it is written: cast, quantised, or the head as it is."""
        if name.endswith(".tie"):  # of a reward head; a plain classifier has no place for it
            self.tie = float(value)
            return
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FloatingPointError(f"{self.run.folder}: {name} is NaN or infinite; train the run again")
        if name.startswith(self.heads):
            # transformers casts nothing that it loads next to quantised weights, and could not compute a float32 head
            yield key, value.to(self.dtype if self.target_quantizer else torch.float32).cpu().contiguous()
            return
        value = value.to(self.dtype) if value.is_floating_point() else value
        if self.target_quantizer and self.target_quantizer.param_needs_quantization(self.target_model, name):
            weight = quantise_weight(value, name, self.target_model, self.target_quantizer)
            yield key, weight.data.cpu()
            for part, constants in weight.quant_state.as_dict(packed=True).items():  # as bitsandbytes saves them
                yield f"{key}.{part}", constants.cpu()
            return
        yield key, value.cpu().contiguous()


class SavedAdapter:
    """The adapter of a saved model: LoRA layers to merge, and weights that were trained whole.

    Args:
        folder: of the saved model, in PEFT's layout.

    Attributes:
        layers: keys of the parts of each adapted layer, by the layer's name, like
            `{"model.layers.0.mlp.up_proj": {"lora_A.weight": "base_model.model.model.layers.0…"}}`.
        saved: names of the weights that were trained whole: the head's.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ADAPTER_FILE
        self.config = LoraConfig.from_pretrained(folder)
        self.config.init_lora_weights = False  # they are read, so they need not be drawn
        self.layers: dict[str, dict[str, str]] = {}
        self.saved: set[str] = set()
        self.merged: set[str] = set()
        with safe_open(self.file, "pt") as file:
            keys = list(file.keys())
        for key in keys:
            layer, lora, part = key.removeprefix("base_model.model.").partition(".lora_")
            if lora:
                self.layers.setdefault(layer, {})[f"lora_{part}"] = key
            else:
                self.saved.add(layer)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name without PEFT's prefix."""
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(f"base_model.model.{name}")

    def add_update(self, layer: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight of a linear layer, (out, in) float32, with the adapter added by PEFT's own arithmetic.

        Raises:
            InputError: an adapter other than LoRA or DoRA, or of a layer that is not linear.
        """
        parts = {part: self.read(f"{layer}.{part}").to(weight.device) for part in self.layers[layer]}
        factors = {"lora_A.weight", "lora_B.weight"}
        if not factors <= parts.keys() <= factors | {"lora_magnitude_vector"} or weight.ndim != 2:
            raise InputError(f"{self.file}: {layer} has an adapter that cannot be merged; use --kind adapter")
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight, requires_grad=False)
        rank = len(parts["lora_A.weight"])
        adapted = LoraLinear(base, "default", config=self.config, r=rank, lora_alpha=self.config.lora_alpha)
        for part, value in parts.items():
            getattr(adapted, part.removesuffix(".weight"))["default"].weight.data = value.float()
        adapted.merge()
        self.merged.add(layer)
        return base.weight.data

    def check_all_merged(self) -> None:
        """Raise InputError if a layer of the adapter has no weight in the backbone."""
        for layer in self.layers.keys() - self.merged:
            raise InputError(
                f"{self.file}: {layer} has no weight in the backbone's files to merge into; use --kind adapter"
            )


def quantise_weight(value: torch.Tensor, name: str, model: Any, quantizer: Any) -> Any:
    """Return a weight quantised as transformers does when it loads one: bitsandbytes' Params4bit or Int8Params."""
    weight = quantizer.get_quantize_ops().convert({name: value}, model=model, full_layer_name=name)[name]
    module = model.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "quant_state"):
        module.quant_state = None  # bitsandbytes keeps it there, and so the constants of all layers in memory
    return weight


def dequantise_weight(weight: Any) -> torch.Tensor:
    """Return a quantised weight in float32."""
    if hasattr(weight, "SCB"):  # 8 bits, a scale per row
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    weight.quant_state.dtype = torch.float32
    return dequantize_4bit(weight.data, weight.quant_state)
