import subprocess
import sys
import zipfile
import zlib
from importlib import metadata

import pandas as pd
import pytest
from builders import battle_frame, write_csv
from packaging.version import Version

from rewardmodel.battles import OUTCOMES
from rewardmodel.config.schema import InferenceConfig, ModelConfig, Recipe
from rewardmodel.errors import InputError
from rewardmodel.exports.wheels import (
    BLENDING,
    QUANTISED,
    TRAINING_ONLY,
    download_wheels,
    find_machines,
    find_missing,
    keep_cuda,
    read_installed,
    read_python,
    unneeded_packages,
)
from rewardmodel.pipeline import run
from rewardmodel.predictions import read_predictions

IMAGE = """\
Python 3.13.15 (main, Aug  1 2026, 10:00:00) [GCC 13.3.0]
accelerate==1.14.0
anyio==4.14.2
certifi==2026.7.22
click==8.4.2
datasets==4.0.0
dill==0.3.8
filelock==3.32.3
fsspec==2025.3.0
h11==0.16.0
hf-xet==1.6.0
httpcore==1.0.9
httpcore2==2.10.0
httpx==0.28.1
httpx2==2.10.0
huggingface_hub==1.27.0
idna==3.18
Jinja2==3.1.6
MarkupSafe==3.0.3
matplotlib==3.10.0
multiprocess==0.70.16
numpy==2.1.3
nvidia-nccl-cu12==2.28.9
packaging==26.3
pandas==2.2.3
peft==0.20.0
protobuf==5.29.5
psutil==5.9.5
pyarrow==18.1.0
PyYAML==6.0.3
regex==2025.11.3
safetensors==0.8.0
scikit-learn==1.6.1
scipy==1.16.3
sentencepiece==0.2.2
shellingham==1.5.4
tokenizers==0.23.1
torch==2.11.0+cu128
torchao==0.10.0
tqdm==4.67.3
transformers==5.16.1
triton==3.6.0
truststore==0.10.4
typer==0.27.1
typing_extensions==4.16.0
xxhash==4.0.1
"""
"""Kaggle's image since October 2026, written by hand: its stated Python, torch and transformers, and of the others the
versions in the public list of the image that it builds on (github.com/googlecolab/backend-info, 19 August 2026)."""

PINNED_IMAGE = """\
Python 3.12.13 (main, May  1 2026, 10:00:00) [GCC 13.3.0]
accelerate==1.13.0
anyio==4.13.0
certifi==2026.5.20
click==8.4.1
datasets==4.0.0
dill==0.3.8
filelock==3.29.0
fsspec==2025.3.0
h11==0.16.0
hf-xet==1.5.0
httpcore==1.0.9
httpx==0.28.1
huggingface_hub==1.11.0
idna==3.18
Jinja2==3.1.6
MarkupSafe==3.0.3
matplotlib==3.10.0
multiprocess==0.70.16
numpy==2.0.2
nvidia-nccl-cu12==2.28.9
packaging==26.2
pandas==2.2.2
peft==0.19.1
protobuf==5.29.5
psutil==5.9.5
pyarrow==18.1.0
PyYAML==6.0.3
regex==2025.11.3
safetensors==0.7.0
scikit-learn==1.6.1
scipy==1.16.3
sentencepiece==0.2.1
shellingham==1.5.4
tokenizers==0.22.2
torch==2.10.0+cu128
torchao==0.10.0
tqdm==4.67.3
transformers==5.0.0
triton==3.6.0
typer==0.25.1
typing_extensions==4.15.0
xxhash==3.7.0
"""
"""The image before it, to which a notebook may stay pinned, written in the same way (lists of May 2026)."""

MOST_WHEELS, MOST_BYTES = 12, 60e6


@pytest.fixture
def images(tmp_path):
    """Return the files of both lists by version of Python."""
    for name, text in {"3.13": IMAGE, "3.12": PINNED_IMAGE}.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in ("3.13", "3.12")}


def missing_on(file, contents="adapter", **model):
    recipe = Recipe(model=ModelConfig(**model))
    unneeded = unneeded_packages(recipe, file.parent, contents)
    return find_missing(read_installed(file), read_python(file), unneeded)


def test_todays_image_lacks_nothing_but_bitsandbytes(images):
    assert missing_on(images["3.13"]) == {}
    assert missing_on(images["3.13"], load_in_4bit=True).keys() == {"bitsandbytes"}


def test_the_image_before_gets_transformers_and_what_that_needs(images):
    installed = read_installed(images["3.12"])
    missing = missing_on(images["3.12"], load_in_4bit=True)
    assert len(missing) <= MOST_WHEELS
    assert {"transformers", "bitsandbytes"} <= missing.keys()
    replaced = missing.keys() & installed.keys()
    assert replaced <= {"transformers", "tokenizers", "safetensors", "huggingface-hub", "hf-xet", "click"}


def deflated(package: str) -> int:
    """Return about the size of a wheel: that of its files here, compressed; of CUDA's libraries the one for 12.8."""
    files = [file for file in metadata.files(package) if "__pycache__" not in file.parts]
    kept = [file for file in files if ".so" not in file.suffixes or "_cuda" not in file.name or "_cuda128" in file.name]
    return sum(len(zlib.compress(file.locate().read_bytes())) for file in kept)


@pytest.mark.slow  # compresses 150 MB
def test_the_wheels_of_both_images_are_small(images):
    sizes = {
        name: deflated(name)
        for name in {**missing_on(images["3.13"], load_in_4bit=True), **missing_on(images["3.12"], load_in_4bit=True)}
    }
    assert sum(sizes.values()) + sizes["bitsandbytes"] <= MOST_BYTES  # both in one bundle


LIGHT = """
import sys
for name in filter(None, sys.argv[1].split(",")):
    sys.modules[name] = None  # import and find_spec behave as if it were not installed
from rewardmodel.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow  # two fresh processes
def test_a_prediction_imports_nothing_that_is_not_bundled_and_is_the_same_to_the_last_digit(recipe_of, tmp_path):
    folder, _ = run(recipe_of("light"))
    battles = write_csv(battle_frame(5, seed=3).drop(columns=list(OUTCOMES)), tmp_path / "test.csv")
    unneeded = {**TRAINING_ONLY, **BLENDING, **QUANTISED, "jsonargparse": "jsonargparse"}
    assert unneeded_packages(recipe_of("same"), folder / "model", "adapter") == unneeded.keys() - {"jsonargparse"}
    tables = []
    for blocked in ("", ",".join(unneeded.values())):
        output = tmp_path / f"{len(blocked)}.parquet"
        command = [sys.executable, "-c", LIGHT, blocked, "predict", folder, battles, "--output", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        tables.append(read_predictions(output))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize(
    ("contents", "model", "blend", "needed"),
    [
        ("adapter", {}, False, set()),
        ("adapter", {}, True, {"scikit-learn"}),
        ("adapter", {"load_in_4bit": True}, False, {"bitsandbytes"}),
        ("adapter", {"load_in_8bit": True}, False, {"bitsandbytes"}),
        ("merged", {"load_in_4bit": True}, False, set()),
        ("merged_4bit", {}, False, {"bitsandbytes"}),
    ],
)
def test_what_a_model_needs_depends_on_blend_and_quantisation(contents, model, blend, needed, tmp_path):
    recipe = Recipe(model=ModelConfig(**model), inference=InferenceConfig(blend=blend))
    unneeded = {*TRAINING_ONLY, *BLENDING, *QUANTISED}
    assert unneeded_packages(recipe, tmp_path, contents) == unneeded - needed


@pytest.mark.parametrize("stored", [True, False, None])
def test_an_adapter_on_weights_that_are_stored_quantised_needs_bitsandbytes(stored, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    if stored is not None:  # None: the weights are on another machine
        (tmp_path / "config.json").write_text('{"quantization_config": {}}' if stored else "{}")
    recipe = Recipe(model=ModelConfig(str(tmp_path)))
    assert ("bitsandbytes" in unneeded_packages(recipe, tmp_path, "adapter")) == (stored is False)


def installed_here() -> dict[str, Version]:
    """Return all packages of this environment, as a list of the other machine would have them."""
    return {one.name.lower().replace("_", "-"): Version(one.version) for one in metadata.distributions()}


def written(versions, path):
    path.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    return path


def test_lists_of_pip_are_read(tmp_path):
    (tmp_path / "list").write_text(
        "# a comment\nnumpy==2.4.6\nPyYAML==6.0.3\n-e git+https://x/y@1#egg=z\n"
        "torch @ file:///wheels/torch-2.11.0%2Bcu126-cp312-cp312-linux_x86_64.whl\n"
        "pandas @ file:///w/pandas-3.1.1-cp312-cp312-linux_x86_64.whl\njax==0.7.2+local\n"
    )
    found = read_installed(tmp_path / "list")
    assert found["numpy"] == Version("2.4.6")
    assert found["pyyaml"] == Version("6.0.3")
    assert found["pandas"] == Version("3.1.1")
    assert found["torch"] == Version("2.11.0+cu126")
    assert found["jax"] == Version("0.7.2+local")


@pytest.mark.parametrize("content", ["", "no versions here\n", None, b"\xff\xfe"])
def test_a_file_that_is_not_a_list_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="--installed"):
        read_installed(tmp_path / "list")


def test_the_version_of_python_is_in_the_first_line(images):
    assert find_machines([images["3.13"]]) == {"3.13": images["3.13"]}
    assert find_machines([images["3.12"], images["3.13"]]) == images
    assert "python" not in read_installed(images["3.13"])


def test_the_version_of_python_is_asked_for_where_no_list_says_it(tmp_path):
    plain = written({"numpy": "2.0"}, tmp_path / "list")
    with pytest.raises(InputError, match=r"--python: .*list does not begin .*\(python -VV; pip freeze\)"):
        find_machines([plain])
    assert find_machines([plain], ["3.11"]) == {"3.11": plain}
    assert find_machines([plain], ["3.12", "3.13"]) == {"3.12": plain, "3.13": plain}
    assert find_machines([plain, tmp_path / "list"], ["3.12", "3.13"]).keys() == {"3.12", "3.13"}


@pytest.mark.parametrize(
    ("lists", "pythons", "message"),
    [
        (["3.13"], ["3.12"], "3.12, but .* is of Python 3.13"),
        (["3.13", "3.12"], ["3.12", "3.13"], "is of Python"),
        (["3.13", "3.12"], ["3.13"], "1 versions for 2 lists"),
        (["3.13", "3.13"], [], "the same version twice"),
        *(([], [python], "rewardmodel needs") for python in ("2.7", "3.9", "three", "3.12.1")),
    ],
)
def test_versions_that_contradict_the_lists_are_refused(lists, pythons, message, images, tmp_path):
    plain = written({"numpy": "2.0"}, tmp_path / "list")
    with pytest.raises(InputError, match=f"--python: .*{message}"):
        find_machines([images[name] for name in lists] or [plain], pythons)


def test_where_all_is_there_nothing_is_missing():
    assert find_missing(installed_here(), "3.12") == {}


def test_what_is_absent_or_too_old_is_taken_at_this_machines_version():
    there = installed_here()
    there["peft"] = Version("0.10")
    del there["filelock"]
    assert find_missing(there, "3.12") == {name: metadata.version(name) for name in ("peft", "filelock")}
    assert find_missing(there, "3.12", {"peft"}).keys() == {"filelock"}


def test_what_a_missing_package_needs_is_missing_too():
    there = installed_here()
    for name in ("datasets", "multiprocess", "dill"):
        del there[name]
    assert find_missing(there, "3.12").keys() == {"datasets", "multiprocess", "dill"}


def test_what_an_extra_needs_is_looked_for(monkeypatch):
    requires = {"rewardmodel": ["peft[more]"], "peft": ["dill; extra == 'more'", "numpy; extra == 'other'"]}
    monkeypatch.setattr(metadata, "requires", requires.get)
    assert find_missing({"peft": Version("1.0")}, "3.12").keys() == {"dill"}


@pytest.mark.parametrize(("name", "version"), [("torch", "2.6.0+cu124"), ("numpy", "1.26.4"), ("torch", None)])
def test_what_other_packages_are_built_for_is_refused_not_bundled(name, version):
    there = {**installed_here(), name: Version(version or "0")}
    if version is None:
        del there[name]
    has = f"{name} {version}".replace(".", r"\.").replace("+", r"\+") if version else f"no {name}"
    with pytest.raises(InputError, match=rf"has {has}, but \w+ needs {name}>=.*newer image"):
        find_missing(there, "3.12")


def tiny_wheel(name: str, version: str, folder, tag="py3-none-any"):
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{about}/RECORD", "")


def test_missing_wheels_are_downloaded_for_each_python(images, tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    tiny_wheel("filelock", metadata.version("filelock"), tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip's setting for: do not use the network
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    there = installed_here()
    whole = written(there, tmp_path / "whole")
    del there["filelock"]
    download_wheels({"3.12": written(there, tmp_path / "list"), "3.13": whole}, (), tmp_path / "wheels")
    found = sorted(path.relative_to(tmp_path / "wheels").as_posix() for path in (tmp_path / "wheels").glob("*/*"))
    wheel = f"filelock-{metadata.version('filelock')}-py3-none-any.whl"
    assert found == [f"3.12/{wheel}", "3.12/requirements.txt", "3.13/requirements.txt"]
    assert (
        (tmp_path / "wheels/3.12/requirements.txt").read_text().endswith(f"filelock=={metadata.version('filelock')}\n")
    )
    del there["peft"]
    with pytest.raises(InputError, match="pip cannot download"):
        download_wheels({"3.12": written(there, tmp_path / "list")}, (), tmp_path / "again")


BUILDS = ("manylinux_2_28_x86_64", "musllinux_1_2_x86_64", "manylinux_2_17_aarch64", "macosx_11_0_arm64", "win_amd64")


def test_of_many_builds_the_one_for_each_python_on_linux_is_downloaded(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    versions = {name: metadata.version(name) for name in ("pyyaml", "filelock")}
    for build in (*BUILDS, "manylinux_2_39_x86_64"):  # the last is for a glibc that Kaggle does not have
        for python in ("cp311-cp311", "cp312-cp312", "cp313-cp313", "cp313-cp313t"):
            tiny_wheel("pyyaml", versions["pyyaml"], tmp_path / "index", f"{python}-{build}")
        tiny_wheel("filelock", versions["filelock"], tmp_path / "index", f"cp38-abi3-{build}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    there = {name: version for name, version in installed_here().items() if name not in versions}
    lists = {python: written(there, tmp_path / python) for python in ("3.12", "3.13")}
    download_wheels(lists, (), tmp_path / "wheels")
    for python, tag in (("3.12", "cp312-cp312"), ("3.13", "cp313-cp313")):
        assert {path.name for path in (tmp_path / "wheels" / python).glob("*.whl")} == {
            f"pyyaml-{versions['pyyaml']}-{tag}-{BUILDS[0]}.whl",
            f"filelock-{versions['filelock']}-cp38-abi3-{BUILDS[0]}.whl",
        }


def test_of_bitsandbytes_only_the_libraries_for_that_cuda_are_kept(tmp_path):
    libraries = ["cpu", "cuda118", "cuda128", "cuda130", "rocm72", "xpu2025"]
    names = ["bitsandbytes/nn.py", *(f"bitsandbytes/libbitsandbytes_{name}.so" for name in libraries)]
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr("bitsandbytes-1.0.dist-info/RECORD", "".join(f"{name},sha256=x,1\n" for name in names))
    before = wheel.read_bytes()
    keep_cuda(wheel, "126")
    assert wheel.read_bytes() == before
    keep_cuda(wheel, "128")
    kept = ["bitsandbytes/nn.py", *(f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda128"))]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [*kept, "bitsandbytes-1.0.dist-info/RECORD"]
        assert archive.read(kept[2]).decode() == kept[2]
        record = archive.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    assert record == "".join(f"{name},sha256=x,1\n" for name in kept)
