"""The command line as a user meets it: exit codes, messages, files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sinkroute.cli import main
from sinkroute.routing import list_routers

SMALL = """
data: {name: text, path: PATH, length: 32}
model: {layers: 1, d_model: 32, heads: 2, d_hidden: 16, experts: 4, top_k: 2}
router: {name: ssr-s, options: {probability: 0.2}}
train: {steps: 12, batch: 4, warmup: 2, log_every: 4, checkpoint_every: 6}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "few"], 8000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def small(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("PATH", str(text)))
    return path


def sinkroute(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output, errors; lines joined, since rich wraps at the width of the terminal."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as exit_:  # tyro's own errors and --help
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def test_without_arguments_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = sinkroute(capsys)
    assert code == 2
    assert all(f"sinkroute {name}" in out for name in ("demo", "train", "evaluate", "export", "report", "bench"))
    assert sinkroute(capsys, "--help")[0] == 0


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "export", "report", "bench"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = sinkroute(capsys, command, "--help")
    assert code == 0
    assert "usage" in out
    assert "--out" in out or command == "evaluate"


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sinkroute(capsys, "trian")
    assert (code, "did you mean 'train'" in err) == (2, True)


def test_train_evaluate_report(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("--train.lr", "5e-3", "--router.options.noise", "1e-1", "--router.options.draw=layer")
    code, out, _ = sinkroute(capsys, "train", small, "--out", run, *overrides)
    assert code == 0, out
    assert "ssr-s" in out
    config = (run / "config.yaml").read_text()
    assert "lr: 0.005" in config
    assert "probability: 0.2" in config
    assert "noise: 0.1" in config
    result = json.loads((run / "result.json").read_text())
    assert result["valid"]["bytes"] > 1000
    assert result["attacked"]["word-swap"]["bytes"] != result["valid"]["bytes"]

    code, out, _ = sinkroute(capsys, "evaluate", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["valid"] == result["valid"]
    assert found["serving"] == result["serving"]
    code, out, _ = sinkroute(capsys, "evaluate", run, "--split", "test")
    assert code == 0
    assert "test split" in out
    assert "MaxVio" in out

    page = tmp_path / "page.html"
    code, out, _ = sinkroute(capsys, "report", run, "--out", page, "--picture", tmp_path / "p.png")
    assert code == 0
    assert page.read_text().rstrip().endswith("</html>")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_exported_and_what_has_no_architecture_is_refused(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "hf"
    assert sinkroute(capsys, "train", small, "--out", run)[0] == 0
    code, out, _ = sinkroute(capsys, "export", run, "--output", output)
    assert code == 0
    assert "MixtralForCausalLM of step-000012" in out
    assert json.loads((output / "config.json").read_text())["model_type"] == "mixtral"
    code, _, err = sinkroute(capsys, "export", run, "--output", run)
    assert code == 1
    assert "holds something else than an earlier export" in err
    gelu = tmp_path / "gelu"
    assert sinkroute(capsys, "train", small, "--out", gelu, "--model.activation", "gelu")[0] == 0
    code, _, err = sinkroute(capsys, "export", gelu, "--output", output)
    assert code == 1
    assert "model.activation='gelu' cannot be exported" in err


STREAM = """
data: {name: NAME, path: PATH, length: 16}
model: {name: stream, layers: 2, d_model: 16, heads: 2, span: 16, d_hidden: 8, experts: 4}
router: {name: ssr-l, options: {probability: 0.2}}
train: {steps: 6, batch: 4, warmup: 2, log_every: 2, checkpoint_every: 6}
eval: {batch: 4, limit: 400, attacks: {word-swap: {rate: 0.1}, word-swap@half: {rate: 0.5}}}
"""


@pytest.fixture
def stream(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "stream.yaml"
    path.write_text(STREAM.replace("NAME", "text").replace("PATH", str(text)))
    return path


def test_a_stream_of_bytes_is_trained_evaluated_and_reported_and_not_exported(
    capsys: pytest.CaptureFixture[str], stream: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = sinkroute(capsys, "train", stream, "--out", run, "--model.dropout", "0.2")
    assert code == 0, err
    assert "bits/byte" in out and "word-swap@half" in out
    assert "dropout: 0.2" in (run / "config.yaml").read_text()
    result = json.loads((run / "result.json").read_text())
    code, out, _ = sinkroute(capsys, "evaluate", run, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["valid"], found["attacked"]) == (result["valid"], result["attacked"])
    assert sinkroute(capsys, "evaluate", run, "--inference", "both", "--split", "test")[0] == 0
    assert sinkroute(capsys, "report", run, "--out", tmp_path / "p.html")[0] == 0
    code, _, err = sinkroute(capsys, "export", run, "--output", tmp_path / "hf")
    assert code == 1
    assert "model.name='stream' cannot be exported: only the compact decoder" in err
    assert "architecture in transformers" in err


def test_words_are_trained_evaluated_and_reported_in_perplexity_and_not_exported(
    capsys: pytest.CaptureFixture[str], stream: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkroute.lab.data import Vocabulary
    from sinkroute.lab.data.corpus import encoded_corpus
    from sinkroute.lab.data.registry import CORPORA

    words = Vocabulary((*(f"word{number}" for number in range(300)), "<eos>", "AAA"))
    ids = np.random.default_rng(0).integers(300, size=3000)
    corpus = encoded_corpus("of-words", "drawn", words, ids, ids[:500], ids[500:900])
    monkeypatch.setitem(CORPORA, "of-words", lambda path: corpus)
    run, data = tmp_path / "run", ("--data.name", "of-words")
    code, _, err = sinkroute(capsys, "train", stream, "--out", run, *data)
    assert code == 1
    assert "model.vocab must be 302 or more, got 256" in err
    code, out, err = sinkroute(capsys, "train", stream, "--out", run, *data, "--model.vocab", "302")
    assert code == 0, err
    assert "perplexity" in out and "byte" not in out
    code, out, _ = sinkroute(capsys, "evaluate", run)
    assert code == 0
    assert "perplexity" in out and "bits per symbol" in out and "word-swap@half" in out
    page = tmp_path / "p.html"
    assert sinkroute(capsys, "report", run, "--out", page)[0] == 0
    assert "has finished: valid perplexity" in page.read_text()
    other = tmp_path / "decoder"
    assert sinkroute(capsys, "train", small, "--out", other, *data, "--model.vocab", "302")[0] == 0
    code, _, err = sinkroute(capsys, "export", other, "--output", tmp_path / "hf")
    assert code == 1
    assert "data.name='of-words' cannot be exported" in err
    of_bytes = tmp_path / "of-bytes"
    assert sinkroute(capsys, "train", stream, "--out", of_bytes)[0] == 0
    code, _, err = sinkroute(capsys, "report", run, of_bytes, "--out", tmp_path / "both.html")
    assert code == 1
    assert "not measured alike, run in perplexity; of-bytes in bits per byte" in err


@pytest.mark.parametrize("name", ["e[/]x[red]", "e\\[red]x"])
def test_names_of_folders_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    run, output = f"{name}/run", f"{name}/hf"
    for words, said in [
        (("train", small, "--out", run), f"Run: {run}; a report of it: sinkroute report {run}"),
        (("evaluate", run), f"{run} at step-000012"),
        (("export", run, "--output", output), f"{output}: MixtralForCausalLM"),
        (("report", run, "--out", f"{name}/p.html", "--picture", f"{name}/p.svg"), f"Report: {name}/p.html Picture:"),
    ]:
        code, out, err = sinkroute(capsys, *words)
        assert code == 0, err
        assert said in out
    assert f"Picture: {name}/p.svg" in out


@pytest.mark.parametrize("option", ["--lm-eval", "--lm_eval"])
def test_lm_eval_without_a_task_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str], option: str) -> None:
    code, _, err = sinkroute(capsys, "evaluate", "runs/none", option)
    assert code == 2
    assert "--lm-eval needs a TASK" in err


def test_a_finished_run_is_not_trained_again(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    assert sinkroute(capsys, "train", small, "--out", tmp_path / "run")[0] == 0
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert sinkroute(capsys, "train", small, "--out", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_another_router_does_not_inherit_the_presets_options(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    code, _, err = sinkroute(capsys, "train", small, "--out", tmp_path / "run", "--router.name", "softmax")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train"], 2, "train needs a CONFIG"),
        (["train", "CONFIG", "--train.lrr", "1"], 2, "--train.lr"),
        (["train", "CONFIG", "--router.name", "srr-l"], 1, "unknown router 'srr-l'; did you mean 'ssr-l'?"),
        (["train", "CONFIG", "--router.options.probabilty", "1"], 1, "did you mean 'probability'?"),
        (["train", "CONFIG", "--router.options.probability", "2"], 1, "probability must be between 0 and 1, got 2"),
        (["train", "CONFIG", "--router.options.reg", "[1]"], 1, "router.options.reg must be a number, a word, true or"),
        (["train", "CONFIG", "--router.options.reg", "0"], 1, "reg must be a finite number above 0, got 0"),
        (["train", "CONFIG", "--model.top-k", "9"], 1, "top_k must be between 1 and num_experts=4, got 9"),
        (["train", "CONFIG", "--router.options.noise"], 2, "needs a value"),
        (["train", "CONFIG", "--model.name", "stream"], 2, "invalid choice 'stream' for argument '--model.name'"),
        (["train", "CONFIG", "--model.span", "9"], 2, "--model.span"),
        (
            ["train", "CONFIG", "--router.name", "softmax", "--eval.inference", "noise"],
            1,
            "'softmax' serves in one way",
        ),
        (["train", "CONFIG", "--data.path", "/none/such.txt"], 1, "/none/such.txt"),
        (["train", "CONFIG", "--data.name", "enwik8", "--data.path", "CONFIG"], 1, "100,000,000"),
        (["train", "CONFIG", "--data.name", "enwik9"], 1, "did you mean 'enwik8'"),
        (["train", "CONFIG", "--data.length", "30000"], 1, "length"),
        (["train", "/none.yaml"], 1, "no configuration at /none.yaml"),
        (["train", "nosuch"], 1, "pass a YAML file or a preset: digits-vit, enwik8-medium"),
        (["train", "demo"], 1, "demo is a comparison of several methods, not one run: sinkroute demo. Presets of one"),
        (["train", "demo-paper"], 1, "not one run: sinkroute demo demo-paper. Presets of one run: digits-vit"),
        (["train", "study/dual"], 1, "not one run: sinkroute compare study/dual. Presets of one run: digits-vit"),
        (["train", "paper-lm"], 1, "not one run: sinkroute compare paper-lm."),
        (["models", "demo"], 1, "demo is a comparison of several methods, not one run: sinkroute demo."),
        (["models", "wikipedia-srr"], 1, "did you mean 'wikipedia-ssr'?"),
        (["train", "CONFIG", "--data.name", "wikipedia-srr"], 1, "unknown corpus 'wikipedia-srr'; did you mean"),
        (["train", "wikipedia-srr"], 1, "no configuration at wikipedia-srr; did you mean 'wikipedia-ssr'? Pass a YAML"),
        (["compare", "study/dul"], 1, "did you mean 'study/dual'?"),
        (["evaluate", "/none"], 1, "is no run"),
        (["export", "/none", "--output", "/none/hf"], 1, "is no run"),
        (["report"], 2, "report needs a RUN"),
        (["report", "/none"], 1, "/none"),
        (["bench", "--sizes", "4096x16"], 1, "a size must be TOKENSxEXPERTSxTOP_K, such as 4096x16x2, got '4096x16'"),
        (["bench", "--routers", "srr-l"], 1, "did you mean 'ssr-l'?"),
        (["demo", "--only", "sofmax"], 1, "did you mean 'softmax'?"),
        (["demo", "nosuch", "--only", "softmax"], 1, "demo, demo-paper"),
    ],
)
def test_errors_name_the_value_and_the_cure_without_a_traceback(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    words = [str(small) if word == "CONFIG" else word for word in words]
    if words[0] == "demo" or (words[0] == "train" and len(words) > 1):
        words += ["--out", str(tmp_path / "run")]
    got, out, err = sinkroute(capsys, *words)
    assert got == code, err
    assert message in out + err
    assert "Traceback" not in out + err


def test_a_folder_of_runs_is_answered_with_the_runs_in_it(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        assert sinkroute(capsys, "train", small, "--out", f"runs/{name}", "--train.steps", "2")[0] == 0
    for words in (("evaluate", "runs"), ("export", "runs", "--output", "hf")):
        code, _, err = sinkroute(capsys, *words)
        assert (code, "runs is no run but holds 2; pass one of them: runs/one, runs/two" in err) == (1, True)
    code, _, err = sinkroute(capsys, "train", "runs/one")
    assert code == 1
    assert "runs/one is a run; its configuration is runs/one/config.yaml, and --out runs/one continues it" in err
    assert "it is a file" in sinkroute(capsys, "evaluate", small)[2]
    assert sinkroute(capsys, "train", "runs/one/config.yaml", "--out", "runs/one")[0] == 0


def test_a_wrong_command_line_says_whose_help_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert sinkroute(capsys, "report")[2].endswith("Try: sinkroute report --help")
    assert sinkroute(capsys, "nosuch")[2].endswith("Try: sinkroute --help")


def test_bench_prints_a_table_and_keeps_what_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "routing.json"
    words = ("bench", "--sizes", "64x4x2", "--routers", "load-balance", "--seconds", "0.1", "--out", out)
    code, said, _ = sinkroute(capsys, *words)
    assert code == 0
    assert "64 tokens, 4 experts, top-2" in said
    assert "load-balance" in said
    figures = out.read_text()
    assert sinkroute(capsys, *words)[0] == 0
    assert out.read_text() == figures
    code, _, err = sinkroute(capsys, *words, "--seed", "1")
    assert code == 1
    assert "--fresh" in err


def test_a_damaged_checkpoint_is_an_error_with_a_cure(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert sinkroute(capsys, "train", small, "--out", run)[0] == 0
    (run / "checkpoints" / "step-000012" / "model.safetensors").write_bytes(b"short")
    code, _, err = sinkroute(capsys, "evaluate", run)
    assert code == 1
    assert "damaged" in err
    assert "step-000006" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_train_with_130_and_the_same_command_continues(
    small: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sinkroute.cli", "train", str(small), "--out", str(run), "--train.steps", "3000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _wait_for(run / "log.jsonl")
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continues from there" in " ".join(out.split())
    assert out.count(f"step {max(int(path.name[5:]) for path in (run / 'checkpoints').iterdir())}") == 1, "said once"
    kept = max(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        lines = (run / "log.jsonl").read_text().count("\n")
        _wait_for(run / "log.jsonl", more_than=lines)
        process.kill()
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()[: lines + 1]]
    assert steps == sorted(set(steps)), "steps were lost or done twice"
    assert kept in steps


def test_an_interrupted_demo_leaves_a_report_of_what_there_is(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    settings = ["--train.steps", "150", "--train.log-every", "5", "--model.layers", "1", "--train.batch", "2"]
    data = ["--data.name", "text", "--data.path", str(text), "--data.length", "32"]
    command = [sys.executable, "-m", "sinkroute.cli", "demo", "--out", str(out), *settings, *data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _wait_for(out / "loss-free-seed0" / "log.jsonl")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    page = (out / "report.html").read_text()
    assert "interrupted at step" in page
    assert " ".join(said.split()).count("interrupted at step") == 1
    assert " left" in said
    assert "load-balance" in page
    assert (out / "load-balance-seed0" / "result.json").exists()
    assert not (out / "loss-free-seed0" / "result.json").exists()
    assert "Interrupted" in said
    # The same command finishes what is left and keeps what is done.
    kept = (out / "softmax-seed0" / "result.json").stat().st_mtime_ns
    subprocess.run([*command, "--only", "softmax", "load-balance", "loss-free"], check=True, stdout=subprocess.DEVNULL)
    assert (out / "loss-free-seed0" / "result.json").exists()
    assert (out / "softmax-seed0" / "result.json").stat().st_mtime_ns == kept


def _wait_for(path: Path, more_than: int = 0) -> None:
    """Until the file has more lines than that."""
    end = time.monotonic() + 240
    while not path.exists() or path.read_text().count("\n") <= more_than:
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("command", ["demo", "train", "evaluate", "export", "inspect", "report", "bench"])
def test_only_what_keeps_checkpoints_is_said_to_continue_after_an_interruption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sinkroute.commands.{command}.run", interrupted)
    code, _, err = sinkroute(capsys, command)
    assert code == 130
    continued = " The same command continues from the last checkpoint." if command in ("demo", "train") else ""
    assert err == "Interrupted." + continued


@pytest.mark.parametrize(("command", "continues"), [("demo", True), ("export", False)])
def test_a_full_disk_is_told_as_such(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, continues: bool
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"sinkroute.commands.{command}.run", full)
    code, _, err = sinkroute(capsys, command)
    assert code == 1
    assert "the disk is full" in err
    assert ("continues from the last checkpoint" in err) is continues


def test_routers_lists_the_ways_of_routing_and_the_options_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routers"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_routers())
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["routers", "ssr-fold"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("probability", "rate", "gate", "norm_topk"))


def test_routers_answers_a_wrong_name_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routers", "ssr_l"]) != 0
    assert "did you mean 'ssr-l'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    run = [sys.executable, "-c", "import sys; from sinkroute.cli import main; sys.exit(main(sys.argv[1:]))", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    found = subprocess.run(run, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    os.close(write)
    assert found.stderr == ""
    assert found.returncode in (1, 141)  # 1: rich's own way to end
