"""The machine's processors -> environment variables of the libraries that compute on them, set before torch loads.

Waiting OpenMP threads spin by default: beside another process they take the processor from the thread that they wait
for. Limits of a container's CPU time are not seen by OpenMP, which then starts a thread for every core of the host.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

WAITING = "PASSIVE"
"""How OpenMP threads wait: they sleep at once, instead of spinning for milliseconds. On two cores, beside one busy
process, a pass takes .60 of the time; alone 1.00: scripts/results/neighbour.json."""

PRIMITIVES = "32"
"""Kernels that oneDNN keeps. It has one for each shape, and every batch has another: gigabytes, and no faster."""


def set_environment(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set the variables that torch's libraries read when they are loaded, unless the user has set them.

    Args:
        environment: to change.
        root: of the file system, where the limits of a container are.
    """
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)
    if "GOMP_SPINCOUNT" not in environment:  # libgomp's own setting of the same
        environment.setdefault("OMP_WAIT_POLICY", WAITING)
    limit = cpu_limit(root)
    if limit is not None and limit < len(os.sched_getaffinity(0)):
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(limit))))


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Return how many cores the CPU time that this process's control group is allowed amounts to; None: no limit.

    The limits of the groups that contain it count too. Files: `cpu.max` of version 2 ("200000 100000": 0.2 s in each
    0.1 s, 2 cores), `cpu.cfs_quota_us` and `cpu.cfs_period_us` of version 1
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html).
    """
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    limits = []
    for group in groups:  # "0::/kubepods/pod1" of version 2, "4:cpu,cpuacct:/docker/1" of version 1
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            limits.append(_read_limit(folder))
            if folder == mount:
                break
    return min((limit for limit in limits if limit is not None), default=None)


def _read_limit(folder: Path) -> float | None:
    """Return the cores that a control group may use; None: no limit, or no such group here."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text(encoding="utf-8").strip() for name in names)
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return None
