import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from builders import battle_frame, write_csv
from safetensors.torch import load_file, save_file

import rewardmodel
from rewardmodel.battles import OUTCOMES
from rewardmodel.cli import main
from rewardmodel.commands import VERBS
from rewardmodel.config.json_schema import recipe_schema
from rewardmodel.config.loader import dump_recipe, load_recipe
from rewardmodel.config.schema import DataConfig, ModelConfig, ObjectiveConfig, PromptConfig, Recipe
from rewardmodel.inference import predict as inference
from rewardmodel.inference.predict import predict
from rewardmodel.predictions import predicted, read_predictions
from rewardmodel.run_folder import RunFolder


@pytest.fixture(autouse=True, scope="module")
def logging_as_before():
    """Undo what main() does to the package's logger: its handler writes to a stream that pytest closes."""
    ours = logging.getLogger("rewardmodel")
    before = ours.level, ours.handlers, ours.propagate
    yield
    ours.level, ours.handlers, ours.propagate = before
    ours.setLevel(before[0])


@pytest.fixture
def recipe_file(recipe, tmp_path):
    """Return a function that writes the tiny recipe, changed, and returns the path as text."""

    def write(text=None, **sections):
        changed = dataclasses.replace(
            recipe, **{name: dataclasses.replace(getattr(recipe, name), **keys) for name, keys in sections.items()}
        )
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(changed) if text is None else text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a command, checks that it was refused as it should be, and returns the reason."""

    def run(*arguments):
        capsys.readouterr()  # what fixtures said
        code = main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert code == 2
        assert output.out == ""
        *before, last = output.err.splitlines()
        assert all(line.startswith("reading ") for line in before), output.err
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def finished_run(backbone, tmp_path_factory):
    """Return the folder of a run that `rewardmodel run` made, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    test = battle_frame(3, seed=1).drop(columns=list(OUTCOMES))
    recipe = Recipe(
        data=DataConfig(
            train=str(write_csv(battle_frame(), folder / "train.csv")),
            test=str(write_csv(test, folder / "test.csv")),
            folds=4,
        ),
        prompt=PromptConfig(max_length=160),
        model=ModelConfig(model_name_or_path=str(backbone("llama")), device="cpu", dtype="float32", lora_r=4),
        trainer={"output_dir": str(folder / "run"), "disable_tqdm": True, "learning_rate": 0.1},
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["run", str(folder / "recipe.yaml")]) == 0
    return folder / "run", printed.getvalue()


@pytest.fixture(scope="module")
def run_folder(finished_run):
    """Return the folder of a run."""
    return finished_run[0]


@pytest.fixture
def test_file(tmp_path):
    return write_csv(battle_frame(3, seed=1).drop(columns=list(OUTCOMES)), tmp_path / "test.csv")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for name, command in VERBS.items():
        assert re.search(rf"^    {name}\s", output.out, re.MULTILINE)
        assert command.__doc__ in " ".join(output.out.split())
    assert "register-python-argcomplete rewardmodel" in output.out


@pytest.mark.parametrize("command", [["recipes"], ["schema"], ["run", "quickstart", "--print-config"]])
def test_a_reader_that_has_gone_is_no_error(command, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(command) == 141
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def fail(options):
        raise BrokenPipeError(32, "Broken pipe", "socket")

    monkeypatch.setitem(VERBS, "recipes", fail)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 32] Broken pipe: 'socket'")


def test_listing_the_commands_imports_nothing_heavy():
    code = (
        "import sys; from rewardmodel.cli import main; assert main(['--help']) == 0;"
        "print({'torch', 'transformers', 'trl', 'datasets', 'pandas', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert "evaluate" in done.stdout


@pytest.mark.parametrize("module", ["rewardmodel", "rewardmodel.cli"])
def test_the_package_is_a_program(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"rewardmodel {rewardmodel.__version__}\n"


def test_the_version_is_that_of_the_package_alone():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "rewardmodel.__version__"}


def test_public_names_are_functions_and_types_of_their_modules():
    for name in rewardmodel.__all__:
        assert getattr(rewardmodel, name).__module__ == f"rewardmodel.{rewardmodel._HOMES[name]}"
        assert getattr(rewardmodel, name).__doc__


def test_the_schema_of_a_recipe_is_printed_as_json(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()


def completions(line, cwd):
    """Return what tab completion proposes after a line, as bash would ask for it."""
    file = cwd / "completions"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(file), "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    code = "import sys; sys.argv[0] = 'rewardmodel'; from rewardmodel.cli import main; sys.exit(main())"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **path, **asked}, cwd=cwd, check=True)
    return set(file.read_text().split())


def test_commands_options_keys_values_and_recipes_are_completed(tmp_path):
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.csv").touch()
    assert completions("rewardmodel pre", tmp_path) == {"prepare", "predict"}
    assert completions("rewardmodel run mi", tmp_path) == {"mine.yaml", "minilm_l6"}
    assert completions("rewardmodel run mine.yaml --o", tmp_path) == {"--overwrite", "--objective.name"} | {
        f"--objective.{key}" for key in ObjectiveConfig.__dataclass_fields__
    }
    assert completions("rewardmodel train mine.yaml --trainer.learning", tmp_path) == {"--trainer.learning_rate"}
    assert completions("rewardmodel train mine.yaml --model.dtype f", tmp_path) == {"float16", "float32"}
    assert completions("rewardmodel predict mine.csv --model.d", tmp_path) == {"--model.device", "--model.dtype"}


@pytest.mark.parametrize("name", VERBS)
def test_help_is_a_command_too(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["help", name])
    assert caught.value.code == 0
    assert f"usage: rewardmodel {name} " in capsys.readouterr().out


def test_help_alone_lists_the_commands_and_of_an_unknown_one_names_the_nearest(capsys, refusal):
    assert main(["help"]) == 0
    assert "usage: rewardmodel [-h]" in capsys.readouterr().out
    assert "no command 'trian' (did you mean 'train'?)" in refusal("help", "trian")


def test_the_recipes_of_the_package_are_listed_and_taken_by_name(capsys):
    assert main(["recipes"]) == 0
    assert "\nquickstart " in capsys.readouterr().out
    assert main(["run", "quickstart", "--print-config"]) == 0
    assert "output_dir: runs/quickstart\n" in capsys.readouterr().out


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_leaves_results_and_warnings_only(place, tmp_path, capsys):
    path = write_csv(battle_frame().drop(columns="id").assign(note="x"), tmp_path / "train.csv")
    command = ["baseline", str(path)]
    loud = {word: [word, *command] if place == "before" else [*command, word] for word in ("-q", "-v")}
    assert main(command) == 0
    plain = capsys.readouterr()
    assert "no column 'id': battles are numbered" in plain.err
    assert main(loud["-q"]) == 0
    assert capsys.readouterr() == (plain.out, "")
    assert logging.getLogger("rewardmodel").level == logging.WARNING
    assert main(loud["-v"]) == 0
    assert re.search(r"^20..-.* rewardmodel\.data\.\w+: .*no column 'id'", capsys.readouterr().err, re.MULTILINE)


def test_verbose_prints_where_an_error_comes_from(capsys):
    assert main(["baseline", "nowhere.csv", "-v"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: nowhere.csv: no such file")


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["predict", "run", "b.csv", "--outptu", "x.csv", "--output", "x.csv"], "--output"),
        (["predict", "run", "b.csv", "--outptu", "x.csv"], "--output"),
        (["parity", "run", "--ulr=x"], "--url"),
        (["prepare", "r.yaml", "--ouput", "x", "--data.fold", "1"], "--output"),
        (["export", "run", "--output", "x", "--knd=merged"], "--kind"),
        (["baseline", "sample", "--fold", "3"], "--folds"),
    ],
)
def test_an_unknown_option_names_the_nearest(arguments, near, refusal):
    assert f" (did you mean '{near}'?); see rewardmodel {arguments[0]} --help" in refusal(*arguments)


def test_an_unknown_command_names_those_there_are(refusal):
    message = refusal("trian", "recipe.yaml")
    assert "no command 'trian' (did you mean 'train'?)" in message
    assert all(name in message for name in VERBS)


@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("recipes", "schema")])
def test_a_command_without_its_arguments_shows_its_usage(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name])
    assert caught.value.code == 2
    assert f"usage: rewardmodel {name} " in capsys.readouterr().err


@pytest.mark.parametrize("name", VERBS)
def test_a_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: rewardmodel {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "train"])
def test_the_help_of_a_recipe_command_names_every_key_with_its_text(name, recipe, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    words = capsys.readouterr().out
    for section, keys in yaml.safe_load(dump_recipe(recipe)).items():
        for key in keys:
            assert f"--{section}.{key} " in words.replace("\n", " "), key
    assert "The fold that is held out for validation" in " ".join(words.split())


def no_json(frame):
    frame.loc[2, "prompt"] = "plain text"
    return frame


def more_turns(frame):
    frame.loc[4, "response_b"] = json.dumps(["one", "two"])
    return frame


def repeated_id(frame):
    frame.loc[3, "id"] = frame.loc[1, "id"]
    return frame


def two_winners(frame):
    frame.loc[5, list(OUTCOMES)] = [1, 1, 0]
    return frame


def half_labelled(frame):
    return frame.astype(dict.fromkeys(OUTCOMES, object)).assign(winner_tie=["", *frame["winner_tie"][1:]])


BAD_BATTLES = {
    "missing column": (lambda f: f.drop(columns="response_b"), ["column 'response_b' is missing"]),
    "misspelt column": (
        lambda f: f.rename(columns={"response_b": "respones_b"}),
        ["column 'response_b' is missing", "is it 'respones_b'?"],
    ),
    "missing outcome": (lambda f: f.drop(columns="winner_tie"), ["column 'winner_tie' is missing"]),
    "no rows": (lambda f: f.head(0), ["no battles"]),
    "no JSON list": (no_json, ["row 3, column 'prompt'", "'plain text' is not a JSON list"]),
    "turns": (more_turns, ["row 5, column 'response_b'", "2 turns, but the prompt has 1"]),
    "duplicate ids": (repeated_id, ["row 4, column 'id'", "already used in row 2"]),
    "two winners": (two_winners, ["row 6, columns winner_model_a, winner_model_b, winner_tie", "1, 1, 0"]),
    "half labelled": (
        half_labelled,
        ["row 1, column 'winner_tie'", "missing, NaN or infinite; label every battle of a file, or none"],
    ),
    "too few prompts": (lambda f: f.head(8), ["data.folds: 4 parts need as many different prompts"]),
    "unlabelled": (lambda f: f.drop(columns=list(OUTCOMES)), ["data.train: ", "has no outcomes"]),
}
"""What may be wrong with a file of battles: how to make it so, and what the message must say."""

NAMED_BY_KEY = ("too few prompts", "unlabelled")
"""Faults of the whole file, for which the key of the recipe is named in the place of the path."""


@pytest.mark.parametrize("fault", BAD_BATTLES)
@pytest.mark.parametrize("command", ["run", "train"])
def test_battles_that_cannot_be_used_are_refused_by_file_row_and_column(
    command, fault, refusal, recipe_file, recipe, frame
):
    spoil, expected = BAD_BATTLES[fault]
    write_csv(spoil(frame), recipe.data.train)
    message = refusal(command, recipe_file())
    for part in expected:
        assert part in message
    assert fault in NAMED_BY_KEY or message.startswith(f"{recipe.data.train}: ")
    assert not recipe.run_folder.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"id,prompt,response_a,response_b\n1,caf\xe9,a,b\n", "byte 0xe9 is not UTF-8"),
        (b'id,prompt,response_a,response_b\n1,"a,b\n', "check the quotes"),
        (b"id,prompt,response_a,response_b\n1,a,b,c,d\n", "row 1 (line 2): 5 fields, but the header has 4"),
    ],
    ids=["empty", "not UTF-8", "open quote", "more fields"],
)
@pytest.mark.parametrize("key", ["train", "test"])
def test_a_file_that_is_no_csv_is_refused(key, content, expected, refusal, recipe_file, recipe, tmp_path):
    (tmp_path / "bad.csv").write_bytes(content)
    message = refusal("run", recipe_file(data={key: str(tmp_path / "bad.csv")}))
    assert message.startswith(f"{tmp_path / 'bad.csv'}: ")
    assert expected in message
    assert not recipe.run_folder.exists()


BAD_SETTINGS = {
    "unknown backbone": ({"model": {"model_name_or_path": "smollm2"}}, ["no backbone 'smollm2'", "smollm2-135m"]),
    "hub without network": ({"model": {"model_name_or_path": "nobody/nothing"}}, ["'nobody/nothing'", "connect"]),
    "float16": ({"model": {"dtype": "float16"}}, ["model.dtype: ", "use bfloat16, float32 or auto"]),
    "objective": ({"objective": {"name": "crossentropy"}}, ["objective.name: ", "did you mean 'cross_entropy'?"]),
    "fold": ({"data": {"fold": 4}}, ["data.fold: 4", "0 to 3"]),
    "no such file": ({"data": {"train": "nowhere.csv"}}, ["nowhere.csv: no such file"]),
}


@pytest.mark.parametrize("fault", BAD_SETTINGS)
def test_settings_that_cannot_work_are_refused_by_key(fault, refusal, recipe_file, recipe):
    sections, expected = BAD_SETTINGS[fault]
    message = refusal("run", recipe_file(**sections))
    for part in expected:
        assert part in message
    assert not recipe.run_folder.exists()


LATE_SETTINGS = {
    "template": {"prompt": {"template": "instructions"}},
    "max_length": {"prompt": {"max_length": 20}},
    "attention": {"model": {"attn_implementation": "nonsense"}},
    "both quantisations": {"model": {"load_in_4bit": True, "load_in_8bit": True}},
    "lora_first_layer": {"model": {"lora_first_layer": 9}},
}
"""What only the backbone and its tokenizer can refuse."""


@pytest.mark.parametrize("fault", LATE_SETTINGS)
def test_settings_that_the_model_refuses_exit_with_their_key_and_write_nothing(fault, recipe_file, recipe, capsys):
    assert main(["train", recipe_file(**LATE_SETTINGS[fault])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    for section, keys in LATE_SETTINGS[fault].items():
        assert section in error
        assert any(key in error for key in keys)
    assert not recipe.run_folder.exists()
    model = RunFolder(recipe.run_folder).model
    model.mkdir(parents=True)
    RunFolder(recipe.run_folder).recipe.write_text(dump_recipe(recipe))
    assert main(["train", recipe_file(**LATE_SETTINGS[fault]), "--overwrite"]) == 2
    assert model.is_dir(), "the run that was to be overwritten is gone"


def test_keys_that_transformers_refuses_together_are_refused(refusal, recipe_file, recipe):
    message = refusal("train", recipe_file(), "--trainer.save_strategy", "steps")
    assert message.startswith("trainer: ")
    assert "save and eval strategy" in message
    assert not recipe.run_folder.exists()


@pytest.mark.parametrize(("key", "value"), [("model.lora_r", "0"), ("model.lora_target_modules", "[none]")])
def test_settings_that_peft_refuses_exit_with_their_key(key, value, recipe_file, capsys):
    assert main(["train", recipe_file(), f"--{key}", value]) == 2
    assert key.partition(".")[2] in capsys.readouterr().err.splitlines()[-1]


def test_early_stopping_without_evaluation_is_refused(recipe_file, capsys):
    overrides = ["--trainer.early_stopping_patience", "2", "--trainer.eval_strategy", "no"]
    assert main(["train", recipe_file(), *overrides]) == 2
    assert "early_stopping_patience" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused(refusal, recipe_file, recipe):
    message = refusal("run", recipe_file(), "--model.device", "cuda")
    assert message.startswith("model.device: ")
    assert "--model.device cpu or auto" in message
    assert not recipe.run_folder.exists()


@pytest.mark.slow  # seconds a case
@pytest.mark.parametrize("command", ["run", "train"])
def test_a_run_that_is_there_is_left_alone(command, refusal, recipe_file, run_folder):
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    message = refusal(command, recipe_file(), "--trainer.output_dir", run_folder)
    assert message.startswith(f"trainer.output_dir: {run_folder} already holds a run")
    assert "--resume" in message
    assert "--overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt:\n  maxlength: 300\n", ["unknown key 'prompt.maxlength'", "did you mean 'prompt.max_length'?"]),
        ("trainer:\n  learning_rat: 1\n", ["unknown key 'trainer.learning_rat'", "'trainer.learning_rate'?"]),
        ("promt:\n  max_length: 300\n", ["unknown key 'promt.max_length'", "did you mean 'prompt.max_length'?"]),
        ("prompt:\n  max_length: long\n", ["prompt.max_length", "a whole number", "long"]),
        ("data:\n  swap_augmentation: maybe\n", ["data.swap_augmentation", "maybe"]),
        ("trainer:\n  learning_rate: fast\n", ["trainer.learning_rate", "a number", "fast"]),
        ("trainer:\n  bf16: true\n", ["trainer.bf16 is not accepted: set model.dtype"]),
        ("data: [1, 2\nmodel: {\n", ["not YAML", "line 2"]),
        ("- a\n- list\n", ["one mapping per section"]),
        ("data: train.csv\n", ["one mapping per section"]),
    ],
    ids=[
        *("unknown key", "unknown trainer key", "unknown section", "no number", "no choice", "no float"),
        *("decided elsewhere", "not YAML", "list", "no mapping"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused_by_file_and_key(text, expected, refusal, recipe_file):
    path = recipe_file(text)
    message = refusal("run", path, "--print-config")
    assert message.startswith(f"{path}: ")
    for part in expected:
        assert part in message


def test_a_recipe_that_is_not_there_is_refused(refusal, tmp_path):
    path = tmp_path / "nowhere.yaml"
    assert refusal("run", path).startswith(f"{path}: no such file, and no recipe of that name")
    assert refusal("run", tmp_path).startswith(f"{tmp_path}: cannot read a recipe there")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (["--prompt.maxlength", "300"], "did you mean 'prompt.max_length'?"),
        (["--prompt.max_length", "long"], "prompt.max_length"),
        (["--prompt.max_length=1.5"], "prompt.max_length"),
        (["--overwrit"], "unknown option --overwrit (did you mean '--overwrite'?)"),
        (["--model.lora_init=pissa"], "model.lora_init does not exist any more"),
        (["stray"], "stray"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(override, expected, refusal, recipe_file, recipe):
    assert expected in refusal("run", recipe_file(), *override)
    assert not recipe.run_folder.exists()


def test_the_recipe_comes_before_its_keys(refusal, recipe_file):
    message = refusal("run", "--data.fold", "1", recipe_file())
    assert "the recipe comes before its keys" in message


def test_print_config_prints_the_recipe_and_writes_nothing(recipe_file, recipe, tmp_path, capsys):
    assert main(["run", recipe_file(), "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(printed) == recipe
    assert not recipe.run_folder.exists()


def test_print_config_prints_overrides_of_every_type(recipe_file, tmp_path, capsys):
    overrides = [
        *("--trainer.learning_rate", "3e-5", "--trainer.num_train_epochs=2", "--data.fold", "1"),
        *("--model.load_in_4bit", "true", "--model.lora_target_modules", "[q_proj,v_proj]", "--data.limit", "null"),
        *("--data.test", "sample", "--trainer.lr_scheduler_type", "linear"),
    ]
    assert main(["run", recipe_file(), "--print-config", *overrides]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    recipe = load_recipe(printed)
    assert recipe == load_recipe(recipe_file(), overrides)
    assert (recipe.trainer["learning_rate"], recipe.trainer["num_train_epochs"]) == (3e-5, 2)
    assert (recipe.data.fold, recipe.data.test, recipe.data.limit) == (1, "sample", None)
    assert (recipe.model.load_in_4bit, recipe.model.lora_target_modules) == (True, ["q_proj", "v_proj"])
    assert recipe.trainer["lr_scheduler_type"] == "linear"


def test_run_ends_with_the_metrics_the_folder_and_the_submission(finished_run):
    folder, printed = finished_run
    lines = printed.splitlines()
    assert any(line.startswith("held-out prompts: 12 battles of 3 prompts") for line in lines)
    assert lines[-2:] == [str(folder / "report.html"), str(RunFolder(folder).submission)]
    assert RunFolder(folder).submission.is_file()


def test_train_ends_with_the_folder(recipe_file, recipe, capsys):
    assert main(["train", recipe_file(), "--trainer.max_steps", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(recipe.run_folder)
    assert RunFolder(recipe.run_folder).model.is_dir()


def test_predict_writes_a_table_as_parquet_and_a_submission_as_csv(run_folder, test_file, tmp_path, capsys):
    expected = predict(run_folder, test_file)
    for name in ("x.parquet", "x.csv"):
        assert main(["predict", str(run_folder), str(test_file), "--output", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"12 battles: {tmp_path / name}"
    pd.testing.assert_frame_equal(read_predictions(tmp_path / "x.parquet"), expected)
    submission = pd.read_csv(tmp_path / "x.csv", dtype={"id": str})
    assert list(submission) == ["id", *OUTCOMES]
    assert submission["id"].tolist() == expected["id"].tolist()
    assert submission[list(OUTCOMES)].to_numpy() == pytest.approx(predicted(expected), rel=1e-12)


def test_predict_keeps_to_a_time_limit_and_leaves_nothing_but_its_output(run_folder, test_file, tmp_path, capsys):
    output = tmp_path / "out" / "x.parquet"
    assert main(["predict", str(run_folder), str(test_file), "--output", str(output), "--time-limit", "0"]) == 0
    assert "time is up: 0 of 12 battles were predicted in both orders, all in one" in capsys.readouterr().err
    assert read_predictions(output)["ba_p_tie"].isna().all()
    assert list(output.parent.iterdir()) == [output]


def test_predict_takes_keys_of_the_inference_section_for_this_time(run_folder, test_file, tmp_path):
    before = RunFolder(run_folder).recipe.read_bytes()
    output = tmp_path / "x.parquet"
    override = ["--inference.swap_tta", "none"]
    assert main(["predict", str(run_folder), str(test_file), "--output", str(output), *override]) == 0
    assert "ba_p_tie" not in read_predictions(output)
    assert RunFolder(run_folder).recipe.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "BATTLES", "--output", "x.json"], "neither .parquet nor .csv"),
        (["RUN", "nowhere.csv", "--output", "x.csv"], "nowhere.csv: no such file"),
        (["nowhere", "BATTLES", "--output", "x.csv"], "nowhere: no recipe.yaml there"),
        (["RUN", "BATTLES", "--output", "x.csv", "--prompt.max_length", "300"], "unknown option --prompt.max_length"),
        (["RUN", "BATTLES", "--output", "x.csv", "--inference.swap_tt", "none"], "did you mean 'inference.swap_tta'?"),
        (["RUN", "BATTLES", "--output", "x.csv", "--inference.swap_tta", "twice"], "inference.swap_tta"),
        (["RUN", "BATTLES", "--output", "x.csv", "--time-limit", "soon"], "--time-limit: soon: not all are numbers"),
        (["RUN", "BATTLES", "--output", "x.csv", "--time-limit", "-1"], "time limit: -1; give seconds, from 0"),
        (["RUN", "BATTLES", "--output", "x.csv", "--time-limit", "nan"], "time limit: nan; give seconds, from 0"),
        (["RUN", "BATTLES", "--output", "x.csv", "--inference.tie_if_same", "2"], "inference.tie_if_same: 2; give a"),
    ],
)
def test_predict_refuses_what_it_cannot_use(arguments, expected, refusal, run_folder, test_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run_folder, "BATTLES": test_file}
    before = sorted(tmp_path.iterdir())
    assert expected in refusal("predict", *(places.get(word, word) for word in arguments))
    assert sorted(tmp_path.iterdir()) == before


def test_predict_compares_the_ids_with_a_sample_submission(run_folder, test_file, tmp_path, capsys, monkeypatch):
    output, sample = tmp_path / "x.csv", tmp_path / "sample.csv"
    arguments = [
        "predict",
        str(run_folder),
        str(test_file),
        "--output",
        str(output),
        "--sample-submission",
        str(sample),
    ]
    ids = pd.read_csv(test_file, dtype={"id": str})["id"]
    rows = pd.DataFrame({"id": ids, **dict.fromkeys(OUTCOMES, 0.3)})
    write_csv(rows.head(11), sample)
    with monkeypatch.context() as patch:
        patch.setattr(inference, "predict", lambda *_: pytest.fail("predicted before the ids were compared"))
        assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {sample}: id '{ids[11]}' is missing, but is to be predicted")
    assert not output.exists()
    write_csv(rows, sample)
    assert main(arguments) == 0
    assert output.is_file()


def test_predict_refuses_a_sample_submission_for_a_table(refusal, run_folder, test_file, tmp_path):
    output, sample = tmp_path / "x.parquet", tmp_path / "sample.csv"
    message = refusal("predict", run_folder, test_file, "--output", output, "--sample-submission", sample)
    assert message.startswith(f"--sample-submission: {output} is not a submission")
    assert not output.exists()


def test_a_sample_submission_without_a_test_file_is_refused(refusal, recipe_file, recipe, tmp_path):
    message = refusal("run", recipe_file(data={"sample_submission": str(tmp_path / "sample.csv")}))
    assert message.startswith("data.sample_submission: there is no data.test to submit")
    assert not recipe.run_folder.exists()


def test_predictions_that_are_no_numbers_exit_with_1_and_write_nothing(run_folder, test_file, tmp_path, capsys):
    broken = shutil.copytree(run_folder, tmp_path / "broken")
    adapter = RunFolder(broken).model / "adapter_model.safetensors"
    save_file({name: weight * float("nan") for name, weight in load_file(adapter).items()}, adapter, {"format": "pt"})
    assert main(["predict", str(broken), str(test_file), "--output", str(tmp_path / "x.csv")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: NaN or infinite predictions of 12 battles")
    assert not (tmp_path / "x.csv").exists()


def test_evaluate_prints_the_log_loss_of_a_run_and_of_a_file(run_folder, tmp_path, capsys):
    loss = json.loads(RunFolder(run_folder).metrics.read_text())["metrics"]["log_loss"]["value"]
    for place in (run_folder, run_folder / "validation.parquet"):
        assert main(["evaluate", str(place)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["log_loss", f"{loss:.4f}"] in [line[:2] for line in lines]


def test_evaluate_refuses_what_it_cannot_measure(refusal, run_folder, test_file, tmp_path, capsys):
    assert "cannot be read as predictions" in refusal("evaluate", tmp_path)
    assert "cannot be read as predictions" in refusal("evaluate", test_file)
    main(["predict", str(run_folder), str(test_file), "--output", str(tmp_path / "x.parquet")])
    capsys.readouterr()
    assert "outcomes of these battles are not known" in refusal("evaluate", tmp_path / "x.parquet")


def test_prepare_says_what_is_in_the_battles_and_writes_them(recipe_file, tmp_path, capsys):
    assert main(["prepare", recipe_file(), "--output", str(tmp_path / "prepared")]) == 0
    output = capsys.readouterr().out
    assert "48" in output.splitlines()[1]
    assert output.endswith(f"\n\n{tmp_path / 'prepared'}\n")
    assert len(pd.read_parquet(tmp_path / "prepared" / "battles.parquet")) == 48
    assert json.loads((tmp_path / "prepared" / "audit.json").read_text())["battles"] == 48


def test_a_part_of_the_runs_own_battles_can_be_predicted_by_name(run_folder, tmp_path, capsys):
    assert main(["predict", str(run_folder), "validation", "--output", str(tmp_path / "x.parquet")]) == 0
    assert pd.read_parquet(tmp_path / "x.parquet")["id"].tolist() == (
        pd.read_parquet(run_folder / "validation.parquet")["id"].tolist()
    )


def test_two_predictions_of_the_same_battles_are_compared(run_folder, tmp_path, capsys):
    assert main(["evaluate", str(run_folder), "--against", str(run_folder)]) == 0
    assert capsys.readouterr().out.startswith("log loss +0.0000: no difference")


def test_chosen_and_rejected_data_is_predicted_and_measured_by_subset(run_folder, tmp_path, capsys):
    rows = [
        {"prompt": f"question {n}", "chosen": f"a kind answer {n}", "rejected": f"a rude answer {n}", "subset": subset}
        for n in range(40)
        for subset in ("easy", "hard")
    ]
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["evaluate", str(run_folder), "--data", str(path)]) == 0
    output = capsys.readouterr().out
    assert "accuracy_decided" in output
    assert all(subset in output for subset in ("easy", "hard"))


def test_report_writes_a_page_of_one_run_and_a_comparison_of_two(run_folder, tmp_path, capsys):
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"{run_folder / 'report.html'}\n"
    assert (run_folder / "report.html").read_text().startswith("<!doctype html>")
    page = tmp_path / "both.html"
    assert main(["report", str(run_folder), str(run_folder), "--output", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")


def test_baseline_measures_the_baselines_out_of_fold(tmp_path, capsys):
    path = write_csv(battle_frame(), tmp_path / "train.csv")
    assert main(["baseline", str(path), "--folds", "4", "--output", str(tmp_path / "baselines.parquet")]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("prior", "length", "tfidf"))
    assert len(pd.read_parquet(tmp_path / "baselines.parquet")) == 48


def test_two_runs_are_compared_on_other_data(run_folder, tmp_path, capsys):
    path = write_csv(battle_frame(3, seed=4), tmp_path / "other.csv")
    assert main(["evaluate", str(run_folder), "--against", str(run_folder), "--data", str(path)]) == 0
    assert capsys.readouterr().out.startswith("log loss +0.0000")


def test_export_for_kaggle_prints_how_long_the_notebook_takes(run_folder, tmp_path, monkeypatch, capsys):
    from rewardmodel.exports import export as exports

    given = {}
    monkeypatch.setattr(exports, "export", lambda *_, **options: given.update(options) or {"kind": "kaggle"})
    monkeypatch.setattr("rewardmodel.exports.parity.format_parity", lambda parity: parity["kind"])
    kaggle = ["--kind", "kaggle", "--dataset", "me/my-reward-model", "--installed", str(tmp_path / "list")]
    command = ["export", str(run_folder), "--output", str(tmp_path / "bundle"), *kaggle, "--base", "me/base"]
    assert main([*command, "--time-limit", "7200"]) == 0
    first, _, folder, time = capsys.readouterr().out.splitlines()
    assert (first, folder) == ("kaggle", str(tmp_path / "bundle"))
    assert time.startswith("25,000 battles on 2 x T4: ")
    assert given["bundle"].time_limit == 7200
    assert main([*command, "--accelerator", "rtx-pro-6000"]) == 0
    assert "25,000 battles on 1 x RTX-PRO-6000: " in capsys.readouterr().out


def test_a_run_is_predicted_with_its_backbone_moved(run_folder, backbone, tmp_path, capsys):
    moved = shutil.copytree(backbone("llama"), tmp_path / "moved")
    path = write_csv(battle_frame(2, seed=4), tmp_path / "new.csv")
    command = ["predict", str(run_folder), str(path), "--output", str(tmp_path / "x.csv")]
    assert main([*command, "--model.model_name_or_path", str(moved)]) == 0
    evaluated = ["evaluate", str(run_folder), "--data", str(path), "--model.model_name_or_path", str(moved)]
    assert main(evaluated) == 0
    assert main([*command, "--model.model_name_or_path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["baseline", "prepare"])
def test_a_place_that_cannot_be_written_is_one_line(refusal, recipe_file, tmp_path, command):
    (tmp_path / "file").write_text("")
    given = {"baseline": write_csv(battle_frame(), tmp_path / "train.csv"), "prepare": recipe_file()}[command]
    output = tmp_path / "file" / "x.parquet"
    message = refusal(command, given, "--output", output)
    assert message.startswith(f"--output: {output}: {output.parent} cannot be written to (Not a directory); name")


def test_doctor_tells_of_a_recipe_and_exits_by_whether_it_works(recipe_file, tmp_path, capsys):
    path = recipe_file(model={"device": "auto", "dtype": "auto"})
    assert main(["doctor", path, "--device", "L4", "--gpus", "2"]) == 0
    output = capsys.readouterr()
    assert "device     L4, 2 of them: 22.0 GiB" in output.out
    assert "error" not in output.err
    wrong = ["--model.dtype", "bfloat16", "--trainer.optim", "lomo"]
    assert main(["doctor", path, "--device", "T4", *wrong]) == 2
    output = capsys.readouterr()
    assert "precision  bfloat16: set by model.dtype" in output.out
    _, first, second = output.err.splitlines()
    assert first.startswith("error: model.dtype: bfloat16 is emulated")
    assert second.startswith("error: trainer.optim: ")


def test_training_refuses_what_doctor_refuses_before_weights_are_read(refusal, recipe_file, backbone, tmp_path):
    folder = shutil.copytree(backbone("llama"), tmp_path / "backbone")
    (folder / "model.safetensors").unlink()
    path = recipe_file(model={"model_name_or_path": str(folder), "lora_r": 0})
    assert "model.lora_r: 0; the rank is at least 1" in refusal("train", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "T5"], "--device: no device 'T5' (did you mean 'T4'?)"),
        (["--gpus", "0"], "--gpus: 0; give at least 1"),
        (["--hours", "0"], "--hours: 0; give more than 0"),
        (["--hours", "nine"], "--hours: nine: not all are numbers"),
        (["--launch", "nowhere.yaml"], "nowhere.yaml: not a configuration of accelerate"),
    ],
)
def test_doctor_refuses_options_that_are_none(refusal, recipe_file, arguments, message):
    assert message in refusal("doctor", recipe_file(), *arguments)


def test_a_baseline_file_ends_in_parquet(refusal, tmp_path):
    assert "does not end in .parquet" in refusal("baseline", "sample", "--output", tmp_path / "x.csv")


@pytest.mark.slow  # trains every fold
def test_all_folds_are_trained_and_the_run_is_predicted_with(
    recipe_file, recipe, test_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("rewardmodel.evaluation.report.render_run", lambda *_: "page")  # charts are most of the time
    path = recipe_file(data={"folds": 2})
    assert main(["train", path, "--fold", "1", "--trainer.max_steps", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(recipe.run_folder / "fold-1")
    assert main(["train", path, "--fold", "all", "--resume", "--trainer.max_steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "out of fold: 48 battles of 12 prompts" in lines
    assert lines[-1] == str(recipe.run_folder / "report.html")
    runs, output = [str(recipe.run_folder), str(recipe.run_folder / "fold-0")], tmp_path / "x.csv"
    assert main(["predict", *runs, str(test_file), "--output", str(output), "--weights", "2", "0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"12 battles: {output}"
    expected = predict(runs, test_file, weights=[2, 0.5])
    submission = pd.read_csv(output)[list(OUTCOMES)].to_numpy()
    assert submission == pytest.approx(predicted(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        ("4", "data.fold: 4, but data.folds makes folds 0 to 3"),
        ("some", "--fold: some is not a fold; give `all`, or a"),
    ],
)
def test_a_fold_that_is_not_there_is_refused(fold, expected, refusal, recipe_file, recipe):
    assert expected in refusal("train", recipe_file(), "--fold", fold)
    assert not recipe.run_folder.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "RUN", "BATTLES", "--output", "x.csv", "--weights", "1"], "weights: 1 for 2 runs; give one for each"),
        (["RUN", "BATTLES", "--output", "x.csv", "--weights", "much"], "--weights: much: not all are numbers"),
        (["RUN", "BATTLES", "--output", "x.csv", "--weights", "0"], "weights: 0; give numbers from 0"),
        (["RUN", "nowhere", "BATTLES", "--output", "x.csv"], "nowhere: no recipe.yaml there"),
    ],
)
def test_several_runs_that_cannot_be_averaged_are_refused(
    arguments, expected, refusal, run_folder, test_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = {"RUN": run_folder, "BATTLES": test_file}
    assert expected in refusal("predict", *(places.get(word, word) for word in arguments))


def test_a_teacher_that_saw_the_battles_is_refused_in_one_line(
    recipe_file, recipe, run_folder, tmp_path, capsys, refusal
):
    trained_with = load_recipe(RunFolder(run_folder).recipe).data.train
    soft = tmp_path / "soft.parquet"
    assert main(["predict", str(run_folder), trained_with, "--output", str(soft)]) == 0
    assert "36 of 48 battles share a prompt or responses with training battles" in capsys.readouterr().err
    source = {"path": trained_with, "teacher": str(soft)}
    message = refusal("train", recipe_file(data={"train": [source]}), "--objective.name", "distillation")
    assert "the teacher trained on the prompts or responses of 36 of 48 battles" in message
    assert not recipe.run_folder.exists()


FRESH = """
import contextlib, io, json, sys
from rewardmodel.cli import main
commands, heavy = json.load(sys.stdin)
for arguments in commands:
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(arguments)
    print(json.dumps([code, error.getvalue(), [name for name in heavy if name in sys.modules]]))
"""

HEAVY = ["torch", "transformers", "trl", "peft", "bitsandbytes", "sklearn"]

BROKEN = {
    "missing": "column 'response_b' is missing",
    "turns": "row 5, column 'response_b': 2 turns, but the prompt has 1",
}
"""Files of battles, and what is reported of each."""

KAGGLE = ["export", "run", "--output", "exported", "--kind", "kaggle", "--dataset", "me/reward", "--installed", "list"]

TABLES = ["pandas", "numpy", "pyarrow", "datasets"]
"""Modules that read tables, which take a second."""

EARLIEST = {
    "run of a misspelt key": (["run", "good.yaml", "--data.trian", "x.csv"], ["did you mean 'data.train'?"]),
    "run of no file": (["run", "good.yaml", "--data.train", "no.csv"], ["no.csv: no such file"]),
    "run of no test file": (["run", "good.yaml", "--data.test", "no.csv"], ["no.csv: no such file"]),
    "run over a run": (["run", "good.yaml", "--trainer.output_dir", "run"], ["run already holds a run"]),
    "run where nothing can be written": (
        ["run", "good.yaml", "--trainer.output_dir", "/proc/rewardmodel"],
        ["trainer.output_dir: /proc/rewardmodel: /proc cannot be written to"],
    ),
    "train of no file": (["train", "good.yaml", "--data.train", "no.csv"], ["no.csv: no such file"]),
    "train --fold of no file": (["train", "good.yaml", "--fold", "1", "--data.train", "no.csv"], ["no.csv: no such"]),
    "prepare of no file": (["prepare", "good.yaml", "--output", "x", "--data.train", "no.csv"], ["no.csv: no such"]),
    "predict without a run": (
        ["predict", "nowhere", "good.csv", "--output", "x.csv"],
        ["nowhere: no recipe.yaml there"],
    ),
    "predict of no file": (["predict", "run", "no.csv", "--output", "y.csv"], ["no.csv: no such file"]),
    "evaluate of no run": (["evaluate", "nowhere"], ["nowhere: cannot be read as predictions (no such file)"]),
    "evaluate --data of no file": (["evaluate", "run", "--data", "no.csv"], ["no.csv: no such file"]),
    "report of no run": (["report", "run"], ["validation.parquet: cannot be read as predictions (no such file)"]),
    "export over a folder": (["export", "run", "--output", "run"], ["--output: run already exists"]),
    "export without a run": (["export", "nowhere", "--output", "exported"], ["nowhere: no recipe.yaml there"]),
    "baseline of no file": (["baseline", "no.csv"], ["no.csv: no such file"]),
    "predict over battles": (
        ["predict", "run", "good.csv", "--output", "good.csv"],
        ["good.csv is there and holds no"],
    ),
    "report over battles": (["report", "run", "--output", "good.csv"], ["good.csv does not end in .html"]),
    "train of a misspelt file": (["train", "good.yaml", "--data.train", "god.csv"], ["(did you mean 'good.csv'?)"]),
    "doctor of no device": (
        ["doctor", "good.yaml", "--device", "T5"],
        ["--device: no device 'T5' (did you mean 'T4'?)"],
    ),
    "doctor of no GPUs": (["doctor", "good.yaml", "--gpus", "0"], ["--gpus: 0; give at least 1"]),
}
"""Commands that are refused before even a file of battles is opened."""

EARLY = {
    **EARLIEST,
    **{
        f"{name} {fault}": ([*command, *rest], [f"{fault}.csv: {message}"])
        for fault, message in BROKEN.items()
        for name, command, rest in (
            ("prepare", ["prepare", f"{fault}.yaml"], ["--output", "prepared"]),
            ("train", ["train", f"{fault}.yaml"], []),
            ("train --fold 1", ["train", f"{fault}.yaml"], ["--fold", "1"]),
            ("train --fold all", ["train", f"{fault}.yaml"], ["--fold", "all"]),
            ("run", ["run", f"{fault}.yaml"], []),
            ("run data.test", ["run", "good.yaml"], ["--data.test", f"{fault}.csv"]),
            ("predict", ["predict", "run", f"{fault}.csv"], ["--output", "x.csv"]),
            ("evaluate --data", ["evaluate", "run"], ["--data", f"{fault}.csv"]),
            ("evaluate --against", ["evaluate", "run", "--against", "run"], ["--data", f"{fault}.csv"]),
            (
                "export --battles",
                ["export", "run"],
                ["--output", "exported", "--kind", "adapter", "--battles", f"{fault}.csv"],
            ),
            ("baseline", ["baseline", f"{fault}.csv"], []),
            ("benchmark", ["benchmark", "preferences", "run"], ["--data", f"{fault}.csv"]),
        )
    },
    "benchmark of another file": (
        ["benchmark", "judgebench", "run", "--data", "good.csv"],
        ["good.csv: column 'question' is missing"],
    ),
    "benchmark that is unknown": (["benchmark", "judgebenhc", "run"], ["did you mean 'judgebench'?"]),
    "benchmark without battles": (["benchmark", "preferences", "run"], ["benchmark preferences: --data is missing"]),
    "benchmark without a run": (["benchmark", "llmbar", "nowhere"], ["nowhere: no recipe.yaml there"]),
    "run without data.test": (["run", "good.yaml", "--data.sample_submission", "x.csv"], ["there is no data.test"]),
    "run with another sample": (
        ["run", "good.yaml", "--data.test", "good.csv", "--data.sample_submission", "sample.csv"],
        ["sample.csv: id '", "is missing, but is to be predicted"],
    ),
    "run --resume of another recipe": (
        ["run", "good.yaml", "--resume", "--trainer.output_dir", "run", "--trainer.max_steps", "3"],
        ["the run there has trainer.max_steps: -1, not 3"],
    ),
    "train over a run": (["train", "good.yaml", "--trainer.output_dir", "run"], ["run already holds a run"]),
    "train without a teacher's file": (
        ["train", "good.yaml", "--data.train", "[{path: good.csv, teacher: nowhere.parquet}]"],
        ["nowhere.parquet: no such file"],
    ),
    "predict with another sample": (
        ["predict", "run", "good.csv", "--output", "x.csv", "--sample-submission", "sample.csv"],
        ["sample.csv: id '", "is missing, but is to be predicted"],
    ),
    "predict with negative weights": (
        ["predict", "run", "good.csv", "--output", "x.csv", "--weights", "-1"],
        ["weights: -1; give numbers from 0"],
    ),
    "predict into a folder": (["predict", "run", "good.csv", "--output", "run/x.csv"], ["x.csv is a folder"]),
    "evaluate unlabelled battles": (
        ["evaluate", "run", "--data", "unlabelled.csv"],
        ["--data: unlabelled.csv: the outcomes of these battles are not known"],
    ),
    "export for an unknown accelerator": (
        [*KAGGLE, "--accelerator", "t4"],
        ["--accelerator: no 't4'", "known: t4x2, rtx-pro-6000"],
    ),
    "export beyond Kaggle's time": ([*KAGGLE, "--time-limit", "40000"], ["--time-limit: 40000; give seconds below"]),
    "export with words for a time": ([*KAGGLE, "--time-limit", "long"], ["--time-limit: long: not all are numbers"]),
    "export with a time, not for Kaggle": (
        ["export", "run", "--output", "exported", "--time-limit", "3600"],
        ["--time-limit: only for --kind kaggle"],
    ),
    "unknown recipe key": (["train", "good.yaml", "--model.lora_rr", "1"], ["did you mean 'model.lora_r'?"]),
}
"""Commands that are refused, and what is reported; files are those of `early`."""


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """Return what a process that ran the commands of `EARLY` had done after each: code, error, modules loaded."""
    folder = tmp_path_factory.mktemp("early")
    frames = {
        "good": battle_frame(),
        "missing": battle_frame().drop(columns="response_b"),
        "turns": more_turns(battle_frame()),
        "unlabelled": battle_frame().drop(columns=list(OUTCOMES)),
    }
    for name, frame in frames.items():
        write_csv(frame, folder / f"{name}.csv")
        recipe = Recipe(data=DataConfig(train=f"{name}.csv", folds=4), trainer={"output_dir": "new"})
        (folder / f"{name}.yaml").write_text(dump_recipe(recipe))
    rows = pd.DataFrame({"id": frames["good"]["id"], **dict.fromkeys(OUTCOMES, 0.3)})
    write_csv(rows.head(11), folder / "sample.csv")
    (folder / "run" / "model").mkdir(parents=True)  # all of a trained run that is looked at before it is loaded
    (folder / "run" / "x.csv").mkdir()
    shutil.copy(folder / "good.yaml", folder / "run" / "recipe.yaml")
    (folder / "run" / "model" / "backbone.json").write_text(json.dumps({"head": {}}))
    (folder / "run" / "model" / "adapter_config.json").write_text("{}")
    (folder / "run" / "environment.json").write_text(json.dumps({"compute": {"dtype": "float32"}}))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH],
        input=json.dumps([[arguments for arguments, _ in EARLY.values()], [*HEAVY, *TABLES]]),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in folder.iterdir()} - {"prepared"} == {
        *("run", "sample.csv"),
        *(f"{name}.{ending}" for name in frames for ending in ("csv", "yaml")),
    }
    return dict(zip(EARLY, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow  # a fresh process
@pytest.mark.parametrize("name", EARLY)
def test_what_is_wrong_with_files_is_reported_before_anything_heavy_is_imported(name, early):
    code, error, loaded = early[name]
    last = error.splitlines()[-1]
    assert code == 2
    assert last.startswith("error: ")
    for part in EARLY[name][1]:
        assert part in last
    assert not set(loaded) & {*HEAVY, *(TABLES if name in EARLIEST else ())}
