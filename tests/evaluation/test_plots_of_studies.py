"""Figures of a whole study: colours by mixer, sizes joined, maps, rates, formats, titles."""

import dataclasses
import shutil

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.evaluation.appearance import MIXERS
from recollect.evaluation.plots import (
    NothingToPlot,
    accuracy_by_slice,
    accuracy_map,
    delete_figures,
    draw_all,
    formats_of,
    recall_vs_state,
    score_by_rate,
    throughput_vs_state,
    training_losses,
)
from recollect.evaluation.results import load_runs
from recollect.evaluation.summaries import summarise
from tests.evaluation.folders import write_run
from tests.evaluation.test_plots import figures  # noqa: F401 (a fixture)

SLICES = {"64x4": 0.9, "64x16": 0.7, "128x4": 0.8, "128x16": 0.5, "256x16": 0.2}


def model(mixer, width):
    stage = {"class": "Stage", "pattern": [{"class": "BaseConvolution", "kernel": 3}, {"class": mixer}]}
    return {"class": "LanguageModel", "width": width, "stages": [stage]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Based at two widths, attention and a mixer of a user's, at three rates and two seeds."""
    root, folders = tmp_path_factory.mktemp("study"), []
    for name, mixer, width, score in (
        ("s.based", "LinearAttention", 32, 0.6),
        ("s.based", "LinearAttention", 64, 0.9),
        ("s.attention", "Attention", 64, 1.0),
        ("s.mine", "Mine", 64, 0.4),
    ):
        for index, rate in enumerate((1e-3, 3e-3, 1e-2)):
            for seed in (0, 1):
                accuracy = score * (0.8, 1.0, 0.9)[index] - 0.02 * seed
                slices = {size: accuracy * share for size, share in SLICES.items()}
                state = {"64": 30 * width, "256": 40 * width if mixer != "Attention" else 256 * width}
                folders.append(
                    write_run(
                        root / f"{name}-{width}-{rate}-{seed}",
                        name,
                        rate,
                        seed,
                        model=model(mixer, width),
                        accuracy=accuracy,
                        accuracy_by_slice=slices,
                        state_bytes=state,
                        tokens_per_second=1e5 / width,
                    )
                )
    return load_runs(folders)


def test_a_mixer_has_its_colour_in_every_figure(tmp_path, runs, figures):  # noqa: F811
    draw_all(runs, tmp_path)
    curves = [figure.axes[0] for figure in figures if figure.axes[0].get_xlabel() == "Optimizer steps"]
    assert len(figures) == 7 and len(curves) == 2
    for axes in curves:
        colours = {line.get_label(): line.get_color() for line in axes.lines if line.get_linewidth() == 1.5}
        assert colours["attention"] == MIXERS["Attention"]
        assert colours["based [width=32]"] == colours["based [width=64]"] == MIXERS["LinearAttention"]
        styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
        assert styles["based [width=32]"] != styles["based [width=64]"]


def test_sizes_of_a_mixer_are_joined(tmp_path, runs, figures):  # noqa: F811
    recall_vs_state(summarise(runs), tmp_path / "x.png")
    joined = [line for line in figures[0].axes[0].lines if line.get_linewidth() == 0.9]
    (line,) = joined
    np.testing.assert_allclose(line.get_xdata(), [40 * 32, 40 * 64])
    assert line.get_color() == MIXERS["LinearAttention"]
    assert "sd over seeds" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_categories_are_not_joined(tmp_path, runs, figures):  # noqa: F811
    text = [
        dataclasses.replace(s, metric="bits_per_byte", by_slice={"recall": 1.5, "rest": 1.0}) for s in summarise(runs)
    ]
    accuracy_by_slice(text, tmp_path / "x.png")
    assert {line.get_linestyle() for line in figures[0].axes[0].lines} == {"None"}


def test_a_map_has_a_panel_for_each_architecture(tmp_path, runs, figures):  # noqa: F811
    accuracy_map(summarise(runs), tmp_path / "x.png")
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert len(panels) == 4 and panels[0].get_title() == "attention"
    values = panels[0].images[0].get_array()
    assert values.shape == (2, 3) and values[0, 0] == pytest.approx(99 * 0.9) and values.mask[0, 2]
    lone = [dataclasses.replace(s, by_slice={"64x4": 1.0}) for s in summarise(runs)]
    with pytest.raises(NothingToPlot):
        accuracy_map(lone, tmp_path / "y.png")


def test_rates_losses_and_throughput(tmp_path, runs, figures):  # noqa: F811
    score_by_rate(runs, tmp_path / "a.png")
    line = next(line for line in figures[0].axes[0].lines if line.get_label() == "attention")
    np.testing.assert_allclose(line.get_xdata(), [1e-3, 3e-3, 1e-2])
    np.testing.assert_allclose(line.get_ydata(), [79, 99, 89])
    assert [tick.get_text() for tick in figures[0].axes[0].get_xticklabels()] == ["0.001", "0.003", "0.01"]
    with pytest.raises(NothingToPlot, match="several learning rates"):
        score_by_rate(runs[:1], tmp_path / "b.png")
    training_losses(runs, tmp_path / "c.png")
    assert figures[1].axes[0].get_ylabel() == "Training loss (nats)"
    throughput_vs_state(summarise(runs), tmp_path / "d.png")
    (fast,) = [line for line in figures[2].axes[0].lines if line.get_label() == "based [width=32]"]
    np.testing.assert_allclose(fast.get_ydata(), [1e5 / 32])


def test_formats_and_titles_are_what_was_asked_for(tmp_path, runs, figures):  # noqa: F811
    drawn = draw_all(runs, tmp_path, formats_of("svg, .PDF"), title="study")
    assert (
        len(drawn) == 14
        and {path.suffix for path in drawn} == {".svg", ".pdf"}
        and all(map(type(drawn[0]).is_file, drawn))
    )
    assert {figure.get_suptitle() for figure in figures} >= {"study: learning curves", "study: accuracy by slice"}
    with pytest.raises(UserError, match="gif"):
        formats_of("png,gif")


def test_text_figures_do_not_speak_of_accuracy(tmp_path):
    folder = write_run(
        tmp_path / "a", "text.a", accuracy=None, bits_per_byte=2.0, curve=[(1, 0.5)], bits_by_slice={"a": 1.0}
    )
    names = [path.name for path in draw_all(load_runs([folder]), tmp_path / "out")]
    assert "bits_per_byte_by_slice.png" in names and not any("accuracy" in name for name in names)


def test_only_figures_and_the_folders_that_they_empty_are_deleted(tmp_path, runs):
    names = [path.name for path in draw_all(runs[:6], tmp_path)]
    for task in ("task", "noted"):
        shutil.copytree(tmp_path, tmp_path / task, ignore=lambda folder, files: set(files) - set(names))
    drawn = [folder / name for folder in (tmp_path, tmp_path / "task", tmp_path / "noted") for name in names]
    assert len(names) > 3 and all(path.exists() for path in drawn)
    notes = [tmp_path / "notes.png", tmp_path / "noted" / "notes.txt"]
    for note in notes:
        note.write_text("a user's")
    (tmp_path / "empty").mkdir()
    delete_figures(tmp_path)
    assert not any(path.exists() for path in drawn) and all(note.exists() for note in notes)
    assert (tmp_path / "empty").is_dir() and not (tmp_path / "task").exists()
