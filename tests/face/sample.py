"""Invented `Results`, for looking at renderings only (no figure in here was ever measured), and a reader of pages."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import msgspec

from flyweight.types import (
    Artifact,
    Behaviour,
    Budget,
    Claim,
    ClassRow,
    Cost,
    Decision,
    FrontierPoint,
    Histogram,
    Interval,
    LayerRow,
    Limit,
    Note,
    Option,
    Plan,
    Provenance,
    Recovery,
    Results,
    Row,
    Site,
    Step,
)

HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31mred\u202etxt.exe\x00\u2066[link](http://evil.example)|`$x^2$`"
GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
VERSIONS = {"flyweight": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1", "onnx": "1.23.2", "python": "3.11.9"}
MACHINE = {"cpu": "Example CPU @ 2.60 GHz", "flags": "avx2 avx512f avx512_vnni", "system": "Linux x86_64"}


def classification(layer_count: int = 12) -> Results:
    """A classifier with ten classes whose claims hold, fail and stay undecided."""
    names = tuple(f"layer{i // 4 + 1}.{i % 4}.conv" for i in range(layer_count))
    decisions = tuple(_decision(i, name) for i, name in enumerate(names))
    latency = Limit("latency", "<=", 0.5, "share", "batch=1", "latency<=50%")
    size = Limit("size", "<=", 0.25, "share", "", "size<=25%")
    drop = Limit("drop", "<=", 0.5, "points", "", "drop<=0.5pt")
    agreement = Limit("agreement", ">=", 0.98, "share", "", "agreement>=98%", default=True)
    budget = Budget((latency, size, drop, agreement))
    return Results(
        title="resnet20 on fashion-mnist",
        task="classify",
        divergence="KL(original ‖ compressed)",
        metric="accuracy",
        target="onnxruntime",
        threads=1,
        shapes=("batch=1", "batch=32"),
        budget=budget,
        budget_met=False,
        summary="2.1 times faster and 4.9 times smaller; 360 test items cannot decide a drop of 0.5 points.",
        rows=_rows(),
        claims=(
            Claim("parity at batch=1", "proof", "holds", 3e-7, "max abs difference", how="fresh process, 64 inputs"),
            Claim("latency@batch=1", "promise", "holds", 0.471, "share", Interval(0.471, 0.455, 0.489), 0.462, latency,
                  "7 fresh processes, blocks of 30 in the order ABBA"),
            Claim("size", "promise", "holds", 0.205, "share", None, 0.204, size, "bytes of the file"),
            Claim("drop", "promise", "undecided", 0.28, "points", Interval(0.28, -0.56, 1.11), None, drop,
                  "360 samples resolve 1.0 pt; 0.5 pt needs about 1,600"),
            Claim("agreement", "promise", "fails", 0.961, "share", Interval(0.961, 0.944, 0.975), None, agreement,
                  "paired, on the test items"),
            Claim("forecast of latency@batch=1", "forecast", "holds", 0.471, "share", Interval(0.471, 0.455, 0.489),
                  0.462, None, "whole-model differences"),
            Claim("forecast of divergence", "forecast", "fails", 0.0182, "", Interval(0.0182, 0.0161, 0.0205), 0.0131,
                  None, "sum over sites, corrected once"),
        ),
        frontier=_frontier(),
        decisions=decisions,
        layers=tuple(_layer(i, name) for i, name in enumerate(names)),
        behaviour=Behaviour(
            items=360,
            divergence=Interval(0.0182, 0.0161, 0.0205),
            divergence_p95=0.11,
            agreement=Interval(0.961, 0.944, 0.975),
            right_to_wrong=7,
            wrong_to_right=6,
            wrong_to_other_wrong=1,
            classes=tuple(
                ClassRow(name, 36, 0.97 - 0.02 * (i % 4), 0.97 - 0.02 * (i % 4) + 0.028 * ((i * 7) % 5 - 3) / 3, 1.0)
                for i, name in enumerate(GARMENTS)
            ),
        ),
        notes=(
            Note("axes.frozen", "The channels of the stem are kept: its output is added to a frozen block.", "conv1",
                 "Nothing to do; a later version may cut residual streams."),
            Note("data.labels-dropped", "Labels in the calibration data were ignored."),
            Note("int8.not-executed", "1 operator planned as int8 runs in float, and was priced again.", "avgpool"),
        ),
        plan=Plan(
            {d.site.name: d.chosen for d in decisions},
            Cost(20_900_000, 210_000, 223_000, {"batch=1": 1.79e-4, "batch=32": 4.1e-3}),
            0.0131,
            budget,
            Provenance("a1" * 32, "b2" * 32, "c3" * 32, 0, VERSIONS),
            feasible=True,
        ),
        artifact=Artifact("out/model.onnx", "onnxruntime", 224_100, "d4" * 32, 22, 21),
        command="flyweight compress nets:resnet20 --weights resnet20.safetensors --calib calib.npz "
        "--test test.npz --budget 'latency<=50%, size<=25%, drop<=0.5pt' --workdir out/",
        seconds={"trace": 2.1, "measure": 6.4, "propose": 11.2, "price": 48.0, "search": 0.4, "apply": 1.2,
                 "recover": 3.3, "export": 4.0, "verify": 31.5},
        data={"calib": 1024, "tune": 5000, "test": 360},
        versions=VERSIONS,
        machine=MACHINE,
        seed=0,
        date="2026-11-22",
        lessons=(
            Recovery("cut", ("norms", "weights"), (0.061, 0.043, 0.03, 0.026), (0.0512, 0.0381, 0.0307, 0.0182, 0.0195), 3),
            Recovery("rounded", ("weights",), (0.024, 0.021), (0.0203, 0.0196), 1, "the time was over"),
        ),
    )  # fmt: skip


def embedding() -> Results:
    """An embedding model without labels, nothing cut, its budget out of reach: most sections are empty."""
    size = Limit("size", "<=", 250_000.0, "bytes", "", "size<=250kB")
    budget = Budget((size,))
    keep = Option("encoder.0.ffn", "keep")
    site = Site("encoder.0.ffn", "channels", ("encoder.0.ffn.up", "encoder.0.ffn.down"), 0, "aten.erf is not followed")
    return msgspec.structs.replace(
        classification(),
        title="sentence encoder",
        task="embed",
        divergence="1 − cosine",
        metric="",
        budget=budget,
        budget_met=False,
        summary="The budget cannot be met: the smallest plan here needs 1.05 MB.",
        rows=tuple(msgspec.structs.replace(row, quality={}) for row in _rows()),
        claims=(
            Claim("parity at batch=2", "proof", "holds", 0.0, "max abs difference"),
            Claim("size", "promise", "fails", 1_050_000.0, "bytes", None, 1_050_000.0, size, "bytes of the file"),
        ),
        frontier=(),
        decisions=(Decision(site, keep, "frozen", (keep,)),),
        layers=(),
        behaviour=Behaviour(items=128, divergence=Interval(0.0, 0.0, 0.0)),
        notes=(),
        plan=msgspec.structs.replace(
            classification().plan, choices={site.name: keep}, budget=budget, feasible=False, binding="size<=250kB"
        ),
        data={"calib": 128},
        seconds={},
        lessons=(),
    )


def hostile() -> Results:
    """The classifier with a hostile string in every text that can come from a model, data or a path."""
    plain = classification()
    tree = msgspec.to_builtins(plain)
    literals = {"channels", "numbers", "proof", "promise", "forecast"}
    named = {"versions", "machine", "seconds", "quality", "latency_s", "latency_share", "choices"}

    def poison(value: object, key: str = "") -> object:
        if isinstance(value, str):
            literal = not value or key in {"state", "op", "prefer"} or value in literals  # "" means: nothing to say
            return value if literal else value + HOSTILE
        if isinstance(value, dict):
            tail = HOSTILE if key in named else ""
            return {name + tail: poison(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [poison(item, key) for item in value]
        return value

    return msgspec.convert(poison(tree), Results)


def _rows() -> tuple[Row, ...]:
    def row(name: str, file_bytes: int, macs: int, ms: float, ms32: float, accuracy: float) -> Row:
        latency = {"batch=1": ms / 1000, "batch=32": ms32 / 1000}
        base = {"batch=1": 0.38, "batch=32": 9.9}
        shares = {k: v * 1000 / base[k] for k, v in latency.items()}
        intervals = {k: Interval(s, s * 0.97, s * 1.03) for k, s in shares.items()}
        quality = {"accuracy": Interval(accuracy, accuracy - 0.025, accuracy + 0.02)}
        return Row(name, file_bytes, int(file_bytes * 0.95), macs, file_bytes // 4, latency, intervals, quality)

    return (
        row("what you run today", 1_155_300, 40_800_000, 0.62, 13.2, 0.9359),
        row("float original", 1_092_000, 40_800_000, 0.38, 9.9, 0.9359),
        row("best float", 1_090_100, 40_800_000, 0.355, 9.1, 0.9359),
        row("flyweight", 224_100, 20_900_000, 0.179, 4.1, 0.9331),
    )


def _frontier() -> tuple[FrontierPoint, ...]:
    shares = [1.0 - 0.05 * i for i in range(15)]
    return tuple(
        FrontierPoint(0.0 if i == 0 else 0.0004 * math.exp(0.42 * i), s, s * 0.7 if i else 1.0, s * 0.9, i == 10)
        for i, s in enumerate(shares)
    )


def _decision(index: int, layer: str) -> Decision:
    frozen = "its output meets a slice: which channels belong together is not known" if index % 6 == 5 else ""
    name = layer.rsplit(".", 1)[0] + ".inner"
    site = Site(name, "channels", (layer, layer.replace("conv", "next")), 0 if frozen else 32, frozen)
    keep = Option(name, "keep")
    if frozen:
        return Decision(site, keep, f"kept: {frozen}", (keep,))
    options = (keep, *(
        Option(name, f"{n} of 32 channels, int8", (Step("channels", name, {"keep": n}), Step("int8", layer, {})),
               0.02 * (32 - n), 0.0004 * (33 - n), Cost(-n * 1000, -n * 900, None, {"batch=1": -1e-6 * (40 - n)}),
               storage_only=n == 24)
        for n in (32, 24, 16, 8)
    ))  # fmt: skip
    return Decision(site, options[3], "cheapest second among what the budget still needs", options)


def _layer(index: int, name: str) -> LayerRow:
    def bell(width: float, total: int) -> Histogram:
        counts = tuple(int(total * math.exp(-(((i - 19.5) / width) ** 2) / 2)) for i in range(40))
        return Histogram(-0.5, 0.5, counts)

    after = 32 if index % 6 == 5 else 16
    bits = 32 if index % 6 == 5 else 8
    return LayerRow(
        name, "conv", (32, 32, 3, 3), (after, 32, 3, 3), 32, bits, 36_864, after * 288 * bits // 8, 2_000_000,
        62_500 * after, bell(5 + index % 5, 900), bell(5.5 + index % 5, 28 * after),
    )  # fmt: skip


# --- reading what was rendered ----------------------------------------------------------------------------------------
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Everything a browser would see: elements with attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", "".join(self.texts))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.texts).append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def shape(html: str) -> list[tuple[str, frozenset[str]]]:
    return [(tag, frozenset(attributes)) for tag, attributes in Page(html).elements]


def assert_says(text: str, *words: str) -> None:
    for word in words:
        assert word in text, word
