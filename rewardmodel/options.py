"""The command line's options: the parser of all commands, with the recipe keys for help and tab completion.

Options are parsed here and used in `cli`. Recipe keys are passed on as typed, because `config.loader` checks them.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rewardmodel import __version__
from rewardmodel.errors import InputError, nearest
from rewardmodel.serving.limits import Limits

ALL_KEYS = ("--",)
"""How every recipe key begins."""

MOVED_BACKBONE = ("--model.model_name_or_path",)
"""The key that says where the backbone of a run is now."""

PREDICTION_KEYS = ("--inference.", "--model.device", "--model.dtype", *MOVED_BACKBONE)
"""The keys that change how a trained run predicts."""

LOUDNESS = ("-q", "--quiet", "-v", "--verbose")
"""Options of every command, which may stand before it too."""

KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("run", "doctor", "prepare", "train", "learning-curve"), ALL_KEYS),
    **dict.fromkeys(("predict", "evaluate", "benchmark", "serve", "compare", "parity"), PREDICTION_KEYS),
    "export": MOVED_BACKBONE,
}
"""How the recipe keys begin that a command takes; the others take none."""


def _run(parser: ArgumentParser) -> None:
    _add_recipe(parser, resume=True)
    parser.add_argument("--print-config", action="store_true", help="print the recipe with all defaults and stop")


def _prepare(parser: ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")


def _doctor(parser: ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--device", help="cpu, or a GPU by name, like T4, A100-80GB, H100; default: this machine's")
    parser.add_argument("--gpus", type=int, help="number of GPUs, one process each; default: 1, or that of --launch")
    parser.add_argument("--launch", type=Path, help="a configuration of accelerate, like recipes/accelerate/fsdp2.yaml")
    parser.add_argument(
        "--hours", nargs=1, metavar="HOURS", help="that there are: say whether it fits into them, or what to change"
    )


def _train(parser: ArgumentParser) -> None:
    _add_recipe(parser, resume=True)
    parser.add_argument(
        "--fold",
        help="number of a fold, to train it into its own folder of the run; or `all`, to train every fold and predict "
        "every battle out of fold",
    )


def _learning_curve(parser: ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        metavar="BATTLES",
        help="numbers of training battles (default: from 125 on, about doubling, to all)",
    )
    parser.add_argument("--draws", type=int, default=5, help="draws of the training prompts of a size (default: 5)")
    parser.add_argument("--fold", help="`all`: hold out every fold in turn, not only data.fold")
    parser.add_argument(
        "--output", type=Path, help="folder to write; default: trainer.output_dir with _learning_curve added"
    )


def _predict(parser: ArgumentParser) -> None:
    parser.add_argument("runs", metavar="run", type=Path, nargs="+", help="folder of a trained run, or several")
    parser.add_argument(
        "battles",
        help="a file, a data set's id on the hub, `sample`, or `validation`, `calibration` or `holdout` for the "
        "(first) run's own",
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write: .parquet, or .csv for a submission")
    parser.add_argument("--sample-submission", type=Path, help="a submission with the columns and ids to be written")
    parser.add_argument("--weights", nargs="+", metavar="WEIGHT", help="of each run in the mean; default: equal")
    parser.add_argument(
        "--time-limit",
        nargs=1,
        metavar="SECONDS",
        help="predict every battle in one order of A and B, then in the other as far as time allows",
    )


def _evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("predictions", type=Path, help="a run folder (its validation fold), or a predictions.parquet")
    parser.add_argument("--data", help="labelled battles to predict with the run and to measure, like RewardBench's")
    parser.add_argument("--against", type=Path, help="another run or predictions.parquet, of the same battles")


def _report(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; several are compared with the first")
    parser.add_argument("--output", type=Path, help="HTML file to write; default: report.html in the (first) run")


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or the folder of a k-fold run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    kinds = "adapter, merged, merged_4bit, soup or kaggle"
    parser.add_argument("--kind", default="merged", help=f"{kinds} (default: merged)")
    parser.add_argument("--dtype", help="of merged weights: bfloat16, float16 or float32 (default: the run's)")
    parser.add_argument(
        "--battles", help="at least 64 to compare export and run on; default: the run's validation fold, or `sample`"
    )
    parser.add_argument(
        "--rewardmodel-only", action="store_true", help="accept a model that plain transformers does not load"
    )
    parser.add_argument("--push-to-hub", help="owner/name of a model repository; created as private if it is missing")
    kaggle = parser.add_argument_group("--kind kaggle")
    kaggle.add_argument("--dataset", help="owner/name of the Kaggle data set")
    kaggle.add_argument(
        "--installed",
        type=Path,
        nargs="+",
        help="a list of what is installed there, or several, as `(python -VV; pip freeze) > FILE` writes it",
    )
    kaggle.add_argument("--contents", help="kind of the model inside (default: adapter)")
    kaggle.add_argument(
        "--base",
        nargs="+",
        help="the adapter's backbone there: owner/model/framework/variation/version, owner/data-set, or a folder; or "
        "that of each run",
    )
    kaggle.add_argument(
        "--separate",
        action="store_true",
        default=None,
        help="bundle each run's model, and average their probabilities as predict does (default: their adapters' mean)",
    )
    kaggle.add_argument(
        "--weights", nargs="+", metavar="WEIGHT", help="with --separate: of each run in the mean; default: equal"
    )
    kaggle.add_argument(
        "--python",
        nargs="+",
        metavar="VERSION",
        help="version there, or several: of each list, or all of one list (default: as the lists begin)",
    )
    kaggle.add_argument("--accelerator", help="t4x2 or rtx-pro-6000 (default: t4x2)")
    kaggle.add_argument(
        "--time-limit",
        nargs=1,
        metavar="SECONDS",
        help="of the notebook, in which the second order of A and B is predicted (default: 30600, of Kaggle's 32400)",
    )


def _baseline(parser: ArgumentParser) -> None:
    parser.add_argument("battles", help="labelled battles: a file, a data set's id on the hub, or `sample`")
    parser.add_argument("--folds", type=int, default=5, help="folds by prompt group (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds (default: 0)")
    parser.add_argument("--output", type=Path, help=".parquet file to write the predictions to")


def _benchmark(parser: ArgumentParser) -> None:
    names = "rewardbench2, rewardbench, rm_bench, judgebench, llmbar or preferences"
    parser.add_argument("name", help=f"{names} (any labelled battles)")
    parser.add_argument("runs", metavar="run", type=Path, nargs="+", help="folder of a trained run, or two to compare")
    parser.add_argument("--data", help="a file, or a data set's id on the hub; default: the benchmark's own on the hub")
    parser.add_argument("--output", type=Path, help="folder to write to; default: benchmarks/NAME in the (first) run")


def _serve(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: 8000)")
    parser.add_argument("--name", help="what requests may call the model, beside the run's folder and its name")
    limits = Limits()
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=limits.max_waiting,
        help=f"battles, responses or texts that may wait; more get status 429 (default: {limits.max_waiting})",
    )
    parser.add_argument("--max-tokens", type=int, help="of a finished text (default: the run's prompt.max_length)")
    parser.add_argument(
        "--max-body", type=int, default=limits.max_body, help=f"bytes of a request (default: {limits.max_body})"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=limits.timeout,
        help=f"seconds for a request to arrive, and to be answered (default: {limits.timeout:g})",
    )
    parser.add_argument("--log-texts", action="store_true", help="log the bodies of requests")


def _compare(parser: ArgumentParser) -> None:
    _add_run(parser)
    for name, text in (("prompt", "prompt"), ("response-a", "first response"), ("response-b", "second response")):
        parser.add_argument(f"--{name}", help=f"the {text}, or @FILE; default: typed in the terminal")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _parity(parser: ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--url", required=True, help="of the server, like http://127.0.0.1:8000")
    parser.add_argument("--battles", help="at least 64 to compare on; default: the run's validation fold, or `sample`")


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a trained run, or of an export")


def _add_recipe(parser: ArgumentParser, resume: bool = False) -> None:
    recipe: Any = parser.add_argument(
        "recipe", help="YAML file of the recipe, or the name of one of the package, which `rewardmodel recipes` lists"
    )
    recipe.completer = _complete_recipe
    if resume:
        parser.add_argument("--resume", action="store_true", help="continue the run in trainer.output_dir")
        parser.add_argument("--overwrite", action="store_true", help="replace the run in trainer.output_dir")


def _complete_recipe(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from rewardmodel.config.recipes import packaged_recipes

    names = [name for name in packaged_recipes() if name.startswith(prefix)]
    return [*FilesCompleter(["yaml", "yml"])(prefix), *names]


def _add_loudness(parser: ArgumentParser) -> None:
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="report results, warnings and errors only")
    loudness.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also report what libraries do, the time of each line, and the traceback of an error",
    )


OPTIONS = {
    "run": _run,
    "doctor": _doctor,
    "prepare": _prepare,
    "train": _train,
    "learning-curve": _learning_curve,
    "predict": _predict,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
    "baseline": _baseline,
    "benchmark": _benchmark,
    "serve": _serve,
    "compare": _compare,
    "parity": _parity,
}
"""What adds a command's options to its parser; the others have none."""


def build_parser(commands: Mapping[str, str], with_keys: Collection[str] = ()) -> ArgumentParser:
    """Return the parser of all commands.

    Args:
        commands: name -> help.
        with_keys: commands that get the recipe keys as options, for help and completion; `config.loader` parses them.
    """
    parser = ArgumentParser(
        "rewardmodel",
        description="Reward models from human preference battles. `rewardmodel help COMMAND` lists its options.",
        epilog="Tab completion of commands, options, recipe keys and files in bash and zsh: "
        'eval "$(register-python-argcomplete rewardmodel)"',
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"rewardmodel {__version__}", help="print the version and stop"
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, about in commands.items():
        command = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(parser=command)
        if name in OPTIONS:
            OPTIONS[name](command)
        _add_loudness(command)
        if name in KEYS:
            usage = command.format_usage().removeprefix("usage: ").rstrip()
            command.usage = f"{usage} [--SECTION.KEY VALUE ...]"  # instead of 150 keys
            if name in with_keys:
                _add_keys(command, KEYS[name])
    return parser


def _add_keys(parser: ArgumentParser, taken: tuple[str, ...]) -> None:
    """Add recipe keys as options, a group for each section."""
    from rewardmodel.config.json_schema import choices, help_text, recipe_keys, type_name

    for section, content in recipe_keys().items():
        options = {f"--{section}.{key}": schema for key, schema in content["properties"].items()}
        options = {name: schema for name, schema in options.items() if name.startswith(taken)}
        if options:
            group = parser.add_argument_group(f"recipe: {section}", content["description"])
            for name, schema in options.items():
                text = help_text(schema).replace("%", "%%")
                group.add_argument(name, metavar=type_name(schema), choices=choices(schema), help=text)


def reorder(arguments: Sequence[str]) -> list[str]:
    """Return `help COMMAND` as `COMMAND --help`, and options before the command, like --quiet, behind it."""
    first = next((place for place, word in enumerate(arguments) if word not in LOUDNESS), len(arguments))
    before, words = list(arguments[:first]), list(arguments[first:])
    if words[:1] == ["help"]:
        return [*words[1:], "--help"]
    return words + before if words else before


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Return a command's options, with `command`, its name, and `overrides`, recipe keys and values as typed.

    Raises:
        InputError: an option that the command does not have.
        SystemExit: the command is used in another way than its usage says, which is printed.
    """
    command, taken = f"rewardmodel {arguments[0]}", KEYS.get(arguments[0], ())
    known = _known_options(parser, arguments[0])
    for word in takewhile(lambda word: word != "--", arguments[1:] if known else ()):
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known and not (name.startswith(taken) and "." in name):
            raise InputError(f"{command}: unknown option {name}{nearest(name, known)}; see {command} --help")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and "recipe" in options and arguments.index(options.recipe) > arguments.index(overrides[0]):
        raise InputError(f"{command}: the recipe comes before its keys: RECIPE --section.key VALUE")
    if overrides and not taken:
        options.parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    return options


def _known_options(parser: ArgumentParser, command: str) -> Collection[str]:
    """Return the options of a command, by which they are checked before argparse names what is missing."""
    commands: Any = next(action.choices for action in parser._actions if isinstance(action.choices, Mapping))
    return commands[command]._option_string_actions if command in commands else ()
