"""The pictures of a card: what they show, that every label can be read, and that they are drawn only when needed."""

import gettext
import hashlib
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from gemma_gguf import card, factory, manifest, pictures, table
from gemma_gguf.manifest import Coverage, Evidence, FileEntry, Manifest, Measured
from tests.examples import coverage, drawn, evidence, example, model_entry

WORDS = gettext.NullTranslations()
# Sizes (GB) of a 4B set as published, and KLDs as such sets measure.
SET_4B = {
    "Q8_0": (4.13, 0.0006), "Q6_K_L": (3.35, 0.0021), "Q6_K": (3.19, 0.0024), "Q5_K_L": (2.99, 0.0062),
    "Q5_K_M": (2.83, 0.0071), "Q5_K_S": (2.76, 0.0085), "Q4_K_L": (2.65, 0.0205), "Q4_1": (2.56, 0.027),
    "Q4_K_M": (2.49, 0.0228), "Q4_K_S": (2.38, 0.0284), "Q4_0": (2.37, 0.041), "IQ4_NL": (2.36, 0.0262),
    "IQ4_XS": (2.26, 0.0271), "Q3_K_XL": (2.40, 0.047), "Q3_K_L": (2.24, 0.05), "Q3_K_M": (2.1, 0.062),
    "Q3_K_S": (1.94, 0.12), "IQ3_M": (1.99, 0.075), "IQ3_XS": (1.86, 0.095), "IQ3_XXS": (1.69, 0.147),
    "Q2_K_L": (1.89, 0.23), "Q2_K": (1.73, 0.25), "IQ2_M": (1.54, 0.27), "IQ2_S": (1.43, 0.36),
    "IQ2_XS": (1.40, 0.43), "IQ2_XXS": (1.29, 0.62),
}  # fmt: skip


def _whole(rows: dict[str, tuple[float, float]], se: float = 0.04) -> Manifest:
    """The example with these files instead of its own, all of them measured."""
    base = next(entry for entry in example().files if entry.recipe == "bf16")
    entries: list[FileEntry] = [base]
    told: dict[str, Evidence] = {base.sha256: evidence(16.0, base.sha256)}
    for recipe, (gb, kld) in rows.items():
        entry = model_entry(recipe, recipe, "", n_bytes=round(gb * 1e9), bpw=4.0, types={})
        known = evidence(4.0, base.sha256)
        assert known.quality is not None
        quality = known.quality.model_copy(update={"kld": Measured(value=kld, se=kld * se)})
        entries.append(entry)
        told[entry.sha256] = known.model_copy(update={"quality": quality})
    return example().model_copy(update={"files": entries, "evidence": told})


def _on_a_grid(made: Manifest) -> Manifest:
    return made.model_copy(update={"model": made.model.model_copy(update={"base_is_dequantised": True})})


def _unmeasured(made: Manifest) -> Manifest:
    return made.model_copy(update={"evidence": {}, "pictures": {}})


# --- what they show ------------------------------------------------------------------------------------------------


def test_frontier_holds_what_no_other_file_beats_in_both() -> None:
    points = [(4.0, 0.001), (3.0, 0.02), (2.5, 0.01), (2.0, 0.3), (1.9, 0.2), (3.0, 0.005), (2.5, 0.01)]
    edge = table.frontier(points)
    assert [points[number] for number in edge] == [(1.9, 0.2), (2.5, 0.01), (3.0, 0.005), (4.0, 0.001)]
    for number, (gb, kld) in enumerate(points):
        beaten = any(a <= gb and b <= kld and (a, b) != (gb, kld) for a, b in points)
        assert (number in edge) == (not beaten and points.index((gb, kld)) == number)


def test_quality_of_every_measured_file_but_the_base() -> None:
    data = pictures.all_data(_whole(SET_4B))["quality"]
    assert {point["label"]: (point["gb"], point["kld"]) for point in data["points"]} == SET_4B
    assert data["ranked"]
    off = {point["label"] for point in data["points"] if not point["frontier"]}
    assert off == {"Q2_K", "Q2_K_L", "Q3_K_S", "Q3_K_XL", "Q4_0", "Q4_1", "Q4_K_S"}


def test_a_base_that_was_quantised_before_has_no_frontier() -> None:
    data = pictures.all_data(_on_a_grid(_whole(SET_4B)))["quality"]
    assert not data["ranked"]
    assert not any(point["frontier"] for point in data["points"])
    assert "No ranking: the base was quantised before." in pictures.alt_text("quality", data, WORDS)


def test_files_of_the_same_bytes_are_one_point_named_after_both() -> None:
    made = example()
    twin = next(e for e in made.files if e.recipe == "Q4_K_M")
    files = [e.model_copy(update={"sha256": twin.sha256}) if e.recipe == "Q4_K_L" else e for e in made.files]
    data = pictures.all_data(made.model_copy(update={"files": files}))
    assert [p["label"] for p in data["quality"]["points"]] == ["Q8_0", "Q4_K_M = Q4_K_L", "Q4_0", "IQ2_XS"]
    assert [bar["label"] for bar in data["speed"]["bars"]].count("Q4_K_M = Q4_K_L") == 1


@pytest.mark.parametrize(
    ("change", "left"),
    [
        pytest.param(lambda made: made, {"quality", "speed", "coverage"}, id="all measured"),
        pytest.param(_unmeasured, {"coverage"}, id="nothing evaluated"),
        pytest.param(lambda made: _unmeasured(made).model_copy(update={"imatrix": None}), set(), id="nothing at all"),
        pytest.param(lambda made: _whole({"Q8_0": (4.13, 0.001)}), {"speed", "coverage"}, id="one file has no curve"),
        pytest.param(
            lambda made: _whole({"Q8_0": (4.13, 0.0), "Q6_K": (3.2, 0.0)}), {"speed", "coverage"}, id="no difference"
        ),
    ],
)
def test_no_picture_where_evidence_is_missing(change: Callable[[Manifest], Manifest], left: set[str]) -> None:
    assert set(pictures.all_data(change(example()))) == left


def test_speed_of_what_was_benched_alone() -> None:
    made = example()
    without = {
        sha: told if entry.recipe in {"Q8_0", "Q4_0"} else told.model_copy(update={"speed": None})
        for entry in made.files
        for sha, told in made.evidence.items()
        if sha == entry.sha256
    }
    data = pictures.all_data(made.model_copy(update={"evidence": without}))["speed"]
    assert [(bar["label"], bar["prompt"], bar["generate"]) for bar in data["bars"]] == [
        ("Q8_0", [30.5, 0.4], [60 / 8.5051, 0.1]),
        ("Q4_0", [30.5, 0.4], [60 / 4.8636, 0.1]),
    ]
    assert data["machine"] == "AMD EPYC, 2 threads, cpu backend"


def _experts(unseen: list[int]) -> Coverage:
    n = len(unseen)
    return Coverage(
        kind="ffn_down_exps",
        layers=list(range(n)),
        n_experts=128,
        tokens_min=[0 if missed else 40 for missed in unseen],
        tokens_median=[4000] * n,
        tokens_max=[20000] * n,
        unseen=unseen,
        active=[1.0] * n,
        evenness=[0.7] * n,
    )


def _covered(*rows: Coverage) -> Manifest:
    made = example()
    assert made.imatrix is not None
    return made.model_copy(update={"imatrix": made.imatrix.model_copy(update={"coverage": list(rows)})})


def test_kinds_that_read_the_same_share_a_row() -> None:
    queries, down = coverage()
    keys = queries.model_copy(update={"kind": "attn_k"})
    other = queries.model_copy(update={"kind": "attn_v", "evenness": [0.5] * len(queries.layers)})
    data = pictures.all_data(_covered(keys, down, other, queries))["coverage"]
    assert [row["label"] for row in data["rows"]] == ["attn_q, attn_k", "attn_v", "ffn_down"]


def test_experts_that_were_never_reached_are_counted_once() -> None:
    """Gate, up and down of one expert are reached together."""
    rows = _experts([0, 3, 0, 1]), _experts([0, 3, 0, 1]).model_copy(update={"kind": "ffn_up_exps"})
    data = pictures.all_data(_covered(*rows))["coverage"]
    assert data["unseen"] == 4
    assert "Experts that saw no token: 4 of 512." in pictures.alt_text("coverage", data, WORDS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param(
            "quality",
            "File size against mean KL divergence of 26 files, from IQ2_XXS (1.29 GB, KLD 0.62) to Q8_0 (4.13 GB, "
            "KLD 0.0006). On the frontier: IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, IQ3_XXS, IQ3_XS, IQ3_M, Q3_K_M, Q3_K_L, "
            "IQ4_XS, IQ4_NL, Q4_K_M, Q4_K_L, Q5_K_S, Q5_K_M, Q5_K_L, Q6_K, Q6_K_L, Q8_0.",
            id="quality",
        ),
        pytest.param(
            "speed",
            "Speed of 27 files on AMD EPYC, 2 threads, cpu backend, reading a prompt and generating; Q8_0 generates "
            "fastest, 15.0 tokens per second.",
            id="speed",
        ),
        pytest.param(
            "coverage",
            "How evenly the imatrix spreads importance over columns, by weight and layer, from 74,752 tokens: between "
            "0.45 and 0.89, 0.67 in the middle. Every weight has data.",
            id="coverage",
        ),
    ],
)
def test_alt_text(name: str, said: str) -> None:
    assert pictures.alt_text(name, pictures.all_data(_whole(SET_4B))[name], WORDS) == said


def test_data_is_json_and_its_hash_follows_it() -> None:
    one, other = (pictures.all_data(_whole(SET_4B, se))["quality"] for se in (0.04, 0.05))
    assert json.loads(json.dumps(one)) == one
    assert pictures.data_hash(one) != pictures.data_hash(other)
    assert pictures.data_hash(one) == pictures.data_hash(pictures.all_data(_whole(SET_4B))["quality"])


# --- drawn ---------------------------------------------------------------------------------------------------------

MANIFESTS: dict[str, Callable[[], Manifest]] = {
    "27 rows": lambda: _whole(SET_4B),
    "27 rows on a grid": lambda: _on_a_grid(_whole(SET_4B)),
    "partial": example,
    "two files": lambda: _whole({"Q8_0": (4.13, 0.001), "Q4_0": (2.3, 0.02)}),
    "wide errors": lambda: _whole(dict(list(SET_4B.items())[:6]), se=1.5),
    "a dollar and a name in another script": lambda: example().model_copy(
        update={"model": example().model.model_copy(update={"model": "a$b$c_日本 <&>\"'"})}
    ),
    "experts": lambda: _covered(_experts([0, 3, 0, 1, 0, 0])),
}


@pytest.mark.parametrize("which", MANIFESTS)
def test_every_picture_is_a_whole_svg_and_png(which: str) -> None:
    for name, data in pictures.all_data(MANIFESTS[which]()).items():
        made = pictures.draw(name, data)
        root = ET.fromstring(made.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not [node for node in root.iter() if node.tag.endswith("}text")], "text is paths: no font is needed"
        pixels = matplotlib.image.imread(io.BytesIO(made.png), format="png")
        width = float(str(root.get("width")).removesuffix("pt")) / 72 * pictures.DPI
        assert pixels.shape[1] == pytest.approx(width, abs=1)
        assert 30_000 < len(made.svg) < 400_000
        assert len(made.png) < 400_000


def test_the_plate_is_light_and_opaque_and_the_corners_are_clear() -> None:
    """So that the picture is the same on a light and on a dark page."""
    made = pictures.draw("speed", pictures.all_data(example())["speed"])
    pixels = matplotlib.image.imread(io.BytesIO(made.png), format="png")
    assert (pixels[0, 0, 3], pixels[-1, -1, 3]) == (0, 0)
    inner = pixels[20:-20, 20:-20]
    assert (inner[..., 3] == 1).all()
    assert np.median(inner[..., :3]) > 0.95


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_have_the_contrast_that_small_letters_need() -> None:
    assert _contrast(pictures.INK, pictures.PLATE) > 7
    assert _contrast(pictures.SOFT, pictures.PLATE) > 4.5


def test_bytes_depend_on_the_data_alone(tmp_path: Path) -> None:
    """In another process, with another hash seed, time zone and settings of the user's own."""
    data = pictures.all_data(example())
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "matplotlibrc").write_text("svg.fonttype: none\nlines.linewidth: 9\n")
    code = """import hashlib, json, sys
from gemma_gguf import pictures
data = json.load(open("data.json"))
made = {name: vars(pictures.draw(name, shown)).values() for name, shown in data.items()}
print(json.dumps({name: [hashlib.sha256(part).hexdigest() for part in parts] for name, parts in made.items()}))
"""
    env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "HOME": str(Path.home())}
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    here = {}
    for name, shown in data.items():
        made = pictures.draw(name, shown)
        here[name] = [hashlib.sha256(made.svg).hexdigest(), hashlib.sha256(made.png).hexdigest()]
        assert b"<dc:date>" not in made.svg
    assert json.loads(child.stdout) == here


# --- labels --------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
ROOM: Box = (0.0, 0.0, 760.0, 480.0)


def _crowds() -> Iterator[tuple[str, list[tuple[float, float]]]]:
    yield "one", [(300.0, 200.0)]
    yield "all in one place", [(300.0, 200.0)] * 8
    yield "in a corner", [(1.0 + n, 479.0 - n) for n in range(8)]
    yield "in a row", [(60.0 + 24 * n, 240.0) for n in range(27)]
    for seed in range(6):
        rng = random.Random(seed)
        yield (
            f"falling {seed}",
            [(40 + 26 * n + rng.uniform(-12, 12), 440 - 15 * n + rng.uniform(-14, 14)) for n in range(26)],
        )


@pytest.mark.parametrize(("name", "anchors"), [pytest.param(*crowd, id=crowd[0]) for crowd in _crowds()])
def test_labels_do_not_cover_each_other_or_the_markers(name: str, anchors: list[tuple[float, float]]) -> None:
    sizes = [(50.0 + 6 * (n % 3), 12.0) for n in range(len(anchors))]
    legend = (560.0, 380.0, 760.0, 480.0)
    taken = [] if name == "in a row" else [legend]
    boxes = pictures.place_boxes(anchors, sizes, ROOM, taken=taken, marker=4.5)
    for number, (box, size) in enumerate(zip(boxes, sizes, strict=True)):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx(size)
        assert ROOM[0] - 1 <= box[0]
        assert box[2] <= ROOM[2] + 1
        assert ROOM[1] - 1 <= box[1]
        assert box[3] <= ROOM[3] + 1
        for other in [*boxes[:number], *taken]:
            assert _shared(box, other) < 1
        for x, y in anchors:
            assert _shared(box, (x - 3, y - 3, x + 3, y + 3)) < 1
    assert pictures.place_boxes(anchors, sizes, ROOM, taken=taken, marker=4.5) == boxes


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def test_no_labels_need_no_room() -> None:
    assert pictures.place_boxes([], [], ROOM) == []


@pytest.mark.parametrize("change", [lambda made: made, _on_a_grid], ids=["ranked", "on a grid"])
def test_every_file_is_labelled_and_no_label_covers_another(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Manifest], Manifest]
) -> None:
    """Measured on the finished drawing, in its own font."""
    placed: list[list[Box]] = []
    place = pictures.place_boxes

    def watched(*args: object, **kwargs: object) -> list[Box]:
        placed.append(place(*args, **kwargs))  # type: ignore[arg-type]
        return placed[-1]

    monkeypatch.setattr(pictures, "place_boxes", watched)
    data = pictures.all_data(change(_whole(SET_4B)))["quality"]
    pictures.draw("quality", data)
    (boxes,) = placed
    assert len(boxes) == 26
    assert max(_shared(a, b) for n, a in enumerate(boxes) for b in boxes[:n]) < 1


# --- in a set ------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_set(tmp_path: Path) -> Path:
    directory = tmp_path / "set"
    directory.mkdir()
    manifest.save(example().model_copy(update={"pictures": {}}), directory)
    return directory


def _write(directory: Path) -> bool:
    return factory.write_card(directory, card.Renderer())


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all pictures that are drawn from now on."""
    drawings: list[str] = []
    draw = pictures.draw

    def watched(name: str, data: pictures.Data) -> pictures.Drawn:
        drawings.append(name)
        return draw(name, data)

    monkeypatch.setattr(pictures, "draw", watched)
    return drawings


def _bytes(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_card_is_drawn_once(a_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _write(a_set)
    names = {f"assets/{name}.{kind}" for name in pictures.NAMES for kind in ("svg", "png")}
    assert set(_bytes(a_set)) == {"README.md", "quantset.json", *names}
    text = (a_set / "README.md").read_text()
    linked = set(re.findall(r"\(\./(assets/[^)]+)\)", text))
    assert linked == names
    before = _bytes(a_set)
    monkeypatch.setattr(pictures, "draw", lambda *_: pytest.fail("drawn again"))
    assert not _write(a_set)
    assert _bytes(a_set) == before


def test_an_unchanged_card_does_not_import_matplotlib(a_set: Path) -> None:
    _write(a_set)
    code = (
        "import sys; from pathlib import Path; from gemma_gguf import card, factory\n"
        f"assert not factory.write_card(Path({str(a_set)!r}), card.Renderer())\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: path.write_bytes(b"<svg/>"), id="changed"),
    ],
)
def test_a_harmed_picture_is_drawn_again(a_set: Path, harm: Callable[[Path], object]) -> None:
    _write(a_set)
    before = _bytes(a_set)
    harm(a_set / "assets" / "speed.svg")
    _write(a_set)
    assert _bytes(a_set) == before


def test_only_the_picture_whose_data_changed_is_drawn(a_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(a_set)
    made = manifest.load(a_set)
    sha, told = next((s, t) for s, t in made.evidence.items() if t.speed is not None)
    assert told.speed is not None
    faster = told.speed.model_copy(update={"generate_per_second": Measured(value=99.0, se=0.5)})
    changed = {**made.evidence, sha: told.model_copy(update={"speed": faster})}
    manifest.save(made.model_copy(update={"evidence": changed}), a_set)
    before, drawings = _bytes(a_set), _watched(monkeypatch)
    assert _write(a_set)
    assert drawings == ["speed"]
    after = _bytes(a_set)
    assert {name for name in after if after[name] != before[name]} == {
        "README.md",
        "quantset.json",
        "assets/speed.png",
        "assets/speed.svg",
    }


def test_a_picture_without_evidence_is_deleted(a_set: Path) -> None:
    _write(a_set)
    made = manifest.load(a_set)
    manifest.save(made.model_copy(update={"evidence": {}}), a_set)
    assert _write(a_set)
    assert sorted(path.name for path in (a_set / "assets").iterdir()) == ["coverage.png", "coverage.svg"]
    assert set(manifest.load(a_set).pictures) == {"coverage"}
    assert "quality.png" not in (a_set / "README.md").read_text()


def test_without_the_extra_the_card_says_how_to_get_them(a_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    assert _write(a_set)
    text = (a_set / "README.md").read_text()
    assert "pip install 'gemma-gguf[pictures]'" in text
    assert "assets/" not in text
    assert not (a_set / "assets").exists()
    assert not _write(a_set)


def test_without_the_extra_an_outdated_picture_is_not_shown(a_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(a_set)
    made = manifest.load(a_set)
    manifest.save(_on_a_grid(made), a_set)
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    assert _write(a_set)
    text = (a_set / "README.md").read_text()
    assert "assets/quality" not in text
    assert "assets/speed.png" in text
    assert not (a_set / "assets" / "quality.png").exists()


def test_sets_that_show_the_same_share_the_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = _watched(monkeypatch)
    shared: dict[str, pictures.Drawn] = {}
    for number in range(3):
        directory = tmp_path / f"set{number}"
        directory.mkdir()
        manifest.save(example().model_copy(update={"pictures": {}}), directory)
        factory.write_card(directory, card.Renderer(), None, shared)
    assert drawings == ["quality", "speed", "coverage"]
    assert _bytes(tmp_path / "set0") == _bytes(tmp_path / "set2")


def test_what_is_recorded_is_what_lies_there(a_set: Path) -> None:
    _write(a_set)
    for name, picture in manifest.load(a_set).pictures.items():
        for kind, digest in (("svg", picture.svg_sha256), ("png", picture.png_sha256)):
            assert hashlib.sha256((a_set / "assets" / f"{name}.{kind}").read_bytes()).hexdigest() == digest
    copy = a_set.with_name("copy")
    shutil.copytree(a_set, copy)
    assert not _write(copy)


def test_shown_are_only_pictures_of_what_is_recorded_now() -> None:
    assert set(pictures.shown(example())) == {"quality", "speed", "coverage"}
    assert set(pictures.shown(_on_a_grid(example()))) == {"speed", "coverage"}
    assert pictures.shown(example().model_copy(update={"pictures": {}})) == {}
    assert set(drawn(example())) == set(pictures.NAMES)
    assert math.isclose(pictures.all_data(example())["quality"]["points"][0]["gb"], 4.130226144)
