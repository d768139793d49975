"""The example runs, and continues where it was stopped."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gensim")

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_olmoe.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_olmoe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_trains_all_ways_and_prints_a_table(example, tmp_path, capsys):
    example.main(["--steps", "2", "--out", str(tmp_path)])
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [cells[0].strip() for cells in lines] == ["ssr-l", "own-loss", "none"]
    for _, loss, training, serving, dead in lines:
        assert 6 < float(loss) < 10  # eight bits before training
        first, last = map(float, training.split("…"))
        assert 0 < first < 7 and 0 < last < 7 and 0 < float(serving) < 7
        assert 0 <= int(dead) <= 64
    example.make_model(own_loss=False).from_pretrained(tmp_path / "ssr-l" / "model")
    assert {path.name for path in (tmp_path / "ssr-l").iterdir()} == {"checkpoint-1", "checkpoint-2", "model"}
