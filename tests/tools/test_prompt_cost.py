import json

from benchmarks.speed import prompt_cost


def test_counts_and_quotients_are_reported(capsys, tmp_path):
    out = tmp_path / "results" / "cost.json"
    prompt_cost.main(["--image-size", "256", "--prompts", "2", "--repeats", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["machine"]["share_of_published"] <= prompt_cost.GOAL
    assert result["machine"]["gmacs_image_part"] > 0
    assert [entry["what"] for entry in result["compared"]] == ["2 prompts, image each time / 2 prompts, image once"]
    assert "gmacs_one_more_prompt" in capsys.readouterr().out
