"""A backbone folder in, a classifier with LoRA and a float32 head out; saving, and reloading with checks."""

import copy
import gc
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path
from rewardmodel.model.compatibility import refuse
from rewardmodel.model.families import FAMILIES, family, lowest_layers
from rewardmodel.model.heads import FloatLinear, check_loaded, classifier_class, head_names
from rewardmodel.model.lora import add_lora, subtract_start
from rewardmodel.model.packing import pack_attention
from rewardmodel.model.precision import placement, quantization, quantized_bits, setup
from rewardmodel.model.weights import fingerprint, resolve, tensor_shape
from rewardmodel.objectives import Head
from rewardmodel.run_folder import BACKBONE_FILE

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a padding token and no length limit of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_classifier(
    config: ModelConfig, folder: Path, head: Head, spread: bool = False, weights: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the backbone of a folder under a float32 head, quantised or not, on its device.

    Args:
        config: of the recipe.
        folder: of the backbone.
        head: its shape.
        spread: whether FSDP will cut it up: it then waits in the host's memory, and no GPU ever holds all of it.
        weights: precision to load weights in; none: that to compute in.

    Raises:
        InputError: a device, precision, attention or quantisation that is not to be had here, or no head to keep.
    """
    refuse(setup(config, folder))
    model_config = AutoConfig.from_pretrained(folder)
    layers = model_config.get_text_config().num_hidden_layers
    lowest_layers(model_config, config.num_hidden_layers)
    rules = family(model_config.model_type)
    device, dtype = placement(config, folder)
    dtype = weights or dtype
    bits = quantized_bits(config, model_config)
    quantized = quantization(config, model_config, dtype)
    attention = config.attn_implementation or rules.attention[0]
    for key, names in label_names(head).items():
        setattr(model_config, key, names)
    kind = classifier_class(model_config, config.pooling, head)
    left_out = range(model_config.get_text_config().num_hidden_layers, layers)
    kind._keys_to_ignore_on_load_unexpected += tuple(rf"\.{number}\." for number in left_out)
    if config.keep_head:
        _check_kept(kind, model_config, folder)
    model, found = kind.from_pretrained(
        folder,
        config=model_config,
        dtype=dtype if config.use_peft and not rules.float32_weights else torch.float32,
        attn_implementation=attention,
        device_map=None if spread else {"": device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head of another width is no fault; other weights are looked at here
        **({"quantization_config": quantized} if quantized else {}),
    )
    check_loaded(model, found, folder)
    _make_trainable(model, config.keep_head)
    if model_config.model_type not in FAMILIES:
        logger.info("%s is not in the table of families: generic rules hold for it", model_config.model_type)
    held = f"{bits} bits" if bits else "not quantised"
    logger.info("%s on %s: %s, %s attention, %s", model_config.model_type, device, dtype, attention, held)
    return model


def _make_trainable(model: Any, keep_head: bool) -> None:
    """Make the head float32, and even-handed if it is new; let the layers under it compute gradients, and packed rows.

    Other layers of a head than its last are kept where the folder has them: they belong to what was pretrained.
    """
    if not keep_head:
        model.renew()
    for name in head_names(model):
        module = model.get_submodule(name).float()
        if any("bitsandbytes" in type(part).__module__ for part in module.modules()):
            raise RuntimeError(f"the head '{name}' was quantised; rewardmodel.model.families.HEADS must name it")
    for module in model.modules():
        # On CPUs with bfloat16, bitsandbytes repacks a weight when it first evaluates, and then has no gradient for it.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear4bit | Linear8bitLt) and family(model.config.model_type).float32_weights:
            module.register_forward_hook(_as_autocast)
    pack_attention(model)


def _as_autocast(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Return outputs in autocast's precision, as torch's own linear layers give them; DeBERTa reckons with that."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def _check_kept(kind: Any, model_config: Any, folder: Path) -> None:
    """Raise if a folder does not have the whole head of a classifier of that kind."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(model_config))
    for head in head_names(model):
        for name, weight in model.get_submodule(head).named_parameters(prefix=head):
            shape = tensor_shape(folder, name)
            if shape != tuple(weight.shape) and not name.endswith(".tie"):
                held = f"has '{name}' of size {shape}" if shape else f"has no '{name}'"
                raise InputError(
                    f"model.keep_head: {folder} {held}, and objective.name needs {tuple(weight.shape)}; "
                    "set it to false for a new head"
                )


def label_names(head: Head) -> dict[str, dict]:
    """Return the names of a head's outputs in the words of transformers' configurations."""
    names = dict(enumerate(OUTCOMES if head.num_labels == 3 else ["reward"]))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def build_model(config: ModelConfig, head: Head, seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a new model to train, its adapters drawn with `seed`, and the tokenizer.

    Raises:
        InputError: as `resolve`, `refuse`, `load_classifier` and `add_lora`.
    """
    folder = resolve(config.model_name_or_path, config.model_revision)
    planned = setup(config, folder, trainer={})
    refuse(planned)
    set_seed(seed)
    spread = planned.fsdp and planned.launch.processes > 1 and not planned.quantised
    model: Any = load_classifier(config, folder, head._replace(pairs=config.pair_ties), spread)
    if config.use_peft:
        model = add_lora(model, config)
        if folder.parent.name == "snapshots":  # of the hub's cache: PEFT shall find the backbone on other machines too
            model.peft_config["default"].base_model_name_or_path = config.model_name_or_path
            model.peft_config["default"].revision = folder.name
        count, total = model.get_nb_trainable_parameters()
        what = "the head alone" if config.freeze_backbone else f"LoRA r{config.lora_r}"
        logger.info("%s: %s of %s weights train", what, f"{count:,}", f"{total:,}")
    return model, load_tokenizer(folder)


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter and head (or the full model), tokenizer and the backbone's fingerprint, whole or not at all.

    `state` has the weights of a model that is spread over processes. A PiSSA adapter holds a part of the backbone; it
    is saved as its difference from the start of training, an ordinary LoRA of twice the rank on the untouched backbone.
    """
    backbone = resolve(config.model_name_or_path, config.model_revision)
    about = {
        "model_name_or_path": config.model_name_or_path,
        "model_revision": config.model_revision,
        "fingerprint": fingerprint(backbone),
        "head": classifier(model).shape._asdict(),
    }
    with atomic_path(folder) as partial:
        model.save_pretrained(partial, **({} if state is None else {"state_dict": state}))
        if config.use_peft and config.lora_init == "pissa" and not config.freeze_backbone:
            subtract_start(partial, model.pissa_start)
        tokenizer.save_pretrained(partial)
        (partial / BACKBONE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def trained_layer(model: Any) -> Any:
    """Return the last layer of the head, of PEFT's two the one that it trains and uses."""
    plain = classifier(model)
    last = plain.last_layer.rpartition(".")[2]
    layers = {name: part for name, part in plain.named_modules() if isinstance(part, FloatLinear)}
    named = [name for name in layers if last in name.split(".")[-3:]]
    return layers[next((name for name in named if ".modules_to_save." in name), named[-1])]


def classifier(model: Any) -> Any:
    """Return the transformers model, out of PEFT's wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_model(
    config: ModelConfig, folder: Path, weights: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a saved model, ready to predict, and its tokenizer; `weights` as `load_classifier` has it.

    Raises:
        InputError: no saved model there, one without its head, or a backbone that is not the one it was trained on.
    """
    gc.collect()  # bitsandbytes' layers are in cycles: a model that was let go may be here still
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    about, adapted = read_about(folder), is_adapter(folder)
    config = config if adapted else replace(config, keep_head=True)
    with _whole_in_every_process():
        model: Any = load_classifier(config, backbone_folder(config, folder), Head(**about["head"]), weights=weights)
        if adapted:
            check_head(folder, head_names(model))
            model = PeftModel.from_pretrained(model, folder)
    if "tie" in about:  # of a merged model, whose files have no place for it
        model.get_submodule(model.last_layer).tie.data.fill_(about["tie"])
    return model.eval(), load_tokenizer(folder)


@contextmanager
def _whole_in_every_process() -> Iterator[None]:
    """Let transformers read weights in every process, where FSDP would let the first send them to the others."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


ADAPTER = "adapter_model.safetensors"
"""PEFT's file of an adapter and of the modules saved with it."""


def read_about(folder: Path) -> dict[str, Any]:
    """Return what `BACKBONE_FILE` in the folder of a saved model tells.

    Raises:
        InputError: there is none.
    """
    try:
        return json.loads((folder / BACKBONE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no trained model there; has the run finished training?") from error


def is_adapter(folder: Path) -> bool:
    """Return whether a saved model is an adapter; else it is whole."""
    return (folder / "adapter_config.json").is_file()


def backbone_folder(config: ModelConfig, folder: Path) -> Path:
    """Return the folder with the weights under a saved model: its backbone's, or its own if it is whole.

    Raises:
        InputError: no saved model there, or a backbone that is not the one it was trained on.
    """
    about = read_about(folder)
    if not is_adapter(folder):
        return folder
    backbone = resolve(config.model_name_or_path, config.model_revision)
    if fingerprint(backbone) != about["fingerprint"]:
        raise InputError(
            f"{folder}: trained on other weights of {about['model_name_or_path']} than those in {backbone}; "
            "give the backbone that it was trained on"
        )
    return backbone


def check_head(folder: Path, heads: Iterable[str]) -> None:
    """Raise InputError unless a saved adapter has these heads with it."""
    with safe_open(folder / ADAPTER, "pt") as weights:
        keys = list(weights.keys())
    for head in heads:
        if not any(f".{head}." in key for key in keys):
            raise InputError(
                f"{folder}: the saved adapter has no head '{head}'; save it with modules_to_save=['{head}']"
            )
