"""What is followed, in terminals of several widths and in a pipe."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sinkroute.cli import main
from sinkroute.lab.watch.follow import Follower
from sinkroute.lab.watch.terminal import bars, line, screen, watch

from .logs import make_run, train_line


def followed(*paths):
    follower = Follower(paths)
    follower.poll()
    return follower


def drawn(follower, width, height=50):
    console = Console(file=io.StringIO(), width=width, no_color=True, legacy_windows=False)
    console.print(screen(follower, width, height))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal(tmp_path, width):
    for name in ("softmax-seed0", "ssr-l-seed0", "a-rather-long-name-of-a-method-seed0"):
        make_run(tmp_path / "runs" / name, lines=[train_line(step) for step in range(10, 100, 10)])
    shown = drawn(followed(tmp_path / "runs"), width)
    assert max(map(len, shown.splitlines())) <= width
    assert ("4.1000" if width >= 60 else "90/100") in shown and "load of each expert" in shown
    # Side by side where there is room: panels stand on one line.
    assert max(row.count("╭") for row in shown.splitlines()) == min(3, max(1, width // 41))


def test_many_runs_do_not_push_what_moves_off_the_screen(tmp_path):
    for number in range(40):
        run = make_run(tmp_path / "runs" / f"r{number:02}", lines=[train_line(10)])
        if number != 39:
            (run / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
    shown = drawn(followed(tmp_path / "runs"), 100, height=24)
    assert shown.count("\n") <= 24
    assert "r39" in shown and "22 more runs do not fit" in shown


def test_names_are_no_markup(tmp_path):
    make_run(tmp_path / "runs" / "[red]x[bold]", lines=[train_line(10)])
    assert "[red]x[bold]" in drawn(followed(tmp_path / "runs"), 100)


def test_bars_fit_any_number_of_experts():
    assert all(len(bars([1.0] * experts, 30, 2.0).plain) <= 30 for experts in range(1, 300))


def test_a_line_says_what_the_log_says(tmp_path):
    follower = followed(make_run(tmp_path / "run", lines=[train_line(10), train_line(20)]))
    (run,) = follower.runs.values()
    said = (
        "run  step 20/100  loss 4.8000  MaxVio 1.00 (worst layer 2.00)  1,000 tokens/s  softmax 3, sinkhorn 1  2 dead"
    )
    assert line(run, run.last) == said + "  8 s left"


def test_a_pipe_gets_a_line_for_each_new_line_and_the_end(tmp_path):
    run = make_run(tmp_path / "run", lines=[train_line(10), train_line(20)])
    (run / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
    console = Console(file=io.StringIO(), width=40)
    watch(Follower([run]), console)
    said = console.file.getvalue().splitlines()
    assert [words.split("  ")[1] for words in said[:2]] == ["step 10/100", "step 20/100"]
    assert said[2:] == ["run  finished: bits per byte 2.5000"]


def test_once_shows_what_there_is_and_ends(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a", lines=[train_line(10)])
    assert main(["watch", str(tmp_path / "runs"), "--once"]) == 0
    assert "running" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "later"), "--once"]) == 0
    assert "Nothing to follow yet" in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_ends_the_watch_without_a_word_of_error(tmp_path):
    make_run(tmp_path / "runs" / "a", lines=[train_line(10)])
    # What runs in the background of a shell ignores SIGINT, and so would its children.
    main = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import sinkroute.cli as cli; "
    command = [sys.executable, "-u", "-c", main + "sys.exit(cli.main())", "watch", str(tmp_path / "runs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "step 10/100" in process.stdout.readline()
        with (tmp_path / "runs" / "a" / "log.jsonl").open("a") as file:
            file.write(train_line(20))
        assert "step 20/100" in process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "watch needs a RUN: sinkroute watch runs/demo"),
        (["pyproject.toml", "--once", "--serve"], 2, "take one of them"),
        (["x", "--serve", "99999"], 2, "--serve must be a port from 0 to 65535, got 99999"),
        (["no/such/run"], 1, "nor is the folder in which it would be made"),
    ],
)
def test_a_wrong_command_line_is_told(capsys, words, code, message):
    assert main(["watch", *words]) == code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_in_a_terminal_the_screen_is_drawn_anew_until_the_run_has_finished(tmp_path):
    run = make_run(tmp_path / "run", lines=[train_line(10)])
    ours, theirs = os.openpty()
    env = os.environ | {"COLUMNS": "100", "LINES": "40", "TERM": "xterm", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "sinkroute.cli", "watch", str(run)]
    seen = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        while b"10/100" not in seen:
            seen += os.read(ours, 65536)
        with (run / "log.jsonl").open("a") as file:
            file.write(train_line(20))
        while b"20/100" not in seen:
            seen += os.read(ours, 65536)
        (run / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
        try:
            while part := os.read(ours, 65536):
                seen += part
        except OSError:  # Linux says so of a terminal that nobody holds any more
            pass
    os.close(ours)
    assert process.returncode == 0
    assert "2.5000 bits per byte" in seen.decode() and "load of each expert" in seen.decode()
