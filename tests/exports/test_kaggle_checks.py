import inspect
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from kaggle_trees import make_bundle, make_competition, run_cells
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from rewardmodel.exports import kaggle_checks
from rewardmodel.exports.kaggle import ACCELERATORS
from rewardmodel.exports.kaggle_checks import (
    BLACKWELL,
    GIB,
    OLDEST_GPU,
    REJECTED_BELOW,
    Gpu,
    check_gpus,
    check_packages,
    check_rejected,
    check_room,
    choose_wheels,
    find_rejected,
    fits,
    read_gpus,
    read_version,
    satisfies,
)

WANTED = {
    "accelerator": "GPU T4 x2",
    "weights": 5 * GIB,
    "python": ">=3.11",
    "pythons": ["3.12"],
    "requires": {"torch": ">=2.11"},
}
T4, P100 = Gpu("Tesla T4", (7, 5)), Gpu("Tesla P100-PCIE-16GB", (6, 0))
BLACKWELL_GPU = Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0))


@pytest.fixture
def versions(monkeypatch):
    """Return the versions of installed packages, which a test may fill; no others are installed."""
    found = {}
    monkeypatch.setattr(kaggle_checks, "_installed", found.get)
    return found


def test_two_t4s_compute_in_float16(versions, capsys):
    versions["torch"] = "2.11.0+cu128"
    assert check_gpus([T4, T4], WANTED) == []
    assert capsys.readouterr().out.splitlines()[1] == "GPU 1: Tesla T4, compute capability 7.5: float16"


def test_a_p100_is_refused_with_the_reason():
    (sentence,) = check_gpus([P100], WANTED)
    assert sentence == (
        "Tesla P100-PCIE-16GB has compute capability 6.0, and torch has no kernels below 7.5: "
        "choose Settings > Accelerator > GPU T4 x2"
    )


def test_blackwell_needs_a_build_that_has_it(versions, capsys):
    versions["torch"] = "2.11.0+cu128"
    assert check_gpus([BLACKWELL_GPU], WANTED) == []
    assert "bfloat16" in capsys.readouterr().out
    versions["torch"] = "2.11.0+cu126"
    (sentence,) = check_gpus([BLACKWELL_GPU], WANTED)
    assert "needs torch for CUDA 12.8, and this one is for cu126: choose Settings > Environment" in sentence


def test_a_large_model_needs_a_gpu_on_kaggle(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert check_gpus([], WANTED) == []
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert check_gpus([], WANTED | {"weights": GIB // 2}) == []
    (sentence,) = check_gpus([], WANTED)
    assert sentence == ("there is no GPU, and a model of 5.0 GiB needs one: choose Settings > Accelerator > GPU T4 x2")


def test_limits_are_those_of_the_planner_and_of_peft():
    import peft.import_utils

    from rewardmodel.planning.gpus import DEVICES, OLDEST

    assert OLDEST_GPU == OLDEST
    assert DEVICES["B200"].capability == BLACKWELL
    source = inspect.getsource(peft.import_utils)
    for name, version in REJECTED_BELOW.items():
        assert f'{name.upper()}_MINIMUM_VERSION = packaging.version.parse("{version}")' in source
    for machine in ACCELERATORS.values():
        assert DEVICES[machine.device].capability >= OLDEST_GPU


def test_gpus_are_read_from_nvidia_smi(monkeypatch):
    def answer(text, code=0):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, text, ""))
        return read_gpus()

    assert answer("Tesla T4, 7.5\nTesla T4, 7.5\n") == [T4, T4]
    assert answer("NVIDIA-SMI has failed", 9) == []
    assert answer("No devices were found\n") == []
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert read_gpus() == []


def here(python=f"{sys.version_info[0]}{sys.version_info[1]}"):
    return f"cp{python}-cp{python}-manylinux_2_17_{platform.machine()}.manylinux2014_{platform.machine()}"


WHEELS = {
    "a-1.0-py3-none-any.whl": True,
    "a-1.0-py2.py3-none-any.whl": True,
    f"a-1.0-{here()}.whl": True,
    f"a-1.0-1-{here()}.whl": True,
    f"a-1.0-cp39-abi3-manylinux_2_28_{platform.machine()}.whl": True,
    f"a-1.0-cp39-cp39-manylinux_2_28_{platform.machine()}.whl": False,
    f"a-1.0-{here('399')}.whl": False,
    f"a-1.0-cp399-abi3-manylinux2014_{platform.machine()}.whl": False,
    f"a-1.0-py3-none-manylinux_2_99_{platform.machine()}.whl": False,
    "a-1.0-py3-none-manylinux2014_s390x.whl": False,
    "a-1.0-py3-none-win_amd64.whl": False,
    "a-1.0-py3-none-macosx_11_0_arm64.whl": False,
}


@pytest.mark.parametrize("name", WHEELS)
def test_a_wheel_fits_as_packaging_says(name):
    assert fits(name) == WHEELS[name]
    assert WHEELS[name] == bool(parse_wheel_filename(name)[3] & set(sys_tags()))


def test_of_wheels_for_several_pythons_those_that_fit_are_chosen(tmp_path, versions):
    for name in (f"Py_YAML-6.0-{here()}.whl", f"Py_YAML-6.0-{here('399')}.whl", f"other-1.0-{here('399')}.whl"):
        (tmp_path / name).touch()
    chosen, unfit = choose_wheels(tmp_path)
    assert chosen == {"py-yaml": tmp_path / f"Py_YAML-6.0-{here()}.whl"}
    assert unfit == ["other"]
    assert choose_wheels(tmp_path / "nowhere") == ({}, [])
    versions["other"] = "0.9"
    assert choose_wheels(tmp_path)[1] == ["other"]
    versions["other"] = "1.0.1"
    assert choose_wheels(tmp_path)[1] == []


def test_wheels_in_folders_by_python_are_those_of_this_one(tmp_path, versions):
    this = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for folder in ("3.99", this):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pure-1.0-py3-none-any.whl").touch()
    assert choose_wheels(tmp_path, ["3.99", this]) == ({"pure": tmp_path / this / "pure-1.0-py3-none-any.whl"}, [])
    shutil.rmtree(tmp_path / this)
    assert choose_wheels(tmp_path, ["3.99", this]) == ({}, [])  # nothing is missing there
    assert choose_wheels(tmp_path, ["3.99"]) == ({}, ["pure"])


def test_a_python_that_is_too_old_is_one_sentence():
    (sentence,) = check_packages(WANTED | {"python": ">=3.99"}, {}, [])
    assert sentence.endswith(
        ", and the model needs >=3.99: choose Settings > Environment > Always use latest environment"
    )


def test_wheels_of_another_machine_are_one_sentence():
    (sentence,) = check_packages(WANTED, {}, ["bitsandbytes", "peft"])
    assert sentence.startswith(
        "the wheels of bitsandbytes, peft are for Python 3.12 on Linux, x86_64, and this is Pyth"
    )
    assert "choose another image in Settings > Environment" in sentence


def test_what_is_too_old_and_not_bundled_is_named(versions, tmp_path):
    versions["torch"] = "2.10.0+cu128"
    (sentence,) = check_packages(WANTED, {}, [])
    assert sentence == (
        "torch 2.10.0+cu128 (needs >=2.11), which belongs to the image: "
        "choose Settings > Environment > Always use latest environment"
    )
    versions["torch"] = "2.11.0"
    wanted = WANTED | {"requires": {"torch": ">=2.11", "transformers": ">=5.17,<6", "peft": ">=0.21"}}
    (sentence,) = check_packages(wanted, {"peft": tmp_path / "peft-0.21.0-py3-none-any.whl"}, [])
    assert "wheels: transformers is not installed (needs >=5.17,<6): choose " in sentence
    versions["transformers"] = "5.0.0"
    (sentence,) = check_packages(wanted, {}, [])
    assert "transformers 5.0.0 (needs >=5.17,<6), peft is not installed (needs >=0.21): choose " in sentence
    assert "export again with --installed" in sentence


def test_what_peft_rejects_is_removed_on_kaggle_and_named_elsewhere(versions, tmp_path, monkeypatch):
    versions["torchao"] = "0.10.0+cu128"
    rejected = find_rejected({})
    assert rejected == {"torchao": "0.10.0+cu128"}
    assert find_rejected({"torchao": tmp_path}) == {}  # replaced by a wheel
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    (sentence,) = check_rejected(rejected)
    assert sentence == "torchao 0.10.0+cu128 is installed, and PEFT rejects it below 0.16.0: run pip uninstall torchao"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert check_rejected(rejected) == []
    versions["torchao"] = "0.16.0"
    assert find_rejected({}) == {}


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=GIB // 2))
    monkeypatch.setattr(kaggle_checks, "_available_memory", lambda: None)
    (sentence,) = check_room(tmp_path / "submission.csv", [], 2)
    assert sentence.startswith(f"{tmp_path} has 0.5 GiB free, and 1.0 are needed: delete what is in /kaggle/working")
    wheel = tmp_path / "a.whl"
    wheel.touch()
    os.truncate(wheel, GIB)  # a hole: takes no space
    assert len(check_room(tmp_path / "submission.csv", [wheel], 2)) == 2


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_checks, "_available_memory", lambda: None)
    (sentence,) = check_room(tmp_path / "nowhere" / "submission.csv", [], 1)
    assert sentence.startswith(f"{tmp_path / 'nowhere'} cannot be written to")


def test_too_little_memory_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle_checks, "_available_memory", lambda: 4 * GIB)
    assert check_room(tmp_path / "submission.csv", [], 1) == []
    (sentence,) = check_room(tmp_path / "submission.csv", [], 2)
    assert sentence.startswith("4.0 GiB of memory are free, and 2 processes need about 6: choose Run")


@pytest.mark.parametrize(
    ("version", "specifier"),
    [(version, specifier) for version in ("2.11", "2.11.0+cu128", "2.9.1", "3.0", "2.11.4")
     for specifier in (">=2.11", ">2.11", "<=2.11", "<3", "==2.11", "!=2.11", ">=2.9,<3", "")],
)  # fmt: off
def test_versions_are_compared_as_packaging_does(version, specifier):
    if not (specifier == ">2.11" and "+" in version):  # packaging leaves local versions out of >
        assert satisfies(version, specifier) == SpecifierSet(specifier).contains(version)


def test_every_requirement_is_understood():
    for text in metadata.requires("rewardmodel"):
        satisfies("1.0", str(Requirement(text).specifier))
    with pytest.raises(ValueError, match="only"):
        satisfies("1.0", "~=1.0")
    assert read_version("nothing") == ()


def test_a_notebook_with_a_wheel_of_another_platform_stops_before_pip(tmp_path):
    wheel = tmp_path / "bundle" / "wheels" / "quick-1.0-cp312-cp312-win_amd64.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(b"w")
    made = make_bundle(tmp_path)
    make_competition(tmp_path / "input" / "c")
    shutil.copytree(made.folder, tmp_path / "input" / "b")
    with pytest.raises(SystemExit, match="the wheels of quick are for Python"):
        run_cells(made, tmp_path / "input", BACKBONE=str(made.backbone))
    assert list((tmp_path / "work").iterdir()) == []


def test_a_notebook_on_a_p100_stops_before_pip(tmp_path, monkeypatch):
    made = make_bundle(tmp_path)
    make_competition(tmp_path / "input" / "c")
    shutil.copytree(made.folder, tmp_path / "input" / "b")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho Tesla P100-PCIE-16GB, 6.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(SystemExit) as stopped:
        run_cells(made, tmp_path / "input", BACKBONE=str(made.backbone))
    assert [line.split()[0:2] for line in str(stopped.value).splitlines()] == [["Tesla", "P100-PCIE-16GB"]]


def test_the_checks_import_nothing_but_the_standard_library():
    for name in ("kaggle_checks", "kaggle_inputs"):
        source = Path(kaggle_checks.__file__).with_name(f"{name}.py").read_text()
        modules = {
            line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
        }
        assert modules <= sys.stdlib_module_names
