"""Some 300 random inputs to the public interface; `python -m tests.fuzz` tries more."""

import pytest

from tests.fuzz import AREAS, fuzz

GOOD = {"read", "masks", "loaded", "used"}  # outcomes that show that not every input is refused


@pytest.mark.filterwarnings("ignore")  # Pillow and numpy warn about some inputs
@pytest.mark.parametrize("area", AREAS)
def test_random_inputs_end_as_documented(area, tmp_path, exports):
    outcomes = fuzz(area, 43, tmp_path / "cases", exports)
    assert sum(outcomes.values()) >= 43 and GOOD & set(outcomes), outcomes
