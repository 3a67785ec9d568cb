"""The README's claim on text, in a shorter run: well below a bigram model of the same files, and the tools that use
the run."""

import json

import pytest

from recollect import main

pytestmark = pytest.mark.slow


def test_text_based_ends_far_below_a_bigram_model(capsys, tmp_path):
    folder = tmp_path / "run"
    assert (
        main.main(
            [
                "train",
                "text.based",
                "run.steps=120",
                "run.sample_every=60",
                f"run.directory={folder}",
                "data.held_out_bytes=80000",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "sample: " in out and "sha256" in out
    result = json.loads((folder / "result.json").read_text())
    print(
        f"{result['bits_per_byte']:.3f} bits per byte, bigram {result['bigram_bits_per_byte']:.3f}, "
        f"{result['seconds']:.0f} s"
    )
    assert result["bits_per_byte"] <= result["bigram_bits_per_byte"] - 0.7
    assert set(result["bits_by_slice"]) == {"recall", "rest"}
    capsys.readouterr()
    again = ["generate", str(folder), "--prompt", "import ", "--tokens", "40", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert main.main(again) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("import ") and len(texts[0].encode()) >= 40
    assert main.main(["evaluate", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
