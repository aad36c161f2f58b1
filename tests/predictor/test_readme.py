"""README's Python blocks and the notebook, executed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_gives_masks(block, tmp_path, monkeypatch):
    if "transformers" in block:
        pytest.importorskip("transformers", reason="transformers is not installed: tests/tools run this block")
    photograph = Image.open(ROOT / "examples" / "coffee.jpg")
    photograph.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"image": np.asarray(photograph), "points": [[320, 240]], "labels": [1]}
    exec(block, names)
    assert tuple(names["masks"].shape[-2:]) == (400, 600) and names["masks"].any()


def test_every_notebook_cell_runs(monkeypatch, capsys):
    file = ROOT / "examples" / "quickstart.ipynb"
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(file.parent)
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        assert names.get("masks", np.ones(1)).any()
    printed = [text for cell in cells for output in cell["outputs"] for text in output.get("text", [])]
    shapes = [re.search(r"\(\d+, .*?400, 600\)", text)[0] for text in printed]
    assert len(shapes) == 2 and re.findall(r"\(\d+, .*?400, 600\)", capsys.readouterr().out) == shapes
    assert file.stat().st_size < 150_000
