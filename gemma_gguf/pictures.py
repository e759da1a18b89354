"""The pictures of a card: size against KL divergence, speed, and what the imatrix saw.

Consumes a `Manifest`; produces, for every picture whose evidence is there, the data it shows (pure, JSON), and from
that data an SVG and a PNG. The hash of the data is kept in the manifest, so a picture is drawn again only when it would
show something else, and a card that needs none never imports matplotlib, which the extra `pictures` installs.

Cards are read on light and on dark pages: each picture stands on a light plate of its own, so its colours (those of
Okabe and Ito, which every common kind of colour blindness tells apart) are the same on both. The bytes depend on the
data and the version of matplotlib alone: texts are paths, ids come from a fixed salt, and there is no date.
"""

import gettext
import importlib.util
import io
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemma_gguf.files import sha256_json
from gemma_gguf.gates import closeness, distance
from gemma_gguf.manifest import Coverage, FileEntry, Manifest, Quality
from gemma_gguf.table import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

NAMES = ("quality", "speed", "coverage")
FOLDER = "assets"
EXTRA = "gemma-gguf[pictures]"
_DRAWING = 1  # raised when the same data is drawn in another way

Data = dict[str, Any]


# --- what a picture shows ----------------------------------------------------------------------------------------


def all_data(manifest: Manifest) -> dict[str, Data]:
    """{name: what the picture shows} of every picture whose evidence is in the manifest."""
    made = {"quality": _quality(manifest), "speed": _speed(manifest), "coverage": _coverage(manifest)}
    return {name: data for name, data in made.items() if data is not None}


def data_hash(data: Data) -> str:
    """What a drawn picture is remembered by."""
    return sha256_json([_DRAWING, data])


def shown(manifest: Manifest) -> dict[str, Data]:
    """The pictures that a card may show: drawn, and from the very data that the manifest holds now."""
    recorded = {name: picture.data_sha256 for name, picture in manifest.pictures.items()}
    return {name: data for name, data in all_data(manifest).items() if recorded.get(name) == data_hash(data)}


def _plain(text: str) -> str:
    """Text that any font can draw."""
    return text.encode("ascii", errors="replace").decode()


def _title(manifest: Manifest) -> str:
    return _plain(f"{manifest.model.org}/{manifest.model.model}")


def _models(manifest: Manifest) -> list[tuple[str, FileEntry]]:
    """(label, file) of every distinct model file; recipes with the same bytes share one, the parent named first."""
    labels: dict[str, list[str]] = {}
    first: dict[str, FileEntry] = {}
    for entry in sorted(manifest.files, key=lambda entry: entry.parent is not None):
        if entry.kind == "model":
            labels.setdefault(entry.sha256, []).append(_plain(entry.recipe or entry.name))
            first.setdefault(entry.sha256, entry)
    return [(" = ".join(labels[sha]), entry) for sha, entry in first.items()]


def _quality(manifest: Manifest) -> Data | None:
    """Points of size (GB) and mean KLD, of embeddings 1 - mean cosine similarity.

    The base, which is what the others are measured against, is not one of them.
    """
    points: list[Data] = []
    text: Data = {}
    measured = closeness(manifest)
    for label, entry in _models(manifest):
        close = measured.get(entry.name)
        if close is None or close.base_sha256 == entry.sha256:
            continue
        if isinstance(close, Quality):
            text = {"n_tokens": close.n_tokens, "mode": close.mode}
        else:
            text = {"n_lines": close.n_lines, "mode": "embedding"}
        away = distance(close)
        # A logarithmic axis has no place for zero: a file like the base to the last bit.
        if away.value > 0 and entry.n_bytes > 0:
            points.append({"label": label, "gb": entry.n_bytes / 1e9, "kld": away.value, "se": away.se or 0.0})
    if len(points) < 2:
        return None
    ranked = not manifest.model.base_is_dequantised
    edge = frontier([(point["gb"], point["kld"]) for point in points]) if ranked else []
    for number, point in enumerate(points):
        point["frontier"] = number in edge
    return {"title": _title(manifest), "ranked": ranked, "points": points, **text}


def _speed(manifest: Manifest) -> Data | None:
    bars = []
    where: Data = {}
    for label, entry in sorted(_models(manifest), key=lambda row: -row[1].n_bytes):
        evidence = manifest.evidence.get(entry.sha256)
        if evidence is None or evidence.speed is None:
            continue
        speed = evidence.speed
        generate = speed.generate_per_second
        where = {
            "machine": _plain(f"{speed.cpu}, {speed.threads} threads, {speed.backend} backend"),
            "n_prompt": speed.n_prompt,
            "n_generate": speed.n_generate,
        }
        bars.append(
            {
                "label": label,
                "prompt": [speed.prompt_per_second.value, speed.prompt_per_second.se or 0.0],
                "generate": generate and [generate.value, generate.se or 0.0],
            }
        )
    return {"title": _title(manifest), "bars": bars, **where} if bars else None


# The order in which a layer computes; kinds that are not named here come after them.
_KINDS = (
    *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps"),
)


def _coverage(manifest: Manifest) -> Data | None:
    """Rows of a heat map: how evenly importance lies on the columns; and tokens per expert where there are experts.

    Kinds that read the same activations (queries, keys and values) have the same figures and share a row.
    """
    if manifest.imatrix is None or not any(row.layers for row in manifest.imatrix.coverage):
        return None
    rows: list[Data] = []

    def place(row: Coverage) -> tuple[int, str]:
        return (_KINDS.index(row.kind) if row.kind in _KINDS else len(_KINDS), row.kind)

    covered = [row for row in manifest.imatrix.coverage if row.layers]
    for row in sorted(covered, key=place):
        values = {"layers": row.layers, "evenness": row.evenness, "unseen": row.unseen, "n_experts": row.n_experts}
        if (same := next((r for r in rows if r["values"] == values), None)) is not None:
            same["kinds"].append(row.kind)
        else:
            rows.append({"kinds": [row.kind], "values": values})
    experts = next((row for row in covered if row.n_experts > 1), None)
    # The matrices of one expert are reached together.
    unseen = {layer: 0 for row in covered for layer in row.layers}
    for row in covered:
        for layer, number in zip(row.layers, row.unseen, strict=True):
            unseen[layer] = max(unseen[layer], number)
    return {
        "title": _title(manifest),
        "n_tokens": manifest.imatrix.n_chunks * manifest.imatrix.chunk_size,
        "rows": [{"label": ", ".join(row["kinds"]), **row["values"]} for row in rows],
        "unseen": sum(unseen.values()),
        "experts": None
        if experts is None
        else {
            "n": experts.n_experts,
            "layers": experts.layers,
            "min": experts.tokens_min,
            "median": experts.tokens_median,
            "max": experts.tokens_max,
        },
    }


def alt_text(name: str, data: Data, words: gettext.NullTranslations) -> str:
    """What the picture shows, for who cannot see it."""
    if name == "quality":
        return _quality_text(data, words)
    if name == "speed":
        return _speed_text(data, words)
    values = [value for row in data["rows"] for value in row["evenness"]]
    said = words.gettext(
        "How evenly the imatrix spreads importance over columns, by weight and layer, from %(tokens)s tokens: between "
        "%(least)s and %(most)s, %(median)s in the middle."
    )
    said %= {
        "tokens": f"{data['n_tokens']:,}",
        "least": f"{min(values):.2f}",
        "most": f"{max(values):.2f}",
        "median": f"{statistics.median(values):.2f}",
    }
    if not data["unseen"]:
        return _sentences(said, words.gettext("Every weight has data."))
    if not data["experts"]:
        return _sentences(said, words.gettext("Weights without data: %(n)s.") % {"n": data["unseen"]})
    reached = words.gettext("Experts that saw no token: %(n)s of %(all)s.")
    return _sentences(said, reached % {"n": data["unseen"], "all": _n_experts(data)})


def _quality_text(data: Data, words: gettext.NullTranslations) -> str:
    points = sorted(data["points"], key=lambda point: point["gb"])
    embeds = data["mode"] == "embedding"
    axis = "1 - cos" if embeds else "KLD"
    ends = [f"{point['label']} ({point['gb']:.2f} GB, {axis} {point['kld']:.2g})" for point in (points[0], points[-1])]
    if embeds:
        said = words.gettext(
            "File size against the embeddings' mean distance from the base, 1 - cosine similarity, of %(n)s files, "
            "from %(first)s to %(last)s."
        )
    else:
        said = words.gettext("File size against mean KL divergence of %(n)s files, from %(first)s to %(last)s.")
    said %= {"n": len(points), "first": ends[0], "last": ends[1]}
    if not data["ranked"]:
        return _sentences(said, words.gettext("No ranking: the base was quantised before."))
    edge = ", ".join(point["label"] for point in points if point["frontier"])
    return _sentences(said, words.gettext("On the frontier: %(files)s.") % {"files": edge})


def _speed_text(data: Data, words: gettext.NullTranslations) -> str:
    kind = "prompt" if data["bars"][0]["generate"] is None else "generate"
    fastest = max(data["bars"], key=lambda bar: bar[kind][0])
    if kind == "prompt":
        said = words.gettext(
            "Speed of %(n)s files on %(machine)s, reading texts; %(fastest)s reads fastest, %(speed)s tokens per "
            "second."
        )
    else:
        said = words.gettext(
            "Speed of %(n)s files on %(machine)s, reading a prompt and generating; %(fastest)s generates fastest, "
            "%(speed)s tokens per second."
        )
    speed = f"{fastest[kind][0]:.1f}"
    return said % {"n": len(data["bars"]), "machine": data["machine"], "fastest": fastest["label"], "speed": speed}


def _sentences(*told: str) -> str:
    """Messages after each other. They are not named inside f-strings: there, extraction does not find them."""
    return " ".join(told)


def _n_experts(data: Data) -> int:
    return int(data["experts"]["n"]) * len(data["experts"]["layers"])


# --- drawing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    svg: bytes
    png: bytes


PLATE, EDGE, INK, SOFT, GRID = "#fbfbf9", "#c8c8c2", "#1c1c1a", "#5c5c58", "#dfdfda"
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
DPI = 180
SETTINGS: Any = {  # a dictionary of matplotlib's own keys
    "svg.hashsalt": "gemma-gguf",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


def can_draw() -> bool:
    """Whether matplotlib is installed; it is not imported to find out."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(name: str, data: Data) -> Drawn:
    """Draw one picture. Needs matplotlib; takes half a second or so."""
    import matplotlib as mpl  # noqa: PLC0415 - an extra, and slow to import

    with mpl.rc_context(SETTINGS):
        figure = {"quality": _draw_quality, "speed": _draw_speed, "coverage": _draw_coverage}[name](data)
        _add_plate(figure)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": "gemma-gguf"}, transparent=False)
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": "gemma-gguf"}, transparent=False)
    return Drawn(svg.getvalue(), png.getvalue())


def _figure(width: float, height: float, heading: str, under: Sequence[str]) -> "tuple[Figure, float]":
    """(a figure with its heading, where the drawing may begin below it as a share of the height). Inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(figure)
    left = 0.24 / width
    figure.text(left, 1 - 0.24 / height, heading, fontsize=14, fontweight="bold", va="top")
    for number, line in enumerate(under):
        figure.text(left, 1 - (0.55 + 0.21 * number) / height, line, fontsize=9.5, color=SOFT, va="top")
    return figure, 1 - (0.68 + 0.21 * len(under)) / height


def _add_plate(figure: "Figure") -> None:
    """The light ground with a thin edge that the picture stands on; what is outside its round corners is clear."""
    from matplotlib.patches import FancyBboxPatch  # noqa: PLC0415
    from matplotlib.transforms import ScaledTranslation  # noqa: PLC0415

    width, height = figure.get_size_inches()
    margin, radius = 0.02, 0.12
    plate = FancyBboxPatch(
        (margin, margin),
        width - 2 * margin,
        height - 2 * margin,
        boxstyle=f"round,pad=0,rounding_size={radius}",
        facecolor=PLATE,
        edgecolor=EDGE,
        linewidth=1.2,
        transform=figure.dpi_scale_trans + ScaledTranslation(0, 0, figure.dpi_scale_trans),
        zorder=-10,
    )
    figure.add_artist(plate)


def _bare(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)


def _family(label: str) -> str:
    if label.startswith("IQ"):
        return "I-quants"
    return "K-quants" if "_K" in label else "legacy types"


_LOOK = {"K-quants": ("o", BLUE), "I-quants": ("D", ORANGE), "legacy types": ("s", GREEN)}


def _draw_quality(data: Data) -> "Figure":
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    embeds = data["mode"] == "embedding"
    if embeds:
        under = [f"{data['title']}, measured on the embeddings of {data['n_lines']:,} lines of text"]
    else:
        text = "text in the model's own turn format" if data["mode"] == "chat" else "plain text"
        under = [f"{data['title']}, measured on {data['n_tokens']:,} tokens of {text}"]
    under.append("Lower is closer to the base. Bars: one standard error each way.")
    if not data["ranked"]:
        under.append("The base was quantised before: these figures rank no files, and no frontier is drawn.")
    heading = "File size against distance of embeddings" if embeds else "File size against KL divergence"
    figure, top = _figure(8.6, 6.4, heading, under)
    axes = figure.add_axes((0.095, 0.105, 0.88, top - 0.105))
    points = sorted(data["points"], key=lambda point: (point["gb"], point["kld"]))
    # A bar that reaches zero has no lower end on a logarithmic axis.
    lower = [min(point["se"], point["kld"] * 0.999) for point in points]
    axes.errorbar(
        [point["gb"] for point in points],
        [point["kld"] for point in points],
        yerr=[lower, [point["se"] for point in points]],
        fmt="none",
        ecolor=INK,
        elinewidth=0.9,
        capsize=2,
        capthick=0.9,
        zorder=3.5,
    )
    edge = [point for point in points if point["frontier"]]
    if len(edge) > 1:
        axes.plot([p["gb"] for p in edge], [p["kld"] for p in edge], color=VERMILION, linewidth=1.6, zorder=1)
    for point in points:
        marker, colour = _LOOK[_family(point["label"])]
        face = colour if point["frontier"] or not data["ranked"] else PLATE
        axes.plot(
            point["gb"], point["kld"], marker, markersize=7, markerfacecolor=face, markeredgecolor=colour, zorder=3
        )
    axes.set_yscale("log")
    klds = [point["kld"] for point in points]
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(klds) < 60 * min(klds) else (1,), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.07, y=0.09)
    axes.set_xlabel("file size, GB")
    axes.set_ylabel("1 - mean cosine similarity to the base" if embeds else "mean KL divergence from the base, nats")
    axes.grid(visible=True, which="major")
    _bare(axes)
    key = [
        Line2D([], [], linestyle="none", marker=marker, markersize=7, color=colour, label=name)
        for name, (marker, colour) in _LOOK.items()
        if any(_family(point["label"]) == name for point in points)
    ]
    if data["ranked"]:
        beaten = any(not point["frontier"] for point in points)
        hollow = Line2D([], [], linestyle="none", marker="o", markersize=7, markerfacecolor=PLATE, color=SOFT)
        hollow.set_label("hollow: another file is smaller and closer")
        key += [Line2D([], [], color=VERMILION, linewidth=1.6, label="frontier"), *([hollow] if beaten else [])]
    legend = axes.legend(handles=key, loc="upper right", fontsize=9, labelcolor=SOFT)
    legend.get_frame().set(facecolor=PLATE, edgecolor="none", alpha=1)
    _place_labels(axes, points, edge, [legend])
    return figure


def _draw_speed(data: Data) -> "Figure":
    bars = data["bars"]
    height = 1.75 + 0.3 * len(bars)
    under = [f"{data['title']} on {data['machine']}; lines: one standard error"]
    figure, top = _figure(8.6, height, "Speed, tokens per second", under)
    bottom = 0.5 / height
    panels = [
        ("prompt", f"reading a prompt of {data['n_prompt']}", BLUE, 0.175, 0.37),
        ("generate", f"generating {data['n_generate']}", ORANGE, 0.6, 0.37),
    ]
    if bars[0]["generate"] is None:  # a model that gives embeddings
        panels = [("prompt", f"reading a text of {data['n_prompt']}", BLUE, 0.175, 0.795)]
    for kind, label, colour, left, width in panels:
        axes = figure.add_axes((left, bottom, width, top - bottom))
        places = range(len(bars))
        values = [bar[kind][0] for bar in bars]
        spread = [bar[kind][1] for bar in bars]
        axes.barh(places, values, height=0.62, color=colour)
        axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
        # Room for the figures beside the longest bar; an axis needs some length.
        axes.set_xlim(0, 1.42 * max(1e-9, *(v + s for v, s in zip(values, spread, strict=True))))
        right = axes.get_xlim()[1]
        for place, value, wide in zip(places, values, spread, strict=True):
            axes.text(value + wide + 0.02 * right, place, _with_spread(value, wide), va="center", fontsize=9)
        axes.set_yticks(places, [bar["label"] for bar in bars] if kind == "prompt" else [""] * len(bars))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.set_xlabel(label, fontsize=9.5)
        axes.grid(visible=True, axis="x")
        _bare(axes)
        axes.tick_params(axis="y", length=0)
    return figure


def _with_spread(value: float, spread: float) -> str:
    """`30.5 ± 0.4`: as many digits as the spread allows."""
    if not spread:
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(spread)))
    return f"{value:.{digits}f} ± {spread:.{digits}f}"


def _draw_coverage(data: Data) -> "Figure":
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415

    rows, experts = data["rows"], data["experts"]
    n_layers = 1 + max(layer for row in rows for layer in row["layers"])
    evenness = np.full((len(rows), n_layers), np.nan)
    for number, row in enumerate(rows):
        evenness[number, row["layers"]] = row["evenness"]
    saw = "every weight has data"
    if data["unseen"]:
        of = f"of {_n_experts(data):,} experts saw no token" if experts else "weights have no data"
        saw = f"{data['unseen']} {of} (crosses)"
    under = [
        f"{data['title']}, {data['n_tokens']:,} tokens of calibration text; {saw}",
        "1: all columns count the same; towards 0: few decide, and the imatrix changes much. Grey: not in it.",
    ]
    body = 0.34 * len(rows) + 0.2
    height = 1.1 + body + (2.75 if experts else 0.75)
    figure, top = _figure(8.6, height, "What the imatrix saw: how evenly importance lies on columns", under)
    left, width = 0.215, 0.665
    axes = figure.add_axes((left, top - body / height, width, body / height))
    image = axes.imshow(
        np.ma.masked_invalid(evenness), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_facecolor(EDGE)
    for number, row in enumerate(rows):
        crossed = [layer for layer, unseen in zip(row["layers"], row["unseen"], strict=True) if unseen]
        axes.plot(crossed, [number] * len(crossed), "x", color=VERMILION, markersize=6, markeredgewidth=1.8)
    axes.set_yticks(range(len(rows)), [_wrapped(row["label"]) for row in rows])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlim(-0.5, n_layers - 0.5)
    axes.set_xlabel("" if experts else "layer")
    bar = figure.colorbar(image, cax=figure.add_axes((left + width + 0.02, top - body / height, 0.022, body / height)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=9)
    if experts:
        below = figure.add_axes((left, 0.55 / height, width, 1.55 / height), sharex=axes)
        below.fill_between(
            experts["layers"], experts["min"], experts["max"], step="mid", color=BLUE, alpha=0.25, linewidth=0
        )
        below.step(experts["layers"], experts["median"], where="mid", color=BLUE, linewidth=1.6)
        below.step(experts["layers"], experts["min"], where="mid", color=VERMILION, linewidth=1.2)
        below.set_yscale("symlog", linthresh=10)
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        below.tick_params(axis="y", labelsize=9)
        below.set_ylabel("tokens", fontsize=9.5)
        below.set_xlabel(f"layer; tokens of each of {experts['n']} experts: fewest (red), median, range", fontsize=9.5)
        below.grid(visible=True, axis="y")
        _bare(below)
    return figure


def _wrapped(label: str) -> str:
    """A row's label in two lines where one would be too wide."""
    parts = label.split(", ")
    if len(label) <= 22 or len(parts) < 2:
        return label
    half = (len(parts) + 1) // 2
    return ", ".join(parts[:half]) + ",\n" + ", ".join(parts[half:])


# --- labels ------------------------------------------------------------------------------------------------------

_TURNS, _PLACES, _ORDERS = 24, 100, 6
_REACH = (5, 9, 14, 20, 27, 35, 44, 54, 66, 80, 96, 114, 134)  # points of type, from a marker to its label
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels
Array = npt.NDArray[np.float64]


def _overlaps(a: Array, b: Array) -> Array:
    """Area that boxes a (n, 4) share with boxes b (m, 4), shape (n, m)."""
    wide = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    high = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    shared: Array = np.clip(wide, 0, None) * np.clip(high, 0, None)
    return shared


def _crossings(starts: Array, ends: Array, boxes: Array) -> Array:
    """1 where a line (n, 2) to (n, 2) meets a box (m, 4), else 0, shape (n, m): Liang and Barsky's clipping."""
    first, last = np.zeros((len(starts), len(boxes))), np.ones((len(starts), len(boxes)))
    for axis in (0, 1):
        step = (ends - starts)[:, axis, None]
        step = np.where(step == 0, 1e-9, step)
        near, far = ((boxes[None, :, side] - starts[:, axis, None]) / step for side in (axis, axis + 2))
        first, last = np.maximum(first, np.minimum(near, far)), np.minimum(last, np.maximum(near, far))
    return (first <= last).astype(np.float64)


def _meetings(starts: Array, ends: Array, others: Array) -> Array:
    """1 where a line (n, 2) to (n, 2) meets a line of `others` (m, 2, 2) between its ends, else 0, shape (n, m)."""

    def side(a: Array, b: Array, point: Array) -> Array:
        turn: Array = (b - a)[..., 0] * (point - a)[..., 1] - (b - a)[..., 1] * (point - a)[..., 0]
        return np.sign(turn)

    a, b, c, d = starts[:, None], ends[:, None], others[None, :, 0], others[None, :, 1]
    return ((side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)).astype(np.float64)


def _tips(anchor: Array, boxes: Array) -> Array:
    """The point of each box that is nearest to its anchor: where the line from a marker ends."""
    tips: Array = np.minimum(np.maximum(anchor, boxes[:, :2]), boxes[:, 2:])
    return tips


def place_boxes(
    anchors: Sequence[Point],
    sizes: Sequence[Point],
    room: Box,
    *,
    taken: Sequence[Box] = (),
    lines: Sequence[tuple[Point, Point]] = (),
    marker: float = 6.0,
    unit: float = 1.0,
) -> list[Box]:
    """A box of each size near its anchor, apart from each other, the markers, `taken` boxes and, if possible, `lines`.

    Each box in turn takes the cheapest of some 100 places around its anchor, given where the others are, until none
    moves; of a few orders to take turns in, the one with the cheapest end is kept. Always the same result for the same
    input. `unit` is pixels per point of type.
    """
    at = np.array(anchors, dtype=np.float64).reshape(-1, 2)
    around = np.hstack([at - marker, at + marker])
    blocked = np.array(taken, dtype=np.float64).reshape(-1, 4)
    ends = np.array(lines, dtype=np.float64).reshape(-1, 2, 2)
    reach = np.repeat(np.array(_REACH, dtype=np.float64), _TURNS)
    turn = np.tile(np.arange(_TURNS), len(_REACH))
    angle = math.tau * turn / _TURNS
    across, along = np.maximum(abs(np.cos(angle)), 1e-6), np.maximum(abs(np.sin(angle)), 1e-6)

    offered, fixed = [], []
    for number, size in enumerate(np.array(sizes, dtype=np.float64).reshape(-1, 2)):
        # On a rectangle around the marker, so that the box never covers it.
        gap = (reach - _REACH[0] + 2) * unit
        far = np.stack([(size[0] / 2 + marker + 0.6 * gap) / across, (size[1] / 2 + marker + gap) / along]).min(axis=0)
        middle = at[number] + np.stack([far * np.cos(angle), far * np.sin(angle)], axis=1)
        boxes = np.hstack([middle - size / 2, middle + size / 2])
        inside = _overlaps(boxes, np.array([room], dtype=np.float64))[:, 0]
        cost = 50 * (size.prod() - inside) + 30 * _overlaps(boxes, blocked).sum(axis=1)
        cost += 10 * _overlaps(boxes, np.delete(around, number, axis=0)).sum(axis=1)
        cost += 60 * unit * _crossings(ends[:, 0], ends[:, 1], boxes).sum(axis=0)
        starts, tips = np.broadcast_to(at[number], middle.shape), _tips(at[number], boxes)
        leader = _crossings(starts, tips, around)
        cost += 60 * unit * (leader.sum(axis=1) - leader[:, number]) + 3 * unit * reach + 0.01 * turn
        cost += 60 * unit * _meetings(starts, tips, ends).sum(axis=1)
        best = np.argsort(cost, kind="stable")[:_PLACES]
        offered.append(boxes[best])
        fixed.append(cost[best])

    def costs(number: int, placed: Array) -> Array:
        """What each place of a box costs beside the others as they are placed."""
        boxes, others, from_others = offered[number], np.delete(placed, number, axis=0), np.delete(at, number, axis=0)
        starts = np.broadcast_to(at[number], (len(boxes), 2))
        total: Array = fixed[number] + 40 * _overlaps(boxes, others).sum(axis=1)
        total += 200 * unit * _crossings(starts, _tips(at[number], boxes), others).sum(axis=1)
        total += 200 * unit * _crossings(from_others, _tips(from_others, others), boxes).sum(axis=0)
        return total

    chance = np.random.default_rng(0)
    found: list[tuple[float, Array]] = []
    for attempt in range(_ORDERS):
        order = np.arange(len(at)) if attempt == 0 else chance.permutation(len(at))
        placed = np.array([boxes[0] for boxes in offered]).reshape(-1, 4)
        for _ in range(10):
            before = placed.copy()
            for number in order:
                placed[number] = offered[number][costs(number, placed).argmin()]
            if np.array_equal(before, placed):
                break
        found.append((sum(costs(number, placed).min() for number in range(len(at))), placed))
    placed = min(found, key=lambda end: end[0])[1]
    return [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in placed]


def _place_labels(axes: "Axes", points: Sequence[Data], edge: Sequence[Data], taken: "Sequence[Any]") -> "list[Text]":
    """Write every point's label beside it, with a thin line to it where it had to move away."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415

    figure = axes.get_figure(root=True)
    assert figure is not None
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer: RendererAgg = canvas.get_renderer()  # type: ignore[no-untyped-call]
    axes.set_xlim(*axes.get_xlim())
    axes.set_ylim(*axes.get_ylim())
    unit = figure.dpi / 72

    def pixels(gb: float, kld: float) -> Point:
        x, y = axes.transData.transform((gb, kld))
        return float(x), float(y)

    anchors = [pixels(point["gb"], point["kld"]) for point in points]
    texts = [
        axes.text(0, 0, point["label"], fontsize=9, ha="center", va="center", zorder=4, color=INK) for point in points
    ]
    sizes = []
    for text in texts:
        extent = text.get_window_extent(renderer)
        sizes.append((extent.width + 3 * unit, extent.height + 1.5 * unit))
    window = axes.get_window_extent(renderer)
    room = (window.x0, window.y0, window.x1, window.y1)
    corners = [pixels(point["gb"], point["kld"]) for point in edge]
    bars = [
        (pixels(p["gb"], max(p["kld"] - p["se"], 1e-3 * p["kld"])), pixels(p["gb"], p["kld"] + p["se"])) for p in points
    ]
    boxes = place_boxes(
        anchors,
        sizes,
        room,
        taken=[(b.x0, b.y0, b.x1, b.y1) for b in (artist.get_window_extent(renderer) for artist in taken)],
        lines=[*itertools.pairwise(corners), *bars],
        marker=4.5 * unit,
        unit=unit,
    )
    from_pixels = axes.transData.inverted().transform
    for text, (x, y), box in zip(texts, anchors, boxes, strict=True):
        middle = from_pixels(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        text.set_position((float(middle[0]), float(middle[1])))
        tip = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.hypot(tip[0] - x, tip[1] - y) > 9 * unit:
            start, end = from_pixels((x, y)), from_pixels(tip)
            axes.plot([start[0], end[0]], [start[1], end[1]], color=SOFT, linewidth=0.6, zorder=1.5)
    return texts
