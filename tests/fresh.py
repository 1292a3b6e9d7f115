"""Fresh Python processes at a tenth of the price: forks of a server that has imported the libraries and run nothing.

Importing torch, transformers and trl takes ten seconds of CPU, more than most tests of a fresh process do with them.
Each test process starts one server of `multiprocessing`, which has seen none of the test's models, files, seeds and
patches, so that what a test says of a fresh process holds for a fork of it. Tests of what is imported, of kills by a
launcher and of the command line itself start an interpreter of their own.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [  # not rewardmodel itself: that plain transformers reads an export without it is a claim of tests
        *("datasets", "pandas", "sklearn.linear_model", "scipy.optimize", "torch._dynamo", "torch.nn.attention.varlen"),
        *("transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
        *("accelerate.commands.launch", "bitsandbytes", "peft", "trl.trainer.reward_trainer"),
    ]
)


def _run(code: str, arguments: list[str], environment: dict[str, str], output: list[str]) -> None:
    """Run a program in this process as `python -c` does, with files in the place of its output."""
    os.setsid()
    for descriptor, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what is imported is not looked through again
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class FreshProcess:
    """A program that runs; with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, code: str, *arguments: object, env: dict[str, str] | None = None) -> None:
        """Start it: the text of a program, what `sys.argv` has after its name, and its environment variables."""
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._output:
            file.touch()
        given = (
            code,
            list(map(str, arguments)),
            dict(os.environ if env is None else env),
            list(map(str, self._output)),
        )
        self._process = SERVER.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end and return, once, what it has written to its output and to its error output."""
        self._process.join(timeout)
        out, err = (file.read_text() for file in self._output)
        self._folder.cleanup()
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"runs for over {timeout} s: {err}")
        return out, err

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.exitcode


LAUNCHER = """
import os
import runpy
import sys
from dataclasses import replace

import torch.distributed.run
from accelerate.commands.launch import main
from torch.distributed.launcher.api import elastic_launch


def run_program(*words):
    sys.argv = [word for word in words if word not in ("-u", "-m")]  # -u, then a file or -m and a module
    sys.path.insert(0, os.getcwd() if "-m" in words else os.path.dirname(sys.argv[0]))
    (runpy.run_module if "-m" in words else runpy.run_path)(sys.argv[0], run_name="__main__")


def launch(config, entrypoint):
    return elastic_launch(replace(config, start_method="fork"), run_program)


torch.distributed.run.elastic_launch = launch
main()
"""
"""`accelerate launch`, with torch's own launcher, whose workers are forks of it instead of new interpreters."""


def launch_fresh(config: Path, *command: object) -> FreshProcess:
    """Start a file, or -m and a module, in the processes of a configuration of accelerate, one thread each."""
    options = ("--quiet", "--num_cpu_threads_per_process", "1", "--config_file", config)
    return FreshProcess(LAUNCHER, *options, *command)


def run_fresh(code: str, *arguments: object, env: dict[str, str] | None = None, status: int = 0) -> tuple[str, str]:
    """Run a program to its end and return its output and error output; its exit status is the one given."""
    process = FreshProcess(code, *arguments, env=env)
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err


def run_command(command: list[str], **_: object) -> subprocess.CompletedProcess:
    """Stand in for `subprocess.run` of an interpreter with -c, a program and its arguments."""
    process = FreshProcess(*command[2:])
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
