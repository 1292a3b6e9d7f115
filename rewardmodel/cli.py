"""The command line: words in, a command called, an exit code out; 2 for wrong input."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence

from rewardmodel.commands import VERBS
from rewardmodel.distributed import is_main
from rewardmodel.errors import InputError, nearest
from rewardmodel.interruption import describe_failure, end_process, stoppable
from rewardmodel.processors import set_environment


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 2 for wrong input; 1 for NaN or infinite predictions; 130 after Ctrl-C, 143 after SIGTERM, 141
        if who reads the output has gone, like `head`.
    """
    try:
        try:
            return _call(arguments)
        finally:
            sys.stdout.flush()  # not at exit, where Python would print its own words about what fails
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: standard output cannot be written to ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _call(arguments: Sequence[str] | None) -> int:
    from rewardmodel.options import build_parser, parse, reorder

    program = arguments is None
    arguments = reorder(sys.argv[1:] if arguments is None else arguments)
    completing = "_ARGCOMPLETE" in os.environ
    parser = build_parser(
        {name: command.__doc__ or "" for name, command in VERBS.items()},
        with_keys=VERBS if completing else arguments[:1] if {"-h", "--help"} & {*arguments[1:]} else (),
    )
    if completing:
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    try:
        if arguments[0] not in (*VERBS, "--version"):
            known = ", ".join(VERBS)
            raise InputError(f"rewardmodel: no command '{arguments[0]}'{nearest(arguments[0], VERBS)}; known: {known}")
        options = parse(parser, arguments)
        from rewardmodel.logs import set_up_logging, traced

        set_environment()
        set_up_logging(options.quiet, options.verbose)
        quiet = contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO())
        with traced(options.verbose), stoppable(options.command), quiet:
            return VERBS[options.command](options) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            print(flush=True)  # raises it again if it is standard output's, not that of a network
        print(f"error: {describe_failure(error, arguments[0])}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:  # `stoppable` has said so, and how to go on
        code = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        return end_process(code) if program else code


if __name__ == "__main__":
    sys.exit(main())
