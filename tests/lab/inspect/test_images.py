"""Vision models of the lab: what `inspect_images` counts, and the patches of the viewer."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sinkroute.cli import main
from sinkroute.lab.config import Config, DataConfig, ModelConfig, RouterConfig, VisionConfig, write_yaml
from sinkroute.lab.images import load_images, normalise, scale
from sinkroute.lab.inspect import InspectError, inspect_images, write_viewer
from sinkroute.lab.models import make_model
from sinkroute.lab.trained import load_run

from ..browser import Browser
from ..checkpoints import save_checkpoint
from .test_viewer import Page

LENGTH = 17  # a class token and 4 × 4 patches


def saved(folder: Path, config: Config) -> str:
    """A run that was never trained, with gates that are not all alike."""
    model = make_model(config)
    with torch.no_grad():
        for layer in model.moe_layers:
            for weight in layer.gate.parameters():
                weight.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    write_yaml(config, folder / "config.yaml")
    save_checkpoint(folder / "checkpoints", 1, model, torch.optim.AdamW(model.parameters()), {}, keep=1)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"image_size": 8, "channels": 1, "classes": 10, "patch": 2, "layers": 3, "d_model": 16, "heads": 2}
    vision = VisionConfig(**sizes, d_hidden=16, moe_from=1, experts=8, top_k=2)  # type: ignore[arg-type]
    config = Config(data=DataConfig(name="digits"), model=vision, router=RouterConfig("softmax"))
    return saved(tmp_path_factory.mktemp("vit"), config)


def test_loads_are_those_of_the_routes_and_the_viewer_has_the_first_images(run: str, tmp_path: Path) -> None:
    audit = inspect_images(run, tokens=50 * LENGTH + 3, batch=20, viewer_tokens=12 * LENGTH + 1)
    assert (audit.setting.windows, audit.setting.tokens, audit.setting.length) == (50, 50 * LENGTH, LENGTH)
    data = load_images("digits")
    pixels = torch.stack([data.valid[place][0] for place in range(50)])  # type: ignore[misc]
    model = load_run(Path(run)).model.eval()
    with torch.no_grad():
        model(normalise(scale(pixels), data.mean, data.std))
    assert audit.pictures is not None
    assert torch.equal(audit.pictures.pixels, pixels[:12])
    write_viewer([audit], tmp_path / "tokens.html")
    page = Page(tmp_path / "tokens.html")
    told = page.told["checkpoints"][0]
    assert (told["side"], told["window"], len(told["pictures"])) == (4, LENGTH, 12)
    assert told["words"][:2] == ["class", "row 1, column 1"]
    assert told["words"][LENGTH - 1] == "row 4, column 4"
    drawn = Image.open(io.BytesIO(base64.b64decode(told["pictures"][3].partition(",")[2])))
    assert list(drawn.tobytes()) == pixels[3].flatten().tolist()
    for number, (layer, mixture) in enumerate(zip(audit.layers, model.moe_layers, strict=True)):
        counts = Counter(mixture.routes.experts.flatten().tolist())
        assert layer.load is not None
        assert layer.load.tolist() == [counts[expert] for expert in range(8)]
        assert layer.alternatives["balanced"].max_vio_batch < 0.2  # 85 choices an expert, as whole tokens allow
        found = page.layer(0, number)
        assert [set(row) for row in found.experts] == [
            set(row) for row in mixture.routes.experts[: 12 * LENGTH].tolist()
        ]


def test_the_command_takes_a_run_without_a_text(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", run, "--tokens", "400", "--output", str(tmp_path)]) == 0
    assert "391 tokens of digits, the validation images" in capsys.readouterr().out
    assert (tmp_path / "tokens.html").exists()
    for more in (["--text", "file"], ["--length", "17"], ["--by-layer"]):
        assert main(["inspect", run, *more]) == 2
        assert f"{more[0]} is of checkpoints and texts" in " ".join(capsys.readouterr().err.split())
    assert main(["inspect", "some/checkpoint"]) == 2
    assert "--text is missing" in capsys.readouterr().err


def test_a_run_on_text_and_too_few_tokens_are_refused(run: str, tmp_path: Path) -> None:
    text = Config(model=ModelConfig(layers=1, d_model=16, heads=2, d_hidden=16, experts=2, top_k=1))
    with pytest.raises(InspectError, match="is a run on text; export it first: sinkroute export"):
        inspect_images(saved(tmp_path, text))
    with pytest.raises(InspectError, match="tokens=16 are fewer than the 17 of one image; raise --tokens"):
        inspect_images(run, tokens=16)


def test_patches_lie_on_their_image_and_fit_a_phone(run: str, tmp_path: Path, chromium: Browser) -> None:
    audit = inspect_images(run, tokens=6 * LENGTH, viewer_tokens=6 * LENGTH)
    write_viewer([audit], tmp_path / "tokens.html")
    choices = audit.layers[0].choices
    assert choices is not None
    chromium.open(tmp_path / "tokens.html", width=400)
    script = "return panels[0].tokens.map((one) => (one.className.match(/\\be\\d+/) ?? [''])[0])"
    assert chromium.run(script) == [f"e{row[0]}" for row in choices.experts_TK.tolist()]
    places = """
    const picture = panels[0].text.children[2], all = picture.lastChild.getBoundingClientRect();
    return [...picture.lastChild.children].map((one) => one.getBoundingClientRect())
      .map((box) => [Math.round((box.top - all.top) / box.height), Math.round((box.left - all.left) / box.width)]);
    """
    assert chromium.run(places) == [[row, column] for row in range(4) for column in range(4)]
    assert chromium.run("return document.documentElement.scrollWidth <= innerWidth") is True
    assert chromium.errors() == []
