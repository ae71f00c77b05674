"""Bars on a terminal, lines elsewhere, and what is printed while a bar is there."""

from __future__ import annotations

import io
import logging
import os
import sys

import pytest
import tqdm.std

from latent_verse import progress
from latent_verse.progress import LastLine, duration, progress_bar, rate
from tests.terminals import on_a_terminal, screens


@pytest.mark.parametrize(("seconds", "said"), [
    (0.031, "0.031 s"), (2.13, "2.1 s"), (45, "45 s"), (59.6, "1 min"), (3540, "59 min"), (3599, "1 h"),
    (5400, "1 h 30 min"), (47 * 3600, "47 h"), (270_000, "3 d 3 h"),
])  # fmt: skip
def test_durations_are_as_precise_as_a_person_needs(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("per_second", "said"), [
    (0.0456, "0.0456"), (0.45, "0.450"), (4.456, "4.46"), (12, "12.0"), (99.96, "100"), (1234, "1,234"),
    (56_712, "56.7k"), (938_412, "938k"),
])  # fmt: skip
def test_rates_have_three_digits(per_second, said):
    assert rate(per_second) == said


@pytest.mark.parametrize("columns", [100, 80, 40, 10])
def test_a_bar_fits_the_terminal_and_keeps_what_comes_first(columns, monkeypatch):
    facts = ["run ends in 12 h 30 min", "loss 0.4305", "2.35 steps/s", "938k tokens/s"]
    with on_a_terminal(monkeypatch, columns) as written:
        bar = LastLine()
        for done in range(0, 101, 50):
            bar.show("Epoch 12/30", done, 100, facts)
        bar.close()
    *_, whole, last = screens(written[0], columns)
    assert last == [""] and len(whole) == 1  # it is gone
    assert whole[0].startswith("Epoch 12/30"[: columns - 1])
    if columns >= 80:
        assert "100/100, run ends in 12 h 30 min" in whole[0] and "█" * 10 in whole[0] and "░" not in whole[0]
        assert ("tokens/s" in whole[0]) == (columns == 100)


def test_a_terminal_of_another_encoding_gets_a_bar_of_its_characters(monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stderr", said)
    bar = LastLine()
    bar.show("Epoch 1/2", 1, 2)
    bar.close()
    assert b"Epoch 1/2 ####" in said.buffer.getvalue()


def test_what_is_printed_or_logged_appears_above_the_bar(monkeypatch):
    said = ["a print", "of two lines", "an error", "logged by a library"]
    log = logging.getLogger("tests.test_progress")
    with on_a_terminal(monkeypatch, 80) as written:
        log.addHandler(handler := logging.StreamHandler())  # of the stream that is there now
        before = sys.stdout, sys.stderr, handler.stream
        bar = LastLine()
        bar.show("Epoch 1/2", 1, 2, ["train loss 0.5"])
        print(said[0], said[1], sep="\n")
        print(said[2], file=sys.stderr)
        log.error(said[3])
        bar.close()
        assert (sys.stdout, sys.stderr, handler.stream) == before
    log.removeHandler(handler)
    found = list(screens(written[0], 80))
    assert found[-1] == [*said, ""]
    for lines in found:
        assert not any("Epoch" in line for line in lines[:-1])  # never in a line above


def test_a_question_takes_the_place_of_the_bar(monkeypatch):
    with on_a_terminal(monkeypatch, 80) as written:
        bar = LastLine()
        bar.show("Epoch 1/2", 1, 2)
        print("(Pdb) ", end="", flush=True)
        bar.close()
    assert any(lines[-1] == "(Pdb)" for lines in screens(written[0], 80))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_says_its_lines_and_draws_no_bar(monkeypatch):
    """A loader process that skips an image knows an old state of the bar."""
    with on_a_terminal(monkeypatch, 80) as written:
        bar = LastLine()
        bar.show("Epoch 1/2", 1, 4)
        if (child := os.fork()) == 0:
            print("skipped unreadable a.png")
            os._exit(0)
        os.waitpid(child, 0)
        bar.show("Epoch 1/2", 2, 4)
        bar.close()
    found = list(screens(written[0], 80))
    assert found[-1] == ["skipped unreadable a.png", ""]
    assert written[0].count("1/4") == 1


def test_a_terminal_that_is_closed_ends_nothing(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    bar = LastLine()
    bar.show("Epoch 1/2", 1, 2)
    bar.close()


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as tqdm and we see them."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_without_a_terminal_long_work_says_a_plain_line_every_30_seconds(clock, capsys):
    for i in progress_bar(range(100), what="sampling images", unit="token"):
        clock[0] += 1 if i < 50 else 0.1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "sampling images: 30 of 100 tokens in 30 s, 1 min left",
        "sampling images: 100 of 100 tokens in 55 s",
    ]


def test_what_was_done_before_counts_for_no_speed(clock, capsys):
    with progress_bar(what="codes", total=1000, unit="image", done=900) as bar:
        clock[0] += 40
        bar.update(20)
    assert capsys.readouterr().err.splitlines()[0] == "codes: 920 of 1,000 images in 40 s, 3 min left"


def test_work_of_unknown_length_says_how_much_is_done(clock, capsys):
    for _ in progress_bar(iter(range(40)), what="reading", unit="batch"):
        clock[0] += 1
    assert capsys.readouterr().err.splitlines()[0] == "reading: 30 batches in 30 s"


@pytest.mark.parametrize("shown", [True, False])
def test_short_work_and_work_that_is_not_shown_say_nothing(shown, clock, capsys):
    for _ in progress_bar(range(100), what="scoring", shown=shown):
        clock[0] += 0.1 if shown else 10
    with progress_bar(what="scoring", total=3, shown=shown) as bar:
        bar.update(3)
    said = capsys.readouterr()
    assert not said.out + said.err


def test_on_a_terminal_long_work_has_a_bar(monkeypatch):
    with on_a_terminal(monkeypatch, 80) as written:
        for _ in progress_bar(range(3), what="scoring", unit="pair"):
            pass
    *_, last = screens(written[0], 80)
    assert last[0].startswith("scoring: 100%") and "3/3" in last[0]


def test_a_terminal_is_one_only_if_no_part_goes_elsewhere(monkeypatch):
    for out, err in ((True, True), (False, True), (True, False), (False, False)):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setattr(sys.stdout, "isatty", lambda out=out: out)
        monkeypatch.setattr(sys.stderr, "isatty", lambda err=err: err)
        assert progress.on_terminal() == (out and err)
