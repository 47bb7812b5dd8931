"""The budget grammar: what it reads, what it refuses and with which way out, and the verdict on an interval."""

import math
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.budget import budget, format_limit, is_quality, is_time, judge_limit, parse, shape_sizes, with_guard
from flyweight.errors import BudgetError, UsageError
from flyweight.types import Budget, Interval, Limit, from_json, to_json


@pytest.mark.parametrize(
    ("text", "value", "unit", "shape"),
    [
        ("latency<=50%", 0.5, "share", ""),
        ("latency <= 3 ms", 0.003, "s", ""),
        ("latency<=250us", 0.00025, "s", ""),
        ("latency≤250µs", 0.00025, "s", ""),
        ("latency@batch=8<=4ms", 0.004, "s", "batch=8"),
        ("latency @ batch = 8 <= 4ms", 0.004, "s", "batch=8"),
        ("size<=2MB", 2e6, "bytes", ""),
        ("size<=2MiB", 2 * 2**20, "bytes", ""),
        ("size<=2kB", 2e3, "bytes", ""),
        ("size<=2KB", 2e3, "bytes", ""),
        ("size<=2KiB", 2048, "bytes", ""),
        ("size<=1_000_000B", 1e6, "bytes", ""),
        ("macs<=12M", 12e6, "macs", ""),
        ("macs<=1500", 1500, "macs", ""),
        ("drop<=0.5pt", 0.5, "points", ""),
        ("worst_class_drop<=5pt", 5, "points", ""),
        ("accuracy>=93%", 0.93, "", ""),
        ("accuracy>=.93", 0.93, "", ""),
        ("agreement>=95%", 0.95, "", ""),
        ("divergence<=1e-3", 0.001, "", ""),
        ("squared_error<=2.5", 2.5, "", ""),
    ],
)
def test_a_limit_reads_as_written(text, value, unit, shape):
    (limit,) = parse(text).limits
    assert (limit.value, limit.unit, limit.shape) == (value, unit, shape)
    assert limit.text == text


def test_limits_keep_their_order_and_shapes_may_hold_commas():
    limits = parse("latency<=50%, size<=25%,drop<=2pt;\nagreement>=90%").limits
    assert [limit.quantity for limit in limits] == ["latency", "size", "drop", "agreement"]
    first, second = parse("latency@seq=128, batch=8<=4ms, size<=30%").limits
    assert (first.shape, second.quantity) == ("batch=8,seq=128", "size")
    assert format_limit(first) == "latency@batch=8,seq=128<=4ms"
    assert parse(format_limit(first)).limits[0].shape == first.shape


@pytest.mark.parametrize(
    ("shape", "word"),
    [("seq=128", "no batch size"), ("batch=8,width=3", "'width=3'"), ("batch=1,seq=2,seq=3", "'seq=3'")],
)
def test_shapes_name_the_batch_and_known_sizes_once(shape, word):
    with pytest.raises(BudgetError, match=word):
        parse(f"latency@{shape}<=4ms")
    with pytest.raises(UsageError, match=word):
        shape_sizes(shape)


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("drop<=1%", "ambiguous", "drop<=1pt"),
        ("drop<=1%", "ambiguous", "accuracy>="),
        ("drop<=0.01", "ambiguous", "drop<=0.01pt"),
        ("worst_class_drop<=3%", "ambiguous", "worst_class_drop<=3pt"),
        ("drop<=0,5pt", "commas separate", "drop<=0.5pt"),
        ("latency<50%", "only <= and >=", "latency<=50%"),
        ("accuracy>90%", "only <= and >=", "accuracy>=90%"),
        ("latency=50%", "'='", "latency<=50%"),
        ("latency==50%", "'=='", "latency<=50%"),
        ("latency@batch=8=4ms", "'='", "latency@batch=8<=4ms"),
        ("latency=<50%", "'=<'", "latency<=50%"),
        ("latency>=50%", "less latency is better", "latency<=50%"),
        ("accuracy<=90%", "more accuracy is better", "accuracy>=90%"),
        ("squared_error>=1", "less squared_error is better", "squared_error<=1"),
        ("latencyy<=50%", "no quantity or metric", "did you mean latency?"),
        ("Accuracy>=90%", "no quantity or metric", "did you mean accuracy?"),
        ("bananas<=50%", "no quantity or metric", "latency, latency.p99, throughput, size"),
        ("<=50%", "is no quantity", "latency"),
        ("accuracy>=93", "more than 1", "accuracy>=93%"),
        ("agreement>=120%", "more than 1", "at most 1"),
        ("size<=2mb", "no unit of size", "2MB"),
        ("size<=2ms", "no unit of size", "2MB"),
        ("size<=2", "unit is missing", "25%"),
        ("latency<=0ms", "more than 0", "3ms"),
        ("latency<=-1ms", "more than 0", "3ms"),
        ("divergence<=-1", "0 or more", "0.02"),
        ("divergence<=nan", "is no value", "0.02"),
        ("divergence<=1e999", "finite", "0.02"),
        ("latency", "is no limit", "latency<=50%"),
        ("", "names no limit", "latency<="),
        (" , ", "names no limit", "latency<="),
        ("size@batch=8<=2MB", "only times", "@"),
        ("latency@batch=0<=2ms", "no size of a shape", "batch=8"),
        ("latency@<=2ms", "no size of a shape", "batch=8"),
        ("latency@batch=8, size<=2MB", "no size of a shape", "batch=8"),
        ("size<=2MB, size<=2MB", "given twice", "one of the two"),
        ("size<=2MB, size<=3MB", "contradicts size<=2MB", "one of the two"),
        ("latency<=50%, latency@batch=1<=60%", "no effect", "shape"),
        ("latency@batch=1<=60%, latency<=50%", "no effect", "shape"),
    ],
)
def test_unreadable_and_ambiguous_limits_say_the_way_out(text, message, fix):
    with pytest.raises(BudgetError) as caught:
        parse(text)
    assert message in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize("text", ["saliency>=0.9"])
def test_what_comes_later_is_refused_by_name(text):
    with pytest.raises(UsageError, match="comes with a later version") as caught:
        parse(text)
    assert not isinstance(caught.value, BudgetError)
    assert caught.value.exit_code == 2


def test_a_share_and_an_absolute_limit_of_one_quantity_may_stand_together():
    assert len(parse("latency<=50%, latency<=3ms, latency@batch=8<=40%").limits) == 3


@pytest.mark.parametrize("wrong", [None, 5, ["latency<=50%"]])
def test_other_types_are_no_budget(wrong):
    with pytest.raises(BudgetError, match="a budget is text"):
        parse(wrong)


def test_the_keyword_form_is_the_same_budget():
    def bare(made: Budget) -> list[tuple]:
        return [(limit.quantity, limit.op, limit.value, limit.unit, limit.shape) for limit in made.limits]

    text = parse("latency<=50%, latency@batch=8<=4ms, drop<=0.5pt, agreement>=0.9")
    words = budget(latency="50%", **{"latency@batch=8": "4ms"}, drop="0.5pt", agreement=0.9)
    assert bare(words) == bare(text)
    assert bare(parse({"latency": "50%"})) == bare(parse("latency<=50%"))
    with pytest.raises(BudgetError, match="ambiguous"):
        budget(drop=1)
    with pytest.raises(BudgetError, match="no value"):
        budget(latency=True)


def test_a_metric_of_the_user_counts_once_it_is_in_use():
    wanted = budget(f1="80%", wer="<=10%")
    assert [(limit.quantity, limit.op) for limit in wanted.limits] == [("f1", ">="), ("wer", "<=")]
    assert parse(wanted, metrics={"f1": "higher", "wer": "lower"}).limits == wanted.limits
    with pytest.raises(BudgetError, match="no quantity or metric 'f1'"):
        parse(wanted)
    with pytest.raises(BudgetError, match="did you mean latency"):
        budget(latenci="50%")
    with pytest.raises(BudgetError, match="less wer is better"):
        parse("wer>=10%", metrics={"wer": "lower"})


def test_prefer_is_checked_and_kept():
    assert parse("size<=50%").prefer == "quality"
    assert parse(parse("size<=50%", prefer="latency")).prefer == "latency"
    assert parse(budget("size", latency="50%"), prefer="quality").prefer == "quality"
    with pytest.raises(UsageError, match="prefer") as caught:
        parse("size<=50%", prefer="latancy")
    assert "latency" in caught.value.fix


def test_a_record_made_by_hand_is_checked_too():
    good = parse("latency<=50%, drop<=1pt")
    assert parse(good) == good
    assert parse(from_json(to_json(good), Budget)) == good
    for wrong in (
        Limit("latency", ">=", 0.5, "share"),
        Limit("drop", "<=", 0.5, "share"),
        Limit("latency", "<=", math.nan, "s"),
        Limit("latency", "<=", -1.0, "s"),
        Limit("nonsense", "<=", 1.0, ""),
    ):
        with pytest.raises(BudgetError):
            parse(Budget(limits=(wrong,)))


QUANTITY_UNITS = [
    ("latency", "<=", "share"), ("latency", "<=", "s"), ("size", "<=", "bytes"), ("size", "<=", "share"),
    ("macs", "<=", "macs"), ("drop", "<=", "points"), ("agreement", ">=", ""), ("accuracy", ">=", ""),
    ("divergence", "<=", ""),
]  # fmt: skip


@given(st.sampled_from(QUANTITY_UNITS), st.floats(1e-7, 1.0), st.sampled_from(["", "batch=8"]))
def test_a_formatted_limit_reads_back_exactly(kind, value, shape):
    quantity, operator, unit = kind
    limit = Limit(quantity, operator, value * (10**9 if unit in {"bytes", "macs"} else 1), unit)
    if quantity == "latency":
        limit = Limit(quantity, operator, value, unit, shape=shape)
    (again,) = parse(format_limit(limit)).limits
    assert (again.quantity, again.op, again.value, again.unit, again.shape) == (
        limit.quantity, limit.op, limit.value, limit.unit, limit.shape,
    )  # fmt: skip


@given(st.decimals(Decimal("0.001"), Decimal(99), places=3))
def test_values_are_correctly_rounded(number):
    (limit,) = parse(f"latency<={number}ms").limits
    assert limit.value == float(number / 1000)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("latency <= 0.25ms", "latency<=250us"),
        ("size<=2MiB", "size<=2.097152MB"),
        ("macs<=1500000", "macs<=1.5M"),
        ("accuracy>=0.93", "accuracy>=93%"),
        ("drop<=0.50pts", "drop<=0.5pt"),
        ("drop<=0pt", "drop<=0pt"),
        ("latency@batch= 8<=4e-3s", "latency@batch=8<=4ms"),
        ("size<=100%", "size<=100%"),
    ],
)
def test_limits_are_written_plainly(text, written):
    assert format_limit(parse(text).limits[0]) == written


@pytest.mark.parametrize(
    ("task", "has_labels", "metric", "guard"),
    [
        ("classify", True, "accuracy", "drop<=1pt"),
        ("classify", True, "my_metric", "agreement>=95%"),
        ("classify", False, "accuracy", "agreement>=95%"),
        ("multilabel", True, "accuracy", "divergence<=0.05"),
        ("embed", False, "accuracy", "divergence<=0.02"),
        ("regress", False, "accuracy", "divergence<=0.01"),
    ],
)
def test_a_budget_without_quality_gets_the_default_guard(task, has_labels, metric, guard):
    guarded, note = with_guard(parse("latency<=50%", prefer="size"), task, has_labels, metric)
    assert [format_limit(limit) for limit in guarded.limits] == ["latency<=50%", guard]
    assert [limit.default for limit in guarded.limits] == [False, True]
    assert guarded.prefer == "size"
    assert note is not None
    assert guard in note.text


@pytest.mark.parametrize("own", ["drop<=3pt", "agreement>=50%", "accuracy>=1%", "worst_class_drop<=9pt"])
def test_an_own_limit_on_quality_replaces_the_guard(own):
    wanted = parse(f"size<=50%, {own}")
    assert with_guard(wanted, "classify", True) == (wanted, None)
    assert [is_quality(limit) for limit in wanted.limits] == [False, True]


def test_no_guard_is_invented_for_unknown_tasks():
    with pytest.raises(BudgetError, match="custom"):
        with_guard(parse("size<=50%"), "custom", True)
    with pytest.raises(UsageError, match="later version"):
        with_guard(parse("size<=50%, divergence<=1"), "generate", True)


AT_MOST, AT_LEAST = parse("drop<=1pt, agreement>=90%").limits


@pytest.mark.parametrize(
    ("limit", "low", "high", "state"),
    [
        (AT_MOST, 0.2, 1.0, "holds"),
        (AT_MOST, 0.2, 1.1, "undecided"),
        (AT_MOST, 1.0, 1.1, "undecided"),
        (AT_MOST, 1.01, 2.0, "fails"),
        (AT_MOST, -5.0, -1.0, "holds"),
        (AT_LEAST, 0.9, 1.0, "holds"),
        (AT_LEAST, 0.8, 0.95, "undecided"),
        (AT_LEAST, 0.8, 0.89, "fails"),
        (AT_MOST, 1.0, 1.0, "holds"),
        (AT_MOST, 1.0000001, 1.0000001, "fails"),
        (AT_MOST, math.nan, math.nan, "fails"),
    ],
)
def test_a_limit_holds_only_if_the_whole_interval_does(limit, low, high, state):
    assert judge_limit(limit, Interval((low + high) / 2, low, high)) == state


@given(st.floats(-10, 10), st.floats(0, 5), st.floats(0, 5), st.floats(-10, 10))
def test_verdicts_mirror_when_the_direction_turns(value, below, above, bound):
    measured, mirrored = Interval(value, value - below, value + above), Interval(-value, -value - above, -value + below)
    at_most, at_least = Limit("x", "<=", bound, ""), Limit("x", ">=", -bound, "")
    assert judge_limit(at_most, measured) == judge_limit(at_least, mirrored)


def test_the_budget_knows_no_torch():
    code = "import sys, flyweight.budget; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "text", ["throughput>=200%", "throughput@batch=8>=300/s", "latency.p99<=60%", "latency.p99<=4ms"]
)
def test_limits_on_the_clock_read_as_they_are_written(text):
    (limit,) = parse(text).limits
    assert format_limit(limit) == text
    assert is_time(limit)
    assert not is_quality(limit)


def test_a_wide_limit_makes_a_looser_narrow_one_idle_in_either_direction():
    with pytest.raises(BudgetError, match="no effect"):
        parse("throughput>=200%, throughput@batch=8>=150%")
    assert len(parse("throughput>=200%, throughput@batch=8>=300%").limits) == 2
