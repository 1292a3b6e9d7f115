"""A backbone -> a classifier with LoRA and a float32 head; saving it, and loading it again with checks."""

import copy
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import ModelConfig
from rewardmodel.errors import InputError
from rewardmodel.files import atomic_path, write_json
from rewardmodel.model.attention import LOADED_AS, keep_floats_constant
from rewardmodel.model.backbone import Backbone, resolve_saved_backbone
from rewardmodel.model.families import FAMILIES, find_family, stored_bits
from rewardmodel.model.forward import Predictor
from rewardmodel.model.fp8 import quantise_model
from rewardmodel.model.fusion import fuse_projections, separate_projections
from rewardmodel.model.heads import FloatLinear, check_loaded, classifier_class, head_names
from rewardmodel.model.liger import plain_rotation, use_liger
from rewardmodel.model.lora import add_lora
from rewardmodel.model.packing import is_packed, pack_attention
from rewardmodel.model.precision import quantization_name, quantization_settings, spare_head
from rewardmodel.model.saved_model import check_head, is_adapter, read_about
from rewardmodel.model.weights import tensor_shape
from rewardmodel.objectives import HeadShape
from rewardmodel.progress import quiet
from rewardmodel.run_folder import BACKBONE_FILE

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, with a padding token and without a length limit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    tokenizer.model_max_length = int(1e30)
    return tokenizer


@quiet()
def load_classifier(
    backbone: Backbone, head: HeadShape, weights: torch.dtype | None = None, on_host: bool = False
) -> PreTrainedModel:
    """Return the backbone under a float32 head, quantised if the recipe says so, on its device.

    Args:
        backbone: with its weights.
        head: its shape.
        weights: precision to load weights in; default: `backbone.dtype`.
        on_host: leave the weights in the host's memory, where FSDP shards them, so that no GPU ever holds all of them.

    Raises:
        InputError: weight files that do not fit the configuration, or without the head that is to be kept.
    """
    model_recipe, config, dtype = backbone.model, copy.deepcopy(backbone.config), weights or backbone.dtype
    for key, names in label_names(head).items():
        setattr(config, key, names)

    # transformers' own class with our head mixed in; layers above num_hidden_layers are in the files but not wanted
    kind = classifier_class(config, model_recipe.pooling, head)
    unwanted = range(config.get_text_config().num_hidden_layers, backbone.stored_layers)
    kind._keys_to_ignore_on_load_unexpected += tuple(rf"\.{number}\." for number in unwanted)
    if model_recipe.keep_head:
        _check_kept_head(kind, config, backbone.folder)

    # frozen weights in the compute precision, quantised or not; all weights in float32 where they all train
    quantization = quantization_settings(model_recipe, config, dtype)
    if stored_bits(config):
        spare_head(config, dtype)
    model, loaded = kind.from_pretrained(
        backbone.folder,
        config=config,
        dtype=dtype if model_recipe.use_peft and not backbone.family.float32_weights else torch.float32,
        attn_implementation=LOADED_AS.get(backbone.attention, backbone.attention),
        device_map=None if on_host or model_recipe.load_in_fp8 else {"": backbone.device},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # a head of another width is expected; check_loaded looks at the other weights
        **({"quantization_config": quantization} if quantization else {}),
    )
    check_loaded(model, loaded, backbone.folder)
    if model_recipe.load_in_fp8:
        quantise_model(model, backbone.device)
    _make_trainable(model, model_recipe.keep_head)
    if backbone.bits:
        _adapt_quantised(model)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN builds an execution plan for every new length, up to .5 s each
    pack_attention(model, backbone.attention)
    (use_liger if backbone.liger else plain_rotation)(model)
    if config.model_type not in FAMILIES:
        logger.info("%s is not in the table of families: generic rules apply", config.model_type)
    bits = f"{backbone.bits} bits" if backbone.bits else quantization_name(model_recipe) or "not quantised"
    kernels = f"{backbone.attention} attention" + ", liger's kernels" * backbone.liger
    logger.info("%s on %s: %s, %s, %s", config.model_type, backbone.device, dtype, kernels, bits)
    return model


def _make_trainable(model: Any, keep_head: bool) -> None:
    """Make the head float32, its last layer zero if it is new, and let the layers below compute gradients.

    The other layers of a head are kept where the folder has them: they were pretrained.
    """
    if not keep_head:
        model.renew()
    for name in head_names(model):
        module = model.get_submodule(name).float()
        if any("bitsandbytes" in type(part).__module__ for part in module.modules()):
            raise RuntimeError(f"the head '{name}' was quantised; rewardmodel.model.families.HEADS must name it")


def _adapt_quantised(model: Any) -> None:
    """Let the quantised layers of a model compute gradients, and in the precision that the family's code relies on."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # here, because an unquantised model predicts without it

    for module in model.modules():
        # On CPUs with bfloat16, bitsandbytes repacks a weight when it first evaluates, and then has no gradient for it.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, Linear4bit | Linear8bitLt) and find_family(model.config.model_type).float32_weights:
            module.register_forward_hook(_cast_as_autocast)


def _cast_as_autocast(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Return outputs in autocast's precision, as torch's own linear layers do; DeBERTa's code relies on that."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def _check_kept_head(kind: Any, config: Any, folder: Path) -> None:
    """Raise unless a folder has the whole head of a classifier of that class."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    for head in head_names(model):
        for name, weight in model.get_submodule(head).named_parameters(prefix=head):
            shape = tensor_shape(folder, name)
            if shape != tuple(weight.shape) and not name.endswith(".tie"):
                held = f"has '{name}' of size {shape}" if shape else f"has no '{name}'"
                raise InputError(
                    f"model.keep_head: {folder} {held}, and objective.name needs {tuple(weight.shape)}; "
                    "set it to false for a new head"
                )


def label_names(head: HeadShape) -> dict[str, dict]:
    """Return `id2label` and `label2id` of a head, as transformers' configurations hold them."""
    names = dict(enumerate(OUTCOMES if head.num_labels == 3 else ["reward"]))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def build_model(backbone: Backbone, head: HeadShape, seed: int) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a new model to train, its adapters initialised with `seed`, and its tokenizer.

    Raises:
        InputError: as `load_classifier` and `add_lora`.
    """
    config = backbone.model
    set_seed(seed)
    sharded = backbone.launch.strategy == "fsdp" and backbone.launch.processes > 1 and not backbone.bits
    model: Any = load_classifier(backbone, head._replace(pairs=config.pair_ties), on_host=sharded)
    if config.use_peft:
        model = add_lora(model, config)
        if backbone.launch.strategy != "fsdp":  # which gives each process a part of every weight
            fuse_projections(model)
        if backbone.folder.parent.name == "snapshots":  # in the hub's cache: other machines know it by its hub id
            model.peft_config["default"].base_model_name_or_path = config.model_name_or_path
            model.peft_config["default"].revision = backbone.folder.name
        count, total = model.get_nb_trainable_parameters()
        what = "the head only" if config.freeze_backbone else f"LoRA r{config.lora_r}"
        logger.info("%s: %s of %s weights train", what, f"{count:,}", f"{total:,}")
    return model, load_tokenizer(backbone.folder)


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    backbone: Backbone,
    folder: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write adapter and head (or the full model), tokenizer and the backbone's fingerprint, whole or not at all.

    Args:
        model: trained.
        tokenizer: of the model.
        backbone: that it stands on.
        folder: to write to.
        state: the gathered weights of a model that is sharded over processes.
    """
    about = {
        "model_name_or_path": backbone.model.model_name_or_path,
        "model_revision": backbone.model.model_revision,
        "fingerprint": backbone.fingerprint,
        "head": unwrap(model).shape._asdict(),
    }
    with atomic_path(folder) as partial:
        model.save_pretrained(partial, **({} if state is None else {"state_dict": state}))
        tokenizer.save_pretrained(partial)
        write_json(partial / BACKBONE_FILE, about)


def trained_layer(model: Any) -> Any:
    """Return the last layer of the head; of PEFT's two copies the one that it trains and uses."""
    plain = unwrap(model)
    last = plain.last_layer.rpartition(".")[2]
    layers = {name: part for name, part in plain.named_modules() if isinstance(part, FloatLinear)}
    named = [name for name in layers if last in name.split(".")[-3:]]
    return layers[next((name for name in named if ".modules_to_save." in name), named[-1])]


def unwrap(model: Any) -> Any:
    """Return the transformers model, out of PEFT's wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def compile_blocks(model: Any, **options: Any) -> None:
    """Compile the blocks of a decoder in place, each for all lengths; they are alike, so two graphs serve all.

    The first block has a separate one, because its input needs no gradient. Projections compute one by one again.

    Args:
        model: a classifier, with or without adapters.
        options: of `torch.compile`.

    Raises:
        InputError: its batches are padded.
    """
    if not is_packed(model):
        raise InputError(
            f"trainer.torch_compile: compiles decoders whose rows are packed, and those of {model.config.model_type} "
            "are padded; leave it out"
        )
    keep_floats_constant()
    separate_projections(model)  # torch would compile again for each group of layers
    plain = unwrap(model)
    for block in getattr(plain, plain.base_model_prefix).layers:
        block.compile(dynamic=True, **options)


def load_model(
    config: ModelConfig, folder: Path, weights: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return a saved model in evaluation mode and its tokenizer.

    Args:
        config: the recipe's `model` section.
        folder: of the saved model.
        weights: precision to load weights in; default: the one to compute in.

    Raises:
        InputError: no saved model there, one without its head, or another backbone than it was trained on.
    """
    return load_saved(resolve_saved_backbone(config, folder), folder, weights)


@quiet()
def load_saved(
    backbone: Backbone, folder: Path, weights: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return what `load_model` does, on the backbone under the saved model (`resolve_saved_backbone`)."""
    gc.collect()  # bitsandbytes' layers are in reference cycles: a model that was let go may still be in memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    about, adapted = read_about(folder), is_adapter(folder)
    with _whole_in_every_process():
        model: Any = load_classifier(backbone, HeadShape(**about["head"]), weights)
        if adapted:
            check_head(folder, head_names(model))
            model = PeftModel.from_pretrained(model, folder)
    if "tie" in about:  # of a merged model, whose weight files have no place for it
        model.get_submodule(model.last_layer).tie.data.fill_(about["tie"])
    return model.eval(), load_tokenizer(folder)


def load_predictor(config: ModelConfig, folder: Path, budget: int | None = None) -> Predictor:
    """Return a saved model with all that turns rows into logits.

    Args:
        config: the recipe's `model` section.
        folder: of the saved model.
        budget: tokens of a batch; None: as many as fit into free memory.

    Raises:
        InputError: as `load_model`.
    """
    backbone = resolve_saved_backbone(config, folder)
    model, tokenizer = load_saved(backbone, folder)
    fuse_projections(model)
    return Predictor(model, tokenizer, backbone.dtype, budget, backbone.feature_cache)


@contextmanager
def _whole_in_every_process() -> Iterator[None]:
    """Let transformers read weights in every process, where FSDP would have the first one send them to the others."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
