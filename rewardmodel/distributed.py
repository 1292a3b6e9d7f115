"""How a model is spread over processes, and which of them this is; a single process is the main one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import yaml

from rewardmodel.errors import InputError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def is_main() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> "PartialState":
    """Return accelerate's state of this process; the first call joins the process group of the launch."""
    import torch  # here, because the command line must start without it
    from accelerate import PartialState

    # accelerate joins processes on CPUs only if it is asked to
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
    return PartialState(cpu=cpu)


def wait_for_all() -> None:
    """Block until every process has called this (a barrier)."""
    process_state().wait_for_everyone()


def from_main(compute: Callable[[], T]) -> T:
    """Call `compute` in the main process only, and return its result in every process (a broadcast, by pickle)."""
    process_state()
    from accelerate.utils import broadcast_object_list

    result: list = [compute() if is_main() else None]
    broadcast_object_list(result)
    return result[0]


def common_to_all(names: set[str]) -> set[str]:
    """Return the intersection of the sets that all processes give."""
    if process_state().num_processes == 1:
        return names
    from accelerate.utils import gather_object

    return set.intersection(*gather_object([names]))


class Launch(NamedTuple):
    """How a model is spread over processes.

    Attributes:
        processes: their number, over all machines; each has one GPU.
        strategy: `ddp` keeps all weights in every process, `fsdp` shards them; empty: a single process.
        version: of FSDP.
        ram_efficient: whether only the first process reads weights and sends them to the others (FSDP).
    """

    processes: int = 1
    strategy: Literal["", "ddp", "fsdp"] = ""
    version: int = 0
    ram_efficient: bool = False


def current_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the launch that this process is part of, from the variables that accelerate's launcher sets.

    Raises:
        InputError: DeepSpeed, which is not supported.
    """
    processes = int(environment.get("WORLD_SIZE", "1"))
    if _is_true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        raise InputError(NO_DEEPSPEED)
    if _is_true(environment.get("ACCELERATE_USE_FSDP")):
        ram_efficient = _is_true(environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        return Launch(processes, "fsdp", int(environment.get("FSDP_VERSION", "1")), ram_efficient)
    return Launch(processes, "ddp" if processes > 1 else "")


def read_launch(path: Path, processes: int | None = None) -> Launch:
    """Return the launch that a configuration file of accelerate describes.

    Args:
        path: the YAML file.
        processes: overrides the number in the file.

    Raises:
        InputError: no such file, not a configuration of accelerate, or DeepSpeed, which is not supported.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "distributed_type" not in content:
            raise ValueError("no distributed_type")
        kind = str(content["distributed_type"]).upper()
        count = processes or int(content.get("num_processes") or 1)
        fsdp = dict(content.get("fsdp_config") or {})
        version = int(fsdp.get("fsdp_version", 1))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a configuration of accelerate ({reason}); start from a file in recipes/accelerate"
        ) from error
    if kind == "DEEPSPEED":
        raise InputError(f"{path}: {NO_DEEPSPEED}")
    if kind == "FSDP":
        efficient = _is_true(fsdp.get("fsdp_cpu_ram_efficient_loading", True))  # accelerate's own default
        return Launch(count, "fsdp", version, efficient)
    return Launch(count, "ddp" if count > 1 else "")


NO_DEEPSPEED = "distributed_type: DeepSpeed is not supported; launch with recipes/accelerate/ddp.yaml or fsdp2.yaml"


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")
