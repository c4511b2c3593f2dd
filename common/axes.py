"""What common/draw.py draws on: text in pillow's font, round ticks, colours, axes with a legend."""

import functools
import math
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

S = 2                                                           # supersampling
INK, GREY, FAINT, EMPTY = "#1f2328", "#57606a", "#e3e6ea", "#d0d4d9"
# Okabe and Ito's colour-blind safe palette without its yellow, which is unreadable on white
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#6a3d9a")
RAMP = ("#00224e", "#3b496c", "#707173", "#a59c74", "#e1cc55", "#fee838")            # close to cividis
SIGNED = ("#0b4f8a", "#4f92c8", "#b3d1e8", "#f7f7f7", "#f6c3a5", "#d97b48", "#9a3d05")
SPELL = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "eps", "η": "eta", "λ": "lambda",
         "μ": "mu", "ρ": "rho", "σ": "sigma", "τ": "tau", "×": "x", "−": "-", "–": "-", "—": "-", "\n": " "}


# --- text, ticks, limits, colours --------------------------------------

font = functools.cache(ImageFont.load_default)


@functools.cache
def plain(text):
    """Text in the glyphs of pillow's font, which is little more than ASCII; others are spelled out or '?'."""
    text = unicodedata.normalize("NFKD", "".join(SPELL.get(c, c) for c in str(text)))
    return "".join(c if " " <= c <= "~" or c in "°±·" else "?"
                   for c in text if not unicodedata.combining(c))


def text_width(text, size):
    return font(size * S).getlength(plain(text)) / S


def fit(text, size, room):
    """Text, cut with dots where it would take more than `room` pixels."""
    text = plain(text)
    if text_width(text, size) <= room:
        return text
    return next((t for n in range(len(text), 0, -1) if text_width(t := text[:n] + "...", size) <= room), "")


def number(v, digits=4):
    """v with at most `digits` significant digits, short: 12k, 1.5M, 0.003, 2e-5; '-' if not finite."""
    if not math.isfinite(v):
        return "-"
    unit, size = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3))
                       if max(s, 1e4) <= abs(v) < 1e12), ("", 1))
    return (f"{v / size:.{digits}g}{unit}".replace("e-0", "e-").replace("e+", "e")) if v else "0"


def ticks(lo, hi, n=6, log=False):
    """About n round values inside [lo, hi]: 1, 2 or 5 times powers of ten; only powers on a long log axis."""
    if log and hi / lo >= 20:
        first, last = math.floor(math.log10(lo)), math.floor(math.log10(hi))
        fine, every = ((1, 2, 5), 1) if last - first < 4 else ((1,), math.ceil((last - first) / n))
        out = [m * 10.0 ** e for e in range(first, last + 1) if e % every == 0 for m in fine]
    else:
        power = 10.0 ** math.floor(math.log10((hi - lo) / (n - 1)))
        count = lambda step: math.floor(hi / step + 1e-9) - math.ceil(lo / step - 1e-9) + 1
        misfit = lambda step: abs(count(step) - n) + 9 * (count(step) < 2)
        step = min((m * power for m in (0.5, 1, 2, 5, 10)), key=misfit)
        out = [k * step for k in range(math.floor(lo / step), math.ceil(hi / step) + 1)]
    slack = 1e-9 * (hi - lo)
    return [v for v in out if lo - slack <= v <= hi + slack]


def limits(values, log=False, pad=0.04):
    """(lo, hi) around all finite (positive, if log) values; a made-up interval where there are none."""
    v = np.concatenate([np.ravel(x) for x in values] or [np.zeros(0)])
    v = v[np.isfinite(v) & ((v > 0) | (not log))]
    if not v.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    lo, hi = (math.log10(x) if log else x for x in (float(v.min()), float(v.max())))
    grow = (hi - lo) * pad or (0.0 if hi > lo else 0.2 if log else 0.05 * abs(hi) or 0.5)
    return (10 ** (lo - grow), 10 ** (hi + grow)) if log else (lo - grow, hi + grow)


def color(i, alpha=""):
    return COLORS[i % len(COLORS)] + alpha


def ramp(colors, t):
    """Colours at t in [0, 1], linear between hex anchors -> uint8 [..., 3]."""
    anchors = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in colors], float)
    at = np.linspace(0, 1, len(anchors))
    return np.stack([np.interp(t, at, a) for a in anchors.T], -1).round().astype(np.uint8)


# --- axes --------------------------------------------------------------

class Plot:
    """White picture with title, legend and two axes; all coordinates are final pixels.

    The legend lies above the frame, so it never covers data; mark(plot, i, x, y) draws its sample i.  names:
    (x, y) category names at 0.5, 1.5, ... in place of ticks.  equal: one unit is as long in x as in y.
    """

    def __init__(self, size, xlim, ylim, title="", xlabel="", ylabel="", keys=(), mark=None,
                 log=(False, False), equal=False, names=(None, None), right=22):
        w, h = size
        self.image = Image.new("RGB", (w * S, h * S), "white")
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.log, self.lim = log, (xlim, ylim)
        self.text(14, 12, fit(title, 16, w - 28), 16)
        x, y = 14, 46 if title else 20
        for i, key in enumerate(keys if len(keys) > 1 else ()):
            key = fit(key, 13, w - 60)
            if x > 14 and x + 26 + text_width(key, 13) > w - 14:
                x, y = 14, y + 21
            mark(self, i, x, y)
            self.text(x + 26, y, key, 13, "lm")
            x += text_width(key, 13) + 44
        x1, y0, y1 = w - right, y + (24 if len(keys) > 1 else 0), h - (54 if xlabel else 32)
        wide = max([text_width(text, 12) for _, text in self.marks(1, y1 - y0, 48, names[1])] or [0])
        x0 = 20 + 22 * bool(ylabel) + min(wide, 0.4 * w)
        self.frame = x0, y0, x1, y1
        if equal:
            unit = max((xlim[1] - xlim[0]) / (x1 - x0), (ylim[1] - ylim[0]) / (y1 - y0))
            self.lim = [((a + b - unit * n) / 2, (a + b + unit * n) / 2)
                        for (a, b), n in ((xlim, x1 - x0), (ylim, y1 - y0))]
        for v, text in self.marks(0, x1 - x0, 80, names[0]):
            x = self.px([v], [self.lim[1][0]])[0][0]
            self.line([(x, y0), (x, y1)], FAINT, 1 if names[0] is None else 0)
            self.text(x, y1 + 7, text, 12, "ma", GREY)
        for v, text in self.marks(1, y1 - y0, 48, names[1]):
            y = self.px([self.lim[0][0]], [v])[0][1]
            self.line([(x0, y), (x1, y)], FAINT, 1 if names[1] is None else 0)
            self.text(x0 - 8, y, fit(text, 12, 0.4 * w), 12, "rm", GREY if names[1] is None else INK)
        self.line([(x0, y0), (x0, y1), (x1, y1)], GREY, 1)
        self.text((x0 + x1) / 2, h - 26, fit(xlabel, 13, w - 28), 13, "ma")
        tile = Image.new("L", (round((y1 - y0) * S), 20 * S))   # the y label, written flat, then turned
        text = fit(ylabel, 13, y1 - y0)
        ImageDraw.Draw(tile).text((tile.width / 2, 10 * S), text, 255, font(13 * S), "mm")
        self.image.paste(INK, (5 * S, round(y0 * S)), tile.rotate(90, expand=True))

    def marks(self, axis, room, every, names):
        """[(value, text)] along an axis of `room` pixels, one about each `every` pixels; all texts differ."""
        if names is not None:
            need = 14 if axis else max([text_width(n, 12) for n in names] or [0]) + 6
            skip = max(1, math.ceil(need * len(names) / room))
            return [(i + 0.5, str(n)) for i, n in enumerate(names) if i % skip == 0]
        values, texts = ticks(*self.lim[axis], max(3, int(room / every)), self.log[axis]), []
        for digits in range(4, 18):
            if len(set(texts)) < len(values):
                texts = [number(v, digits) for v in values]
        return list(zip(values, texts))

    def px(self, xs, ys):
        """Data coordinates [N], [N] -> list of N pixel pairs; nan stays nan."""
        out, (x0, y0, x1, y1) = [], self.frame
        for v, (lo, hi), log, a, b in zip((xs, ys), self.lim, self.log, (x0, y1), (x1, y0)):
            v = np.asarray(v, float)
            if log:
                v, lo, hi = np.log10(np.where(v > 0, v, np.nan)), math.log10(lo), math.log10(hi)
            out.append(a + (v - lo) / (hi - lo) * (b - a))
        return np.stack(out, 1).tolist()

    def text(self, x, y, text, size=13, anchor="la", fill=INK):
        self.pen.text((x * S, y * S), plain(text), fill, font(size * S), anchor=anchor)

    def line(self, points, fill=INK, width=2.0):
        if width:
            self.pen.line([(x * S, y * S) for x, y in points], fill, round(width * S), joint="curve")

    def box(self, x0, y0, x1, y1, fill):
        self.area([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def area(self, points, fill):
        if len(points) > 2:
            self.pen.polygon([(x * S, y * S) for x, y in points], fill)

    def dot(self, x, y, r, fill, shape=0):
        """Marker of radius r: 0 disc, 1 square, 2 triangle."""
        if shape % 3 == 0:
            self.pen.ellipse(((x - r) * S, (y - r) * S, (x + r) * S, (y + r) * S), fill)
        corners = (), ((-1, -1), (1, -1), (1, 1), (-1, 1)), ((0, -1.2), (1.1, 0.9), (-1.1, 0.9))
        self.area([(x + r * a, y + r * b) for a, b in corners[shape % 3]], fill)

    def dots(self, groups, radius=None):
        most = max([len(v) for v in groups.values()] or [0])
        r = radius or (4.0 if most <= 60 else 2.6 if most <= 600 else 1.6)
        x0, y0, x1, y1 = self.frame
        for i, points in enumerate(groups.values()):
            for x, y in self.px(*points.T):
                if x0 <= x <= x1 and y0 <= y <= y1:             # false on nan
                    self.dot(x, y, r, color(i, "b0"), i if r > 2 else 0)

    def done(self):
        return self.image.reduce(S)


def pieces(points, most=4000):
    """Split pixel pairs at non-finite ones; of a long piece keep the highest and lowest point of each run."""
    p = np.asarray(points, float).reshape(-1, 2)
    ok = np.isfinite(p).all(1)
    for piece in np.split(np.arange(len(p)), np.flatnonzero(np.diff(ok)) + 1):
        if len(piece) and ok[piece[0]]:
            if len(piece) > most:
                y = p[:, 1]
                piece = [k for r in np.array_split(piece, most // 2)
                         for k in sorted({r[y[r].argmin()], r[y[r].argmax()]})]
            yield p[piece].tolist()
