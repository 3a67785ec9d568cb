import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from recollect.configuration import UserError
from recollect.evaluation.plots import accuracy_by_slice, learning_curves, recall_vs_state, score_by_rate
from recollect.evaluation.plots.curves import _mean_curve
from recollect.evaluation.plots.state import _pareto
from recollect.evaluation.results import load_runs
from recollect.evaluation.summaries import summarise
from tests.evaluation.folders import study, write_run

NAMES = ("attention", "based", "window", "convolution", "hyena", "landmark", "mixture_of_heads")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    scores = (1.0, 0.99, 0.4, 0.13, 0.02, 1.0, 0.998)
    return study(
        tmp_path_factory.mktemp("study"), {f"mqar.{name}": score for name, score in zip(NAMES, scores, strict=True)}
    )


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are when saved."""
    from matplotlib.figure import Figure

    kept = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (kept.append(self), save(self, *args, **kwargs))[1]
    )
    return kept


def _png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_figures_are_a_column_wide_at_300_dpi(tmp_path, runs):
    summaries = summarise(runs)
    for draw, what in ((recall_vs_state, summaries), (accuracy_by_slice, summaries), (learning_curves, runs)):
        draw(what, tmp_path / "new" / "figure.png")
        width, height = _png_size(tmp_path / "new" / "figure.png")
        assert width == 990 and 500 < height < 1000


def test_recall_names_cover_neither_each_other_nor_the_data(tmp_path, runs, figures):
    # Six architectures solve the task with nearly the same state.
    crowd = [
        dataclasses.replace(s, best=1 - 0.002 * i, state_bytes={128: 14_000 + 900 * i})
        for i, s in enumerate(summarise(runs)[:6])
    ]
    recall_vs_state([*crowd, summarise(runs)[-1]], tmp_path / "x.png")
    (figure,) = figures
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    texts = figure.legends[0].get_texts()
    boxes = [text.get_window_extent(renderer) for text in texts]
    names = {name.replace("_", " ") for name in NAMES}
    assert {text.get_text() for text in texts} == names | {"Pareto front", "chance (0.781 %)"}
    assert all(box.y1 <= axes.get_window_extent().y0 for box in boxes) and not axes.texts
    # extents carry some air; a point less a side is what is inked
    inked = [(box.x0 + 4, box.y0 + 4, box.x1 - 4, box.y1 - 4) for box in boxes]
    for i, a in enumerate(inked):
        assert a[0] >= 0 and a[2] <= figure.bbox.x1 and a[1] >= 0 and a[3] <= figure.bbox.y1
        for b in inked[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_recall_axis_counts_bytes_in_powers_of_two(tmp_path, runs, figures):
    recall_vs_state(summarise(runs), tmp_path / "x.png")
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == "State size at 128 tokens" and axes.get_ylabel() == "Accuracy (%)"
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert "4 KiB" in labels and 3 <= len(labels) <= 6
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_recall_names_what_it_cannot_place(tmp_path, runs, figures):
    summaries = summarise(runs)
    stateless = dataclasses.replace(summaries[0], state_bytes={}, state_length=None)
    recall_vs_state([stateless, *summaries[1:]], tmp_path / "x.png")
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert f"not shown: {stateless.label.removeprefix('mqar.')}" in texts


def test_pareto_front_keeps_points_that_no_smaller_state_beats():
    sizes, scores = np.array([8, 4, 4, 16, 32, 2.0]), np.array([50, 40, 60, 60, 90, 10.0])
    assert _pareto(sizes, scores) == [5, 2, 4]


def test_slices_are_lines_in_order_of_difficulty(tmp_path, runs, figures):
    accuracy_by_slice(summarise(runs), tmp_path / "x.png")
    axes = figures[0].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64\n×4", "64\n×16", "128\n×8"]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["window"], [40, 40, 20])
    assert set(drawn) == {name.replace("_", " ") for name in NAMES} | {"chance (0.781 %)"}
    styles = {(line.get_color(), line.get_marker()) for line in axes.lines if not line.get_label().startswith("chance")}
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(NAMES)


def test_legend_lies_outside_the_axes(tmp_path, runs, figures):
    accuracy_by_slice(summarise(runs), tmp_path / "x.png")
    figure = figures[0]
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 <= figure.axes[0].get_window_extent().y0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_one_slice_is_bars(tmp_path, runs, figures):
    one = [
        dataclasses.replace(s, by_slice={"64x4": s.best}, spread_by_slice={"64x4": s.spread}) for s in summarise(runs)
    ]
    accuracy_by_slice(one, tmp_path / "x.png")
    axes = figures[0].axes[0]
    assert sorted(round(bar.get_width(), 6) for bar in axes.patches) == sorted(round(100 * s.best, 6) for s in one)
    assert axes.texts[0].get_text() == "2.0" and len(axes.texts) == len(NAMES)


def test_spread_never_reaches_beyond_what_accuracy_can_be(tmp_path, runs, figures):
    wide = [
        dataclasses.replace(s, spread=0.5, by_slice={"64x4": s.best}, spread_by_slice={"64x4": 0.5})
        for s in summarise(runs)
    ]
    recall_vs_state(wide, tmp_path / "x.png")
    accuracy_by_slice(wide, tmp_path / "y.png")
    for figure, axis in zip(figures, (1, 0), strict=True):
        ends = [segment[:, axis] for lines in figure.axes[0].collections for segment in lines.get_segments()]
        assert len(ends) == len(NAMES) and all(end.min() >= -1e-9 and end.max() <= 100 + 1e-9 for end in ends)


def test_curves_draw_every_member_and_the_best_mean(tmp_path, runs, figures):
    learning_curves(runs, tmp_path / "x.png")
    lines = figures[0].axes[0].lines
    bold = {line.get_label(): line for line in lines if line.get_linewidth() == 1.5}
    explained = {line.get_label() for line in lines if not len(line.get_xdata())}
    assert explained == {"thin: one run", "bold: mean at the best rate"}
    bold = {name: line for name, line in bold.items() if name not in explained}
    assert sum(line.get_linewidth() == 0.5 for line in lines) == len(runs) + 1 and len(bold) == len(NAMES)
    np.testing.assert_allclose(bold["window"].get_ydata(), [10, 40])


def test_curves_of_text_are_over_tokens(tmp_path, figures):
    folder = write_run(tmp_path / "a", name="text.a", accuracy=None, bits_per_byte=2.0, curve=[(100, 0.5)])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "data": {"class": "Text", "length": 500}}))
    lines = [{"step": step, "evaluation": {"bits_per_byte": bits}} for step, bits in ((100, 3.0), (200, 2.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    learning_curves(load_runs([folder]), tmp_path / "x.png")
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == "Millions of tokens" and axes.get_ylabel() == "Bits per byte"
    np.testing.assert_allclose(axes.lines[-1].get_xdata(), [100 * 64 * 500 / 1e6, 200 * 64 * 500 / 1e6])


def test_mean_curve_holds_the_last_value_of_a_run_that_stopped():
    long = (np.array([100, 200, 300]), np.array([0.0, 0.5, 0.5]))
    short = (np.array([100, 200]), np.array([0.5, 1.0]))
    steps, mean = _mean_curve([long, short])
    np.testing.assert_array_equal(steps, [100, 200, 300])
    np.testing.assert_allclose(mean, [0.25, 0.75, 0.75])


def test_text_has_bits_per_byte(tmp_path, runs, figures):
    text = [
        dataclasses.replace(s, metric="bits_per_byte", by_slice={"all": 1.5, "rest": 1.75}, chance=None)
        for s in summarise(runs)
    ]
    accuracy_by_slice(text, tmp_path / "x.png")
    assert figures[0].axes[0].get_ylabel() == "Bits per byte"
    np.testing.assert_allclose(figures[0].axes[0].lines[0].get_ydata(), [1.5, 1.75])
    with pytest.raises(UserError, match="no architecture with an accuracy"):
        recall_vs_state(text, tmp_path / "y.png")
    with pytest.raises(UserError, match="cannot share a figure"):
        accuracy_by_slice([text[0], summarise(runs)[0]], tmp_path / "y.png")


def test_empty_input_is_a_user_error(tmp_path):
    for draw in (recall_vs_state, accuracy_by_slice, learning_curves):
        with pytest.raises(UserError, match="to plot"):
            draw([], tmp_path / "x.png")
    with pytest.raises(UserError, match="to plot"):
        learning_curves(load_runs([write_run(tmp_path / "a", curve=[])]), tmp_path / "x.png")


def test_bad_paths_are_user_errors(tmp_path, runs):
    with pytest.raises(UserError, match=r"ends in .png"):
        recall_vs_state(summarise(runs), tmp_path / "x.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        recall_vs_state(summarise(runs), tmp_path / "file" / "x.png")


def test_a_single_architecture_with_one_seed_can_be_drawn(tmp_path, runs):
    (summary,) = summarise(runs[:1])
    assert math.isnan(summary.spread)
    for draw in (recall_vs_state, accuracy_by_slice):
        draw([summary], tmp_path / "x.png")
    assert _png_size(tmp_path / "x.png")[0] == 990


def test_drawing_leaves_the_users_settings_alone(tmp_path, runs):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        recall_vs_state(summarise(runs), tmp_path / "a.png")
    recall_vs_state(summarise(runs), tmp_path / "b.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_importing_costs_neither_matplotlib_nor_jax():
    code = (
        "import sys, recollect.evaluation.plots, recollect.evaluation.table; "
        "print([name for name in ('matplotlib', 'jax', 'flax') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_any_name_and_infinite_values_are_drawn(tmp_path, runs, figures):
    strange = "mine $\\frac$ \x07\n"
    summaries = [
        dataclasses.replace(s, label=f"{strange}{i}", by_slice={"a$b\x00": value}, spread_by_slice={})
        for i, (s, value) in enumerate(zip(summarise(runs), (0.5, math.inf, 0.1, math.nan), strict=False))
    ]
    text = [dataclasses.replace(s, metric="bits_per_byte") for s in summaries]
    for index, shown in enumerate((summaries, text)):
        accuracy_by_slice(shown, tmp_path / f"{index}.png")
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert len(names) == 4 and all("$\\frac$" in name and "\x07" not in name for name in names)
    assert [note.get_text() for note in figures[1].axes[0].texts].count("inf") == 1
    recall_vs_state(summaries, tmp_path / "state.svg")


def test_long_labels_leave_room_for_the_axes(tmp_path, runs, figures, recwarn):
    field = "stages.0.pattern.1.mixer.positions.fraction=0.123456789"
    summaries = [dataclasses.replace(s, label=f"{s.label} [{field}, {field}, {field}]") for s in summarise(runs)[:3]]
    one = [dataclasses.replace(s, by_slice={"64x4": 0.5}, spread_by_slice={}) for s in summaries]
    accuracy_by_slice(one, tmp_path / "bars.png")
    recall_vs_state(summaries, tmp_path / "state.png")
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]


def test_the_front_leaves_out_what_only_guesses(tmp_path, runs, figures):
    guess, other = (dataclasses.replace(s, chance=0.0625) for s in summarise(runs)[:2])
    recall_vs_state([dataclasses.replace(guess, best=0.05, state_bytes={128: 8}), other], tmp_path / "x.png")
    recall_vs_state([dataclasses.replace(guess, best=0.05)], tmp_path / "y.png")
    (front,) = [line for line in figures[0].axes[0].lines if line.get_label() == "Pareto front"]
    assert list(front.get_ydata()) == [100 * other.best] * 2
    assert not [line for line in figures[1].axes[0].lines if line.get_label() == "Pareto front"]


def test_a_far_rate_that_diverged_does_not_stretch_the_axis(tmp_path, figures):
    rates = {1e-3: "finished", 1e-2: "finished", 1e30: "diverged"}
    folders = [write_run(tmp_path / f"{rate}", rate=rate, status=status) for rate, status in rates.items()]
    score_by_rate(load_runs(folders), tmp_path / "x.png")
    assert figures[0].axes[0].get_xlim()[1] < 1


def test_architectures_of_one_name_keep_their_labels_where_one_lies_beyond_the_axis(tmp_path, figures):
    for mixer, rates, status in (("Attention", (1e-3, 3e-3), "finished"), ("Hyena", (10.0, 30.0), "diverged")):
        model = {"class": "LanguageModel", "stages": [{"class": "Stage", "pattern": [{"class": mixer}]}]}
        for rate in rates:
            write_run(tmp_path / f"{mixer}-{rate}", "mqar.one", rate, model=model, status=status)
    score_by_rate(load_runs(sorted(tmp_path.iterdir())), tmp_path / "r.png")
    names = figures[0].axes[0].get_legend_handles_labels()[1]
    assert [name for name in names if "chance" not in name] == ["one [pattern.0=Attention]"]
