import os

import pytest

from rewardmodel.processors import PRIMITIVES, WAITING, cpu_limit, set_environment


def machine(root, groups, files):
    """Make /proc/self/cgroup and the files of control groups below `root`."""
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/pods/one\n", {"pods/cpu.max": "150000 100000\n", "pods/one/cpu.max": "max 100000\n"}, 1.5),
        ("0::/pods/one\n", {"pods/cpu.max": "800000 100000\n", "pods/one/cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "broken\n"}, None),
        ("3:memory:/x\n1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.5),
        (
            "1:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            None,
        ),
    ],
)
def test_the_limit_of_a_container_is_a_number_of_cores(tmp_path, groups, files, cores):
    assert cpu_limit(machine(tmp_path, groups, files)) == cores


def test_a_machine_without_control_groups_has_no_limit(tmp_path):
    assert cpu_limit(tmp_path) is None


@pytest.fixture
def host(monkeypatch):
    """Let this be a machine of 64 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def test_a_container_of_two_cores_on_a_large_host_gets_two_threads_that_sleep_while_they_wait(host, tmp_path):
    found = {}
    set_environment(found, machine(tmp_path, "0::/\n", {"cpu.max": "200000 100000\n"}))
    assert found == {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": PRIMITIVES,
        "OMP_WAIT_POLICY": WAITING,
        "OMP_NUM_THREADS": "2",
    }


def test_less_than_a_core_is_one_thread(host, tmp_path):
    found = {}
    set_environment(found, machine(tmp_path, "0::/\n", {"cpu.max": "50000 100000\n"}))
    assert found["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("files", [{}, {"cpu.max": "6400000 100000\n"}])
def test_without_a_tighter_limit_torch_chooses_the_threads(host, tmp_path, files):
    found = {}
    set_environment(found, machine(tmp_path, "0::/\n", files))
    assert "OMP_NUM_THREADS" not in found


def test_what_the_user_has_set_stays(host, tmp_path):
    own = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
    found = dict(own)
    set_environment(found, machine(tmp_path, "0::/\n", {"cpu.max": "200000 100000\n"}))
    assert found == own
    found = {"GOMP_SPINCOUNT": "5"}
    set_environment(found, tmp_path)
    assert found["GOMP_SPINCOUNT"] == "5"
    assert "OMP_WAIT_POLICY" not in found
