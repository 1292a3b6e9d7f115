"""How a model is spread over processes, and which of them this is; one process alone is the main one."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import yaml

from rewardmodel.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

Found = TypeVar("Found")


def is_main() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return os.environ.get("RANK", "0") == "0"


def joined() -> "PartialState":
    """Return accelerate's state of this process, which is one of its launch from here on."""
    import torch  # here, because the command line must start without it
    from accelerate import PartialState

    # Unless it is told, processes on CPUs know nothing of each other.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    return PartialState(cpu=cpu)


def wait_for_all() -> None:
    """Return when every process has come here."""
    joined().wait_for_everyone()


def from_main(find: Callable[[], Found]) -> Found:
    """Return in every process what `find` returns in the main one, which alone calls it."""
    joined()
    from accelerate.utils import broadcast_object_list

    found: list = [find() if is_main() else None]
    broadcast_object_list(found)
    return found[0]


def in_every_process(names: set[str]) -> set[str]:
    """Return those of some names that every process gives."""
    if joined().num_processes == 1:
        return names
    from accelerate.utils import gather_object

    return set.intersection(*gather_object([names]))


class Launch(NamedTuple):
    """How a model is spread over processes.

    Attributes:
        processes: their number, over all machines; each has a GPU.
        strategy: `ddp` keeps all weights in each, `fsdp` and `deepspeed` spread them; none: one process.
        version: of FSDP, or the stage of DeepSpeed's ZeRO.
        ram_efficient: whether the first process alone reads weights, and sends them to the others (FSDP).
    """

    processes: int = 1
    strategy: Literal["", "ddp", "fsdp", "deepspeed"] = ""
    version: int = 0
    ram_efficient: bool = False


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the launch that this process is part of, by the variables that accelerate's launcher sets."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    if _true(environment.get("ACCELERATE_USE_FSDP")):
        ram_efficient = _true(environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        return Launch(processes, "fsdp", int(environment.get("FSDP_VERSION", "1")), ram_efficient)
    if _true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = _stage(Path(file)) if file else int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        return Launch(processes, "deepspeed", stage)
    return Launch(processes, "ddp" if processes > 1 else "")


def launch_of(path: Path, processes: int | None = None) -> Launch:
    """Return the launch that a configuration of accelerate describes.

    Args:
        path: the YAML file.
        processes: in the place of its own number.

    Raises:
        InputError: no such file, or no configuration of accelerate.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: no configuration of accelerate ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise InputError(f"{path}: no configuration of accelerate: it has no distributed_type; see recipes/accelerate")
    count = processes or int(content.get("num_processes") or 1)
    kind = str(content["distributed_type"]).upper()
    if kind == "FSDP":
        fsdp = content.get("fsdp_config") or {}
        efficient = _true(fsdp.get("fsdp_cpu_ram_efficient_loading", True))  # accelerate's own default
        return Launch(count, "fsdp", int(fsdp.get("fsdp_version", 1)), efficient)
    if kind == "DEEPSPEED":
        deepspeed = content.get("deepspeed_config") or {}
        file = deepspeed.get("deepspeed_config_file")
        return Launch(count, "deepspeed", _stage(Path(file)) if file else int(deepspeed.get("zero_stage", 2)))
    return Launch(count, "ddp" if count > 1 else "")


def _stage(path: Path) -> int:
    """Return the stage of ZeRO in a configuration file of DeepSpeed."""
    try:
        return int(json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: no configuration of DeepSpeed ({' '.join(str(error).split())})") from error


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
