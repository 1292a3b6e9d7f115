import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rewardmodel import interruption
from rewardmodel.cli import main
from rewardmodel.commands import VERBS
from rewardmodel.interruption import GO_ON, NOTHING_KEPT, describe_failure, how_to_go_on, stoppable

STUBBORN = """
import os, signal, time
from rewardmodel import interruption
interruption.GRACE = 0.1
with interruption.stoppable("train"):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(60)
"""
"""A program that is told to end, and does not."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["run", "predict", "evaluate"])
def test_a_signal_stops_a_command_which_says_how_it_goes_on(number, command, capsys, monkeypatch):
    monkeypatch.setitem(VERBS, command, lambda options: os.kill(os.getpid(), number) or time.sleep(60))
    handlers = [signal.getsignal(one) for one in interruption.SIGNALS]
    words = {"run": ["r.yaml"], "predict": ["r", "b.csv", "--output", "x.csv"], "evaluate": ["r"]}[command]
    assert main([command, *words]) == 128 + number
    assert capsys.readouterr().err == f"interrupted ({number.name}); {how_to_go_on(command)}\n"
    assert [signal.getsignal(one) for one in interruption.SIGNALS] == handlers


def test_only_commands_that_have_resume_are_told_of_it():
    assert {name for name, words in GO_ON.items() if "--resume" in words} == {"run", "train"}
    assert GO_ON.keys() <= VERBS.keys()
    assert "the same command goes on" in how_to_go_on("predict")
    assert how_to_go_on("export") == NOTHING_KEPT


def test_a_command_that_does_not_stop_is_ended():
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.startswith("interrupted (SIGTERM); the last checkpoint")


def test_a_program_that_was_stopped_ends_with_its_code_after_what_is_registered():
    code = "import atexit, rewardmodel.interruption as i; atexit.register(print, 'bye'); i.end_process(143)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (143, "bye\n")


def test_a_signal_to_a_forked_process_is_its_own(capsys):
    reader, writer = os.pipe()
    with stoppable("train"):
        child = os.fork()
        if not child:
            os.write(writer, b"ready")
            time.sleep(20)
            os._exit(0)
        assert os.read(reader, 5) == b"ready"
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert capsys.readouterr().err == ""


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with stoppable("train"):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_full_disk_is_named_with_the_file_and_what_to_do():
    error = OSError(errno.ENOSPC, "No space left on device", "runs/one/checkpoint-4")
    assert describe_failure(error, "train") == (
        f"runs/one/checkpoint-4: No space left on device; free some space; {how_to_go_on('train')}"
    )
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "x")
    assert describe_failure(missing, "train") == (
        "[Errno 2] No such file or directory: 'x'; fix the path or its permissions"
    )
