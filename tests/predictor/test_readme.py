"""README's Python, run as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_gives_masks_of_the_photograph(block, tmp_path, monkeypatch):
    photograph = Image.open(ROOT / "examples" / "coffee.jpg")
    photograph.save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"image": np.asarray(photograph), "points": [[320, 240]], "labels": [1]}
    exec(block, names)
    assert tuple(names["masks"].shape[-2:]) == (400, 600) and names["masks"].any()
