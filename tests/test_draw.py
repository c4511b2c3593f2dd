"""common/draw.py: deterministic pixels, honest axes, legible whatever it is given."""

import hashlib
import math

import numpy as np
import pytest
from PIL import Image

from common import axes, draw

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)                      # the first two colours of the palette


def close(image, color, tolerance=12):
    """Where the picture shows a colour; anti-aliased edges are further off than 12 grey levels."""
    return (np.abs(np.asarray(image).astype(int) - color).max(-1) <= tolerance)


def pictures():
    r = np.random.RandomState(0)
    xs = np.arange(500)
    images = r.randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    return dict(
        lines=draw.lines({"a": (xs, r.randn(500)), "b": (xs, xs / 99, xs / 99 - 1, xs / 99 + 1)}, title="t"),
        scatter=draw.scatter({"p": r.randn(50, 2), "q": r.randn(50, 2)}),
        bars=draw.bars({"ours": (1.6, 1.5, 1.8), "paper": 1.54, "later": None}),
        hist=draw.hist({"p": r.randn(200), "q": r.randn(200) + 1}),
        heat=draw.heat(r.rand(3, 4), ["a", "b", "c"], list("wxyz"), signed=True),
        arrows=draw.arrows(r.randn(9, 2), r.randn(9, 2), r.randn(20, 2)),
        grid=draw.grid(images, labels=[str(i) for i in range(6)]),
        sheet=draw.sheet({"left": images[0], "right": images[1]}, title="two"))


def test_same_input_gives_the_same_png_bytes(tmp_path):
    hashes = []
    for turn in range(2):
        for name, image in pictures().items():
            draw.save(image, tmp_path / f"{name}.png")
        hashes.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest()
                       for p in sorted(tmp_path.glob("*.png"))})
    assert hashes[0] == hashes[1] and len(set(hashes[0].values())) == 8


def test_saved_png_holds_the_pixels_and_leaves_no_part_behind(tmp_path):
    image = pictures()["lines"]
    draw.save(image, tmp_path / "deep" / "x.png")
    assert (np.asarray(Image.open(tmp_path / "deep" / "x.png")) == np.asarray(image)).all()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.png"]


@pytest.mark.parametrize("log", [False, True])
def test_a_point_is_drawn_where_the_axes_say(log):
    lim = (1.0, 1000.0)
    plot = axes.Plot((400, 300), lim, lim, log=(log, log))
    (x, y), = plot.px([10.0], [100.0])
    x0, y0, x1, y1 = plot.frame
    share = [(math.log10(v) / 3 if log else (v - 1) / 999) for v in (10.0, 100.0)]
    assert x == pytest.approx(x0 + share[0] * (x1 - x0)) and y == pytest.approx(y1 - share[1] * (y1 - y0))
    plot.dot(x, y, 4, axes.color(0))
    rows, cols = np.nonzero(close(plot.done(), BLUE))
    assert abs(cols.mean() + 0.5 - x) < 1 and abs(rows.mean()
                                                  + 0.5 - y) < 1        # a pixel has its centre at 0.5


def test_a_line_passes_through_its_data():
    xs = np.linspace(0, 1, 200)
    image = draw.lines({"": (xs, xs)}, size=(400, 300))
    rows, cols = np.nonzero(close(image, BLUE))
    slope, _ = np.polyfit(cols, rows, 1)
    assert slope < -0.5 and np.corrcoef(cols, rows)[0, 1] < -0.999                   # straight, rising


def test_gaps_stay_gaps():
    ys = np.ones(300)
    ys[100:200] = np.nan
    columns = close(draw.lines({"": (np.arange(300), ys)}, size=(400, 300)), BLUE).any(0)
    drawn = np.nonzero(columns)[0]
    assert np.diff(drawn).max() > 0.3 * (drawn[-1] - drawn[0])


def test_a_long_curve_keeps_its_spike():
    ys = np.zeros(100_000)
    ys[54_321] = 1
    image = draw.lines({"": (np.arange(100_000), ys)}, size=(400, 300))
    rows = np.nonzero(close(image, BLUE, 60).any(1))[0]                              # 1 pixel wide: paler
    assert rows.min() < 60 and rows.max() > 200


def test_a_long_curve_is_drawn_from_few_points_with_both_its_extremes():
    ys = np.zeros(100_000)
    ys[54_321], ys[77_777] = 1, -1
    piece, = axes.pieces(np.stack([np.arange(100_000), ys], 1), most=400)
    assert len(piece) <= 400 and [54_321, 1] in piece and [77_777, -1] in piece


@pytest.mark.parametrize("lo, hi", [(0, 1), (-3, 7), (1e-9, 2e-9), (1e6, 1e6 + 3), (-1e12, 5e11), (0, 97)])
def test_linear_ticks_are_round_ordered_and_inside(lo, hi):
    found = draw.ticks(lo, hi, 6)
    assert 3 <= len(found) <= 12 and found == sorted(found)
    step = found[1] - found[0]
    assert found[0] >= lo - 1e-6 * step and found[-1] <= hi + 1e-6 * step
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    # (1e6 + 1) - 1e6 style differences lose 6 digits of 16, hence 1e-6
    assert any(mantissa == pytest.approx(m, rel=1e-6) for m in (1, 2, 5, 10))


@pytest.mark.parametrize("lo, hi", [(1e-6, 1e6), (0.5, 3e4), (1, 50), (2, 3)])
def test_log_ticks_are_inside_and_at_least_two(lo, hi):
    found = draw.ticks(lo, hi, 6, log=True)
    assert len(found) >= 2 and found == sorted(found) and lo <= found[0] and found[-1] <= hi * (1 + 1e-9)


@pytest.mark.parametrize("value, text", [(0, "0"), (1.0, "1"), (0.1 + 0.2, "0.3"), (12_000, "12k"),
                                         (1.5e6, "1.5M"),
                                         (2e9, "2G"), (2e-5, "2e-5"), (1e15, "1e15"), (math.nan, "-"),
                                         (-3.25, "-3.25")])
def test_numbers_are_short(value, text):
    assert draw.number(value) == text


def test_tick_labels_never_repeat_on_a_narrow_axis():
    plot = axes.Plot((400, 300), (0, 1), (1000.0009, 1000.0011))
    labels = [t for _, t in plot.marks(1, 250, 48, None)]
    assert len(labels) >= 3 and len(set(labels)) == len(labels)


def test_the_legend_lies_above_the_data():
    marks, names = [], [f"a rather long name {i}" for i in range(12)]
    plot = axes.Plot((500, 400), (0, 1), (0, 1), "title", "x", "y", names, lambda c, i, x, y: marks.append(y))
    assert len(marks) == 12 and len(set(marks)) > 2                                   # it wrapped
    assert max(marks) + 8 < plot.frame[1] and plot.frame[3] > plot.frame[1] + 100


def test_error_band_covers_low_to_high():
    xs = np.arange(10)
    plain = draw.lines({"": (xs, xs * 0 + 5.0)}, size=(400, 300))
    band = draw.lines({"": (xs, xs * 0 + 5.0, xs * 0 + 0.0, xs * 0 + 10.0)}, size=(400, 300))
    tinted = lambda im: (np.abs(np.asarray(im).astype(int) - 255).max(-1) > 20).mean()
    assert tinted(band) > tinted(plain) + 0.5


def test_bar_lengths_are_in_proportion():
    image = draw.bars({"a": 1.0, "b": 2.0, "c": None})
    lengths = close(image, BLUE).sum(1)
    found = sorted({int(v) for v in lengths if v > 20})
    assert found[-1] / found[0] == pytest.approx(2, abs=0.03)                # whole pixels of about 200


def test_heat_map_is_monotone_in_brightness():
    image = np.asarray(draw.heat(np.linspace(0, 1, 40)[None], size=(600, 200)).convert("L")).astype(int)
    plot = axes.Plot((600, 200), (0, 40), (1, 0), names=((), ()), right=88)
    row = image[int((plot.frame[1] + plot.frame[3]) / 2),
                [int(plot.px([i + 0.5], [0.5])[0][0]) for i in range(40)]]
    assert (np.diff(row) > 0).all()


def test_equal_axes_keep_circles_round():
    t = np.linspace(0, 2 * math.pi, 400)
    image = draw.scatter({"": np.stack([np.cos(t), np.sin(t)], 1)}, size=(700, 400))
    rows, cols = np.nonzero(close(image, BLUE, 80))
    assert np.ptp(rows) == pytest.approx(np.ptp(cols), abs=2)


def test_arrows_point_along_their_vectors():
    p, v = np.zeros((1, 2)), np.array([[1.0, 0.0]])
    image = draw.arrows(np.concatenate([p, [[3.0, 2.0]]]), np.concatenate([v, [[0.0, 0.0]]]), scale=1.0)
    ink = close(image, (31, 35, 40), 10)
    ink[:40] = False                                                                 # the title
    rows, cols = np.nonzero(ink)
    assert np.ptp(cols) > 5 * np.ptp(rows)
    assert np.ptp(rows) > 3 and cols[rows == rows.min()].mean() > cols.mean()        # the head is right


def test_grid_keeps_pixels_exact():
    x = np.random.RandomState(0).randint(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    out = np.asarray(draw.grid(x, columns=3, scale=2, pad=2))
    assert out.shape == (2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3)
    tile = out[12:20, 16:28]                                    # image 4: second row, second column
    assert (tile == x[4].repeat(2, 0).repeat(2, 1)).all()


def test_sheet_holds_every_panel():
    panels = {"one": np.full((20, 30, 3), 10, np.uint8), "two": np.full((40, 10), 200, np.uint8)}
    out = np.asarray(draw.sheet(panels))
    assert (out == 10).all(-1).sum() == 600 and (out == 200).all(-1).sum() == 400


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_images_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        draw.grid([bad])


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1], [2])}, {"a": ([0, 1], [np.nan, np.inf])},
                                    {"a": ([0, 1, 2], [0, 0, 0])}, {"a": ([1, 2], [-1, 1e300])}])
@pytest.mark.parametrize("log", [False, True])
def test_degenerate_series_still_give_a_picture(series, log):
    assert draw.lines(series, logx=log, logy=log, title="x").size == (720, 440)


def test_degenerate_inputs_of_the_other_plots():
    nan = np.full((3, 2), np.nan)
    for image in (draw.scatter({}), draw.scatter({"a": nan}), draw.hist({"a": []}), draw.hist({"a": [1, 1]}),
                  draw.bars({}), draw.bars({"a": None}), draw.bars({"a": -1.0}), draw.heat([[np.nan]]),
                  draw.heat(np.zeros((2, 2)), signed=True), draw.arrows(nan, nan),
                  draw.arrows(np.zeros((0, 2)), [])):
        assert min(image.size) > 50


def test_text_the_font_lacks_is_spelled_out_and_long_text_is_cut():
    assert axes.plain("λ = 2 × é\n") == "lambda = 2 x e "
    assert axes.plain("\U0001f600") == "?"
    cut = axes.fit("long " * 40, 13, 100)
    assert cut.endswith("...") and axes.text_width(cut, 13) <= 100
