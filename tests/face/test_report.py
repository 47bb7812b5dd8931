"""The page and the card say everything, believe nothing, load nothing, and are the same bytes every time."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.face import plots
from flyweight.face.card import card
from flyweight.face.report import report
from flyweight.types import (
    Behaviour,
    Claim,
    ClassRow,
    Cost,
    FrontierPoint,
    Histogram,
    Interval,
    Limit,
    Recovery,
    Results,
)

SAMPLE = Path(__file__).with_name("sample.py")
sample = SimpleNamespace(**runpy.run_path(str(SAMPLE)))
Page, assert_says, shape = sample.Page, sample.assert_says, sample.shape
PAGE_TAGS = set(
    re.findall(
        r"\S+",
        """html head meta title style body header main footer nav section div p h1 h2 h3 a b span ul li table caption
        thead tbody tr th td figure figcaption details summary pre code br svg g defs path use text rect clippath""",
    )
)
ATTRIBUTES = set(
    re.findall(
        r"\S+",
        """lang charset http-equiv content name class id href scope colspan role aria-label aria-labelledby aria-hidden
        viewbox xmlns d x y rx width height fill stroke stroke-width stroke-linecap stroke-linejoin stroke-dasharray
        stroke-dashoffset stroke-opacity stroke-miterlimit fill-opacity fill-rule opacity clip-path transform
        text-anchor font-size font-weight preserveaspectratio""",
    )
)


ALL = {"classification": sample.classification, "embedding": sample.embedding, "hostile": sample.hostile}
PAGES = {name: report(make()) for name, make in ALL.items()}


# --- safe ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_only_known_elements_and_attributes_and_nothing_that_loads(name):
    page = Page(PAGES[name])
    assert page.open == []
    assert {tag for tag, _ in page.elements} <= PAGE_TAGS
    assert {key for _, attributes in page.elements for key in attributes} <= ATTRIBUTES
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            if key == "href":
                assert re.fullmatch(r"#[\w-]+", value), (tag, value)
            elif key != "xmlns":
                assert "//" not in (value or ""), (tag, key, value)
    assert not re.search(r"url\(|@import|expression|//", "".join(page.styles))


def without_limits(results: Results) -> Results:
    return msgspec.structs.replace(results, budget=msgspec.structs.replace(results.budget, limits=()))


def test_hostile_text_is_shown_as_text_and_makes_no_element_of_its_own():
    pictures = re.compile(r"<svg.*?</svg>", re.S)
    # the limit line of the frontier is found by its quantity's name, which the poison changes: left out of both
    honest, poisoned = (report(without_limits(make())) for make in (sample.classification, sample.hostile))
    assert shape(pictures.sub("", poisoned)) == shape(pictures.sub("", honest))
    assert_says(Page(PAGES["hostile"]).text, "</script><img src=x onerror=alert(1)>", "\\x1b[31mred\\u202etxt.exe\\x00")
    assert not set(PAGES["hostile"]) & set("\x00\x1b\u202e\u2066")


def test_the_policy_allows_the_style_by_its_hash_and_nothing_else():
    page = Page(PAGES["classification"])
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256("".join(page.styles).encode()).digest()).decode()
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": f"'sha256-{digest}'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    assert not [a for _, a in page.elements if "style" in a]  # the policy would drop them


def test_ids_are_unique_and_every_reference_has_its_target():
    page = Page(PAGES["classification"])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([\w-]+)\)", PAGES["classification"]))
    wanted |= {a["href"][1:] for _, a in page.elements if "href" in a}
    wanted |= {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert wanted <= set(ids)


# --- complete --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["classification", "embedding"])
def test_everything_of_the_results_is_on_the_page(name):
    results: Results = ALL[name]()
    text = Page(PAGES[name]).text
    assert_says(text, results.title, results.summary, results.task, results.divergence, results.command, results.date)
    assert_says(text, *(word for c in results.claims for word in (c.name, c.how, c.state)))
    assert_says(text, *(row.name for row in results.rows), *(limit.text for limit in results.budget.limits))
    for decision in results.decisions:
        assert_says(text, decision.site.name, *decision.site.layers, decision.chosen.label, decision.site.frozen)
        assert_says(text, *(option.label for option in decision.options if not decision.site.frozen))
        assert_says(text, "" if decision.site.frozen else decision.reason)
    assert_says(text, *(layer.name for layer in results.layers))
    assert_says(text, *(word for n in results.notes for word in (n.code, n.text, n.where, n.fix)))
    assert_says(text, *(row.name for row in results.behaviour.classes))
    for mapping in (results.versions, results.machine):
        assert_says(text, *mapping, *mapping.values())
    assert_says(text, *results.data, *results.seconds, results.artifact.sha256, results.plan.made_with.model_hash)
    assert_says(text, results.plan.made_with.stats_hash, results.plan.made_with.table_hash, results.plan.binding)


def test_sections_come_in_the_order_of_importance():
    ids = [a["id"] for tag, a in Page(PAGES["classification"]).elements if tag in {"section", "div"} and "id" in a]
    assert ids == [
        "verdict", "claims", "table", "frontier", "decisions", "lessons", "forecasts", "weights", "behaviour", "notes",
        "run", "reproduce",
    ]  # fmt: skip


def test_states_are_words_and_icons_not_only_colours():
    text = Page(PAGES["classification"]).text
    assert_says(text, "✓holds", "✗fails", "?undecided", "✗Budget not met")


def test_empty_sections_say_why():
    text = Page(PAGES["embedding"]).text
    assert_says(
        text, "no labels were given", "No frontier was recorded", "every site is frozen", "No classes: the task"
    )
    assert_says(text, "No layers were recorded", "nothing was dropped", "No times were recorded", "none given")


def test_a_run_that_ended_early_still_has_a_page_and_a_card():
    plain = sample.classification()
    bare = msgspec.structs.replace(
        plain, rows=(), claims=(), frontier=(), decisions=(), layers=(), behaviour=None, notes=(), shapes=(),
        command="", seconds={}, data={}, versions={}, machine={}, plan=msgspec.structs.replace(plain.plan, choices={}),
    )  # fmt: skip
    assert_says(Page(report(bare)).text, "No claim was weighed", "No rows", "No test data were given", "No command")
    assert_says(card(bare), "No claim was weighed", "Nothing was measured")


def test_numbers_that_are_none_or_not_finite_do_not_stop_the_page():
    plain = sample.classification()
    size = Limit("size", "<=", 0.25, "share", "", "size<=25%")
    odd = msgspec.structs.replace(
        plain,
        claims=(
            Claim("unmeasured", "promise", "undecided", None, "share", None, 0.3, size),
            Claim("nan", "promise", "fails", math.nan, "share", Interval(math.nan, -math.inf, math.inf), 0.3, size),
        ),
        frontier=(FrontierPoint(math.nan, None, 1.0, 1.0), FrontierPoint(0.0, None, math.inf, 0.5, True)),
        behaviour=Behaviour(0, Interval(math.nan, math.nan, math.nan), None, None, None, None, None,
                            (ClassRow("a", 0, math.nan, 0.5, 1.0), ClassRow("b", 1, 0.5, 0.5, math.nan))),
        layers=tuple(msgspec.structs.replace(x, histogram_after=Histogram(0.0, 0.0, ())) for x in plain.layers),
        rows=tuple(
            msgspec.structs.replace(r, file_bytes=0, macs=0, latency_s={}, latency_share={}) for r in plain.rows
        ),
    )  # fmt: skip
    assert_says(Page(report(odd)).text, "not measured", "not a number")
    assert "not a number" in card(odd)


def test_the_big_numbers_are_those_of_the_rows():
    text = Page(PAGES["classification"]).text
    # 1 / (0.179 / 0.38) = 2.12; 1,092,000 / 224,100 = 4.87; 40.8 / 20.9 = 1.952
    assert_says(text, "2.1×faster at batch=1", "4.9×smaller", "0.28points lost", "2.0×fewer MACs", "2.4× at batch=32")


def test_a_file_that_grew_and_a_model_that_slowed_down_are_called_so():
    plain = sample.classification()
    ours = plain.rows[-1]
    worse = msgspec.structs.replace(
        ours, file_bytes=2 * plain.rows[1].file_bytes, macs=2 * plain.rows[1].macs,
        latency_share={"batch=1": Interval(1.25, 1.2, 1.3)},
    )  # fmt: skip
    text = Page(report(msgspec.structs.replace(plain, rows=(*plain.rows[:-1], worse)))).text
    assert_says(text, "1.25×slower at batch=1", "2.0×larger", "2.0×more MACs")


def test_an_unmet_plan_names_the_limit_that_binds():
    assert_says(Page(PAGES["embedding"]).text, "the limit that binds is size<=250kB", "nearest point")


def test_a_large_model_stays_below_the_limit_of_the_mail_it_is_sent_in():
    assert len(report(sample.classification(60)).encode()) < 1_500_000


def test_a_model_of_a_thousand_classes_shows_the_worst_in_the_plot_and_all_in_the_table():
    rows = tuple(ClassRow(f"class{i:04d}", 50, 0.9, 0.9 - i / 10_000, 1.0) for i in range(1000))
    plain = sample.classification()
    html = report(msgspec.structs.replace(plain, behaviour=msgspec.structs.replace(plain.behaviour, classes=rows)))
    assert len(html.encode()) < 1_500_000
    assert html.count("class0999") == 2  # the largest loss: plot and table
    assert html.count("class0000") == 1  # no loss: table only
    assert html.count("class0970") == 2  # the thirtieth
    assert html.count("class0969") == 1


# --- the same bytes --------------------------------------------------------------------------------------------------
def test_another_process_writes_the_same_bytes():
    code = (
        "import hashlib, runpy, sys; from flyweight.face.report import report; from flyweight.face.card import card\n"
        f"r = runpy.run_path({str(SAMPLE)!r})['classification']()\n"
        "print(hashlib.sha256((report(r) + card(r)).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = PAGES["classification"] + card(sample.classification())
    assert run.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_the_users_plot_style_neither_changes_the_page_nor_is_changed():
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.linewidth": 9.0, "svg.fonttype": "path"}):
        assert report(sample.classification()) == PAGES["classification"]
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
        assert matplotlib.rcParams["svg.fonttype"] == "path"


# --- pictures --------------------------------------------------------------------------------------------------------
def claim(measured: float, goal: float, low: float | None = None, high: float | None = None) -> Claim:
    interval = None if low is None or high is None else Interval(measured, low, high)
    return Claim("x", "promise", "holds", measured, "share", interval, None, Limit("x", "<=", goal, "share"))


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_a_bar_ends_on_the_side_of_the_goal_where_the_number_is(measured, goal):
    svg = ElementTree.fromstring(plots.bullet(claim(measured, goal)))
    bar = next(e for e in svg if e.get("class") == "f-got")
    tick = float(re.match(r"M([\d.]+)", next(e for e in svg if "s-goal" in e.get("class")).get("d"))[1])
    left, width = float(bar.get("x")), float(bar.get("width"))
    tip = left if measured < 0 else left + width
    # positions are rounded to a tenth, and the bar is never thinner than 0.8
    assert tip <= tick + 1.0 if measured <= goal else tip >= tick - 1.0
    assert left >= 0
    assert left + width <= 160
    assert 0 <= tick <= 160


def test_a_bar_without_anything_to_compare_is_not_drawn():
    assert plots.bullet(Claim("x", "proof", "holds", 3e-7, "max abs difference")) == ""
    assert plots.bullet(Claim("x", "promise", "undecided", None, "share", None, None, claim(0, 1).limit)) == ""
    other_unit = Claim("x", "promise", "holds", 0.5, "share", None, None, Limit("x", "<=", 2e6, "bytes"))
    assert plots.bullet(other_unit) == ""


def area(path: str) -> float:
    """Area under a step outline, from its V and H commands."""
    x, y, total = *map(float, re.match(r"M([\d.]+) ([\d.]+)", path).groups()), 0.0
    for command, value in re.findall(r"([VH])([\d.]+)", path):
        if command == "V":
            y = float(value)
        else:
            total += (float(value) - x) * (58 - y)
            x = float(value)
    return total


def test_histograms_of_different_counts_and_ranges_cover_the_same_area():
    before = Histogram(-1.0, 1.0, (10, 20, 40, 20, 10))
    after = Histogram(-0.5, 0.25, (1, 2, 0, 3))
    svg = ElementTree.fromstring(plots.histograms(before, after, "x"))
    paths = {e.get("class"): e.get("d") for e in svg if e.get("d")}
    # positions are rounded to 0.1 of about 50 by 58: 1 % is far more than that allows
    assert area(paths["f-before"]) == pytest.approx(area(paths["s-after"]), rel=0.01)
    assert area(paths["f-before"]) > 100


def test_the_frontier_shows_every_point_and_marks_the_chosen_limit_and_measured_one():
    points = [FrontierPoint(0.01 * i, 1 - 0.1 * i, 1 - 0.05 * i, 1.0, i == 4) for i in range(7)]
    svg = plots.frontier(points, "latency", 0.5, (0.61, 0.03))
    texts = [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]
    assert [texts.count(word) for word in ("chosen", "limit", "measured")] == [1, 1, 1]
    assert svg.count("<use ") == 7 + 1 + 1  # points, chosen, measured
    assert "7 points. Chosen: 60.0 % at error 0.04." in svg
    plain = plots.frontier(points, "size")
    assert "limit" not in plain
    assert "measured" not in plain


def test_lessons_show_every_epoch_and_mark_what_was_kept():
    taught = Recovery("cut", ("weights",), (0.5, 0.3, 0.4), (0.6, 0.45, 0.2, 0.25), 2)
    svg = plots.lessons(taught, 0)
    texts = [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]
    assert texts.count("kept") == 1
    assert svg.count("<use ") == 4 + 3 + 1  # judged, losses, kept
    assert "over 3 epochs, 0.6 before the first, 0.2 in what was kept." in svg
    assert svg.count('id="lessons-0-') == plots.lessons(taught, 1).count('id="lessons-1-') > 0
    nothing = msgspec.structs.replace(taught, losses=(), judged=(0.6,), best=0, stopped="the loss became nan")
    assert plots.lessons(nothing, 0) == ""
    odd = msgspec.structs.replace(taught, judged=(0.6, math.nan, math.inf, 0.25))
    assert "0.6 before the first." in plots.lessons(odd, 0)


def test_lessons_are_told_where_there_were_some():
    text = Page(PAGES["classification"]).text
    assert_says(
        text, "What was cut", "norms, then weights", "before the first epoch", "epoch 3 · kept", "the time was over"
    )
    assert "Lessons" not in Page(PAGES["embedding"]).text


def test_a_frontier_without_latencies_has_no_latency_plot():
    points = [FrontierPoint(0.1, None, 0.5, 0.5), FrontierPoint(0.0, None, 1.0, 1.0)]
    assert plots.frontier(points, "latency") == ""
    assert plots.frontier(points, "size") != ""


def test_class_names_in_the_plot_are_whole_text_or_shortened():
    rows = [ClassRow("<b>$x^2$</b>&amp;", 5, 0.9, 0.8, 1.0), ClassRow("模" * 50, 5, 0.9, 0.7, 1.0)]
    texts = [e.text for e in ElementTree.fromstring(plots.classes(rows)).iter() if e.tag.endswith("text")]
    assert texts.index("模" * 21 + "…") < texts.index("<b>$x^2$</b>&amp;")  # the larger loss first


def test_costs_without_latency_are_shown_as_unknown_not_as_zero():
    plain = sample.classification()
    first = plain.decisions[0]
    options = tuple(msgspec.structs.replace(o, cost=Cost(0, -10)) for o in first.options)
    only = msgspec.structs.replace(first, options=options, chosen=options[1])
    html = report(msgspec.structs.replace(plain, decisions=(only,)))
    assert html.count('<td class="n">–</td><td class="n">–</td></tr>') == len(options)
