import csv
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from packaging.version import Version

from rewardmodel.errors import InputError
from rewardmodel.exports.kaggle import check_installed, collect, missing, own_wheel, read_installed


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
def test_a_list_that_is_none_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="--installed"):
        read_installed(tmp_path / "list")


def test_where_all_is_there_nothing_is_missing():
    assert missing(installed_here(), "3.12") == {}


def test_what_is_absent_or_too_old_is_taken_at_this_machines_version():
    there = installed_here()
    there["peft"] = Version("0.10")
    del there["jsonargparse"]
    assert missing(there, "3.12") == {
        "peft": metadata.version("peft"),
        "jsonargparse": metadata.version("jsonargparse"),
    }


def test_what_a_missing_package_needs_is_missing_too():
    there = installed_here()
    for name in ("datasets", "multiprocess", "dill"):
        del there[name]
    assert missing(there, "3.12").keys() == {"datasets", "multiprocess", "dill"}


def test_what_an_extra_needs_is_looked_for():
    there = installed_here()
    del there["docstring-parser"]  # of jsonargparse[signatures]
    assert missing(there, "3.12").keys() == {"docstring-parser"}


def test_torch_that_is_too_old_is_refused_not_bundled(tmp_path):
    there = {**installed_here(), "torch": Version("2.6.0+cu124")}
    with pytest.raises(InputError, match=r"torch 2\.6\.0\+cu124, but \w+ needs .*newer image"):
        check_installed(written(there, tmp_path / "list"), "3.12")


@pytest.mark.parametrize("python", ["2.7", "3.9", "three", "3.12.1"])
def test_a_python_that_rewardmodel_does_not_run_on_is_refused(python, tmp_path):
    with pytest.raises(InputError, match="--python"):
        check_installed(written(installed_here(), tmp_path / "list"), python)


def test_the_own_wheel_installs_and_runs(tmp_path):
    wheel = own_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = [row[0] for row in csv.reader(archive.read(names[-1]).decode().splitlines())]
    assert record == names
    assert {"rewardmodel/cli.py", "rewardmodel/data/sample/train.csv", "rewardmodel/evaluation/page.html.jinja"} <= set(
        names
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    code = "import rewardmodel, sys; from rewardmodel.cli import main; print(rewardmodel.__file__); main(['--help'])"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path / "site") in said.stdout
    assert "usage: rewardmodel" in said.stdout


def tiny_wheel(name: str, version: str, folder):
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_missing_wheels_are_downloaded_for_the_other_machine(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    tiny_wheel("jsonargparse", metadata.version("jsonargparse"), tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip's own words for: ask no network
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    there = installed_here()
    del there["jsonargparse"]
    collect(written(there, tmp_path / "list"), "3.12", tmp_path / "wheels")
    assert {file.name.split("-")[0] for file in (tmp_path / "wheels").iterdir()} == {"rewardmodel", "jsonargparse"}
    del there["peft"]
    with pytest.raises(InputError, match="pip cannot download"):
        collect(written(there, tmp_path / "list"), "3.12", tmp_path / "again")
