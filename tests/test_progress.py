import logging
import os
import warnings

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from rewardmodel import progress
from rewardmodel.progress import BARS, OLD_NAME, Progress, quiet, quiet_libraries


@pytest.fixture
def terminal(monkeypatch):
    """Say whether standard error is a terminal: terminal(True)."""
    return lambda answer: monkeypatch.setattr(progress, "in_terminal", lambda: answer)


def test_without_a_terminal_there_is_a_line_every_tenth(terminal, caplog, capsys):
    terminal(False)
    with caplog.at_level(logging.INFO, "rewardmodel"), Progress(200, "predicting") as shown:
        for _ in range(100):
            shown.update(2)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0].startswith("predicting: 10 % (20 of 200 battles in 0 s, ")
    assert lines[-1].startswith("predicting: 100 % (200 of 200 battles in ")
    assert capsys.readouterr().err == ""


def test_what_was_done_before_counts_and_is_not_said_again(terminal, caplog):
    terminal(False)
    with caplog.at_level(logging.INFO, "rewardmodel"), Progress(1_000, "reading", initial=950) as shown:
        shown.move_to(990)
        shown.move_to(1_000)
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == [
        "reading: 100 % (1,000 of 1,000 battles"
    ]


def test_in_a_terminal_there_is_a_bar_and_no_line(terminal, caplog, capsys):
    terminal(True)
    with caplog.at_level(logging.INFO, "rewardmodel"), Progress(3, "predicting") as shown:
        shown.update(3)
    assert "predicting: 100%" in capsys.readouterr().err
    assert not caplog.records


@pytest.mark.parametrize("answer", [True, False])
def test_a_process_that_is_not_to_talk_shows_nothing(answer, terminal, caplog, capsys):
    terminal(answer)
    with caplog.at_level(logging.INFO, "rewardmodel"), Progress(3, "predicting", show=False) as shown:
        shown.update(3)
    assert capsys.readouterr().err == ""
    assert not caplog.records


def test_bars_of_libraries_are_off_without_a_terminal_unless_the_user_wants_them(terminal, monkeypatch):
    names = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    terminal(True)
    quiet_libraries()
    assert not set(names) & os.environ.keys()
    monkeypatch.setenv(names[1], "0")
    terminal(False)
    quiet_libraries()
    assert [os.environ[name] for name in names] == ["1", "0"]


@pytest.mark.parametrize("answer", [True, False])
def test_libraries_are_quiet_in_the_block_and_as_before_afterwards(answer, terminal, monkeypatch):
    for name in BARS:
        monkeypatch.delenv(name, raising=False)
    terminal(answer)

    def shown():
        return transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    assert shown() == (True, True)
    filters = list(warnings.filters)
    with quiet():
        assert shown() == (answer, answer)
        warnings.warn(OLD_NAME, FutureWarning, stacklevel=1)  # would be an error
        with quiet():
            pass
        assert shown() == (answer, answer)
    assert shown() == (True, True)
    assert warnings.filters == filters
