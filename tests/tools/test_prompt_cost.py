import json

from benchmarks.speed import prompt_cost


def test_counts_and_speedup_are_reported(capsys, tmp_path):
    out = tmp_path / "cost.json"
    prompt_cost.main(["--image-size", "256", "--prompts", "2", "--repeats", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["share_of_published"] <= prompt_cost.GOAL
    assert result["gmacs_image_share"] > 0 and set(result["speedup"]) == {"2"}
    assert "one more prompt" in capsys.readouterr().out
