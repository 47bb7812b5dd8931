"""Learning with what was rounded: it starts at the same answers, ends in the same form, and comes nearer to the original."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export, stored_name
from flyweight.deploy.placement import slots
from flyweight.errors import UsageError
from flyweight.graph.numbers import FAKE_QUANTIZE
from flyweight.graph.operators import roundable, value_read
from flyweight.graph.program import save
from flyweight.graph.trace import trace
from flyweight.methods import int8, stored
from flyweight.numerics.divergence import divergence
from flyweight.recover import quantized as module
from flyweight.recover.distill import Distill, read_recover
from flyweight.recover.quantized import quantized
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.train.descent import Descent
from stores import Kept

from ..deploy import int8_nets as nets
from ..graph.cases import seeded
from ..graph.nets import net

LARGEST = 7
HOW = Distill(lr=3e-2, quantized_epochs=3)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Small(nn.Module):
    """A norm to fold, a pool whose grid is that of its input, a sum, ReLU6, and a convolution at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c, self.d = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Four numbers a place."""
        x = F.max_pool2d(F.relu6(3 * self.n(self.a(x))), 2)
        return self.d(F.relu(self.c(F.relu(self.b(x))) + x))


def pictures(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher() -> fx.GraphModule:
    return trace(seeded(Small).eval(), (pictures(2, 9),)).module


def rounded_by(teacher: fx.GraphModule, **setting: object) -> fx.GraphModule:
    x = pictures(64, 3)
    names = list(roundable(teacher))
    ready = prepared(teacher, (x[:2],), names, lambda: ((one,) for one in x.split(32)))
    return with_numbers(ready, [int8.step(name, **setting) for name in names])[0]


@pytest.fixture(scope="module")
def delivered(teacher: fx.GraphModule) -> fx.GraphModule:
    return rounded_by(teacher, largest=LARGEST)


def judge_of(teacher: fx.GraphModule, x: Tensor, task: str = "regress") -> Callable[[fx.GraphModule], float]:
    def judge(graph: fx.GraphModule) -> float:
        with torch.no_grad():
            return float(divergence(task, teacher(x), graph(x)).mean())

    return judge


def taught(student: fx.GraphModule, teacher: fx.GraphModule, settings: Distill = HOW, **more: object) -> Descent:
    x = pictures(256, 0)

    def apart(wanted: Tensor, outputs: Tensor) -> Tensor:
        return divergence("regress", wanted, outputs)

    arguments = {"judge": judge_of(teacher, pictures(64, 1)), **more}
    return quantized(student, teacher, lambda: ((one,) for one in x.split(32)), apart, settings=settings, **arguments)


def ever_better() -> Callable[[fx.GraphModule], float]:
    """A judge that keeps what was learned last, whatever it is."""
    said = itertools.count()
    return lambda graph: -float(next(said))


@pytest.fixture(scope="module")
def learned(teacher: fx.GraphModule, delivered: fx.GraphModule) -> tuple[fx.GraphModule, Descent]:
    student = copy.deepcopy(delivered)
    return student, taught(student, teacher, judge=ever_better())


def grids_of(graph: fx.GraphModule) -> dict[str, tuple]:
    return {node.name: tuple(node.args[1:]) for node in graph.graph.nodes if node.target == FAKE_QUANTIZE}


def assert_same(a: fx.GraphModule, b: fx.GraphModule) -> None:
    """The same program and the same bits, scales too."""
    (one, tensors), (other, others) = save(a), save(b)
    assert one == other
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        assert torch.equal(x, others[name]), name


def assert_on_its_grids(graph: fx.GraphModule, largest: int = LARGEST) -> None:
    scales = graph.meta["extra_tensors"]
    for node in graph.graph.nodes:
        if node.op != "call_module" or node.target not in graph.meta["numbers"]:
            continue
        layer, scale = graph.get_submodule(node.target), scales[f"{node.target}.weight_scale"].double()
        assert bool((scale > 0).all())
        integers = layer.weight.detach().double().flatten(1) / scale[:, None]
        assert torch.allclose(integers, integers.round(), rtol=0, atol=1e-5)  # 7 * 2^-24 of float32
        assert float(integers.abs().max()) <= largest + 1e-5
        unit = scale * value_read(graph, node).args[1]
        biases = layer.bias.detach().double() / unit
        # a float32 bias of n units is off by n * 2^-24 of them
        assert bool(((biases - biases.round()).abs() <= biases.abs() * 2**-24 + 1e-6).all())


def test_it_starts_at_the_answers_that_were_delivered_and_the_best_is_kept(
    teacher: fx.GraphModule, delivered: fx.GraphModule
):
    student, before = copy.deepcopy(delivered), judge_of(teacher, pictures(64, 1))(delivered)
    said = iter([0.5, 0.6, 0.7, 0.8, 0.9])
    seen = []

    def judge(graph: fx.GraphModule) -> float:
        seen.append(judge_of(teacher, pictures(64, 1))(graph))
        return next(said)

    done = taught(student, teacher, judge=judge)
    assert seen[0] == before
    assert seen[1] != before
    assert done.best == 0
    assert_same(student, delivered)


def numbers(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fixed", [False, True])
def test_it_comes_nearer_to_the_original(fixed: bool):
    """By a tenth, and by six standard errors of the paired gain: on samples that taught nothing and chose nothing."""
    layers = (nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    teacher = trace(seeded(lambda: nn.Sequential(*layers)).eval(), (numbers(2, 9),)).module
    ready = prepared(teacher, (numbers(2, 9),), ["0", "2", "4"], lambda: iter([(numbers(512, 3),)]))
    delivered, _ = with_numbers(ready, [int8.step(name, largest=LARGEST, fixed=fixed) for name in ("0", "2", "4")])
    student = copy.deepcopy(delivered)

    def apart(wanted: Tensor, outputs: Tensor) -> Tensor:
        return divergence("regress", wanted, outputs)

    judge, how = judge_of(teacher, numbers(256, 1)), Distill(lr=3e-3, quantized_epochs=4)
    done = quantized(student, teacher, lambda: ((x,) for x in numbers(1024, 0).split(32)), apart, judge, how)
    with torch.no_grad():
        x = numbers(1024, 2)
        before, after = (divergence("regress", teacher(x), graph(x)) for graph in (delivered, student))
    gain = before - after
    assert float(gain.mean()) > 0.1 * float(before.mean())
    assert float(gain.mean()) > 6 * float(gain.std()) / math.sqrt(len(gain))
    # a bias moves by half a step of the products at most, which are some thousand to a step of the values
    assert done.judged[done.best] == pytest.approx(judge(student), rel=1e-2)
    same = [torch.equal(x, student.meta["extra_tensors"][name]) for name, x in delivered.meta["extra_tensors"].items()]
    assert same == [fixed] * 3  # powers of two stay
    assert (grids_of(student) == grids_of(delivered)) == fixed
    pairs = [[graph.get_submodule(name).weight for graph in (student, delivered)] for name in ("0", "2", "4")]
    assert not all(torch.equal(*pair) for pair in pairs)
    assert_on_its_grids(student)


def test_it_ends_in_the_form_it_came_in(delivered, learned):
    student, _ = learned
    assert_on_its_grids(delivered)
    assert_on_its_grids(student)
    assert list(student.state_dict()) == list(delivered.state_dict())
    assert [(n.name, n.op, n.target) for n in student.graph.nodes] == [
        (n.name, n.op, n.target) for n in delivered.graph.nodes
    ]
    assert student.meta["numbers"] == delivered.meta["numbers"] != {}
    assert student.meta["extra_tensors"].keys() == delivered.meta["extra_tensors"].keys()
    for name, scale in student.meta["extra_tensors"].items():
        assert scale.dtype == torch.float32
        assert not torch.equal(scale, delivered.meta["extra_tensors"][name])
    assert all(p.requires_grad for p in student.parameters())
    reread = copy.deepcopy(student)
    assert_same(reread, student)


def test_grids_that_were_one_stay_one_and_keep_to_what_is_known(teacher, delivered, learned):
    before, after = grids_of(delivered), grids_of(learned[0])
    assert before.keys() == after.keys()
    pairs = list(itertools.combinations(before, 2))
    assert any(before[a] == before[b] for a, b in pairs)  # the pool and what it reads
    for a, b in pairs:
        assert (before[a] == before[b]) == (after[a] == after[b])
    assert all(before[name][1:] == after[name][1:] for name in before)  # zero points and ends stay
    assert sum(before[name] != after[name] for name in before) >= len(before) - 2
    (six,) = [n for n in learned[0].graph.nodes if n.target == torch.ops.aten.relu6.default]
    assert next(iter(six.users)).args[1] * 255 <= 6 * (1 + 2**-20)


def test_a_grid_that_would_pass_what_is_known_stays_there_and_can_come_back():
    grid = module._Grid(0.02, 0, 0, 255, 0.025, False)
    with torch.no_grad():
        grid.change.fill_(1.0 * module.SLOWER)
    assert float(grid.step().detach()) == pytest.approx(0.025, rel=1e-6)
    (slope,) = torch.autograd.grad(grid.step(), grid.change)
    assert float(slope) * module.SLOWER == pytest.approx(0.025, rel=1e-6)


def test_the_exported_file_answers_as_what_was_trained(learned, tmp_path: Path):
    student, _ = learned
    runtime, file = runtimes.get("onnxruntime"), tmp_path / "learned.onnx"
    export(student, (pictures(2, 9),), file)
    assert runtime.conformance(file, [stored_name(name) for name in student.meta["numbers"]]) == []
    x = pictures(512, 4)
    answer = runtime.load(file, 1)({runtime.input_names(file)[0]: x.numpy()})
    last = [n for n in student.graph.nodes if n.target == FAKE_QUANTIZE][-1]
    with torch.no_grad():
        steps = (torch.from_numpy(next(iter(answer.values()))) - student(x)).abs() / last.args[1]
    assert float(steps.max()) <= 1.01
    assert float((steps > 0.01).float().mean()) <= 1e-3


@pytest.mark.parametrize("stop_at", [0, 5, 17])
def test_an_interrupted_one_goes_on_with_the_same_bits_and_leaves_an_ordinary_graph(
    teacher, delivered, learned, stop_at: int
):
    broken, again, store, asked = copy.deepcopy(delivered), copy.deepcopy(delivered), Kept(), itertools.count()

    def late() -> bool:
        if next(asked) == stop_at:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        taught(broken, teacher, store=store, judge=ever_better(), late=late)
    assert_on_its_grids(broken)
    assert [n.name for n in broken.graph.nodes] == [n.name for n in delivered.graph.nodes]
    taken: list[int] = []
    judge = ever_better()
    for _ in range(stop_at // 8 + 1):  # what was judged before the stop
        judge(again)
    done = taught(again, teacher, store=store, judge=judge, stage=lambda count: taken.append)
    assert done == learned[1]
    assert taken[0] == stop_at
    assert_same(again, learned[0])


def test_a_loss_that_is_no_number_keeps_what_was_before(teacher, delivered):
    student = copy.deepcopy(delivered)
    done = taught(student, teacher, Distill(lr=1e30, quantized_epochs=2))
    assert "the loss became" in done.stopped
    assert done.best == 0
    assert_same(student, delivered)


def test_packed_weights_and_tables_stay_and_what_is_float_learns():
    graph = trace(
        seeded(
            lambda: net(
                lambda s, x: s.c(torch.relu(s.b(torch.relu(s.a(s.words(x).mean(1)))))), words=nn.Embedding(50, 16),
                a=nn.Linear(16, 24), b=nn.Linear(24, 24), c=nn.Linear(24, 4),
            )
        ).eval(),
        (torch.randint(0, 50, (2, 6)),),
    ).module  # fmt: skip
    ids = torch.randint(0, 50, (128, 6))
    ready = prepared(graph, (ids[:2],), ["words", "a"], lambda: iter([(ids,)]), packed=["b"])
    numbers = [int8.step("words"), int8.step("a", largest=3), stored.step("b", 4)]
    delivered, _ = with_numbers(ready, numbers)
    student = copy.deepcopy(delivered)

    def apart(wanted: Tensor, outputs: Tensor) -> Tensor:
        return divergence("regress", wanted, outputs)

    quantized(
        student, graph, lambda: ((x,) for x in ids.split(16)), apart, ever_better(), Distill(quantized_epochs=2, lr=5e-3)
    )  # fmt: skip
    same = [n for n, x in student.state_dict().items() if torch.equal(x, delivered.state_dict()[n])]
    assert same == ["words.weight", "b.weight"]
    kept = [n for n, x in student.meta["extra_tensors"].items() if torch.equal(x, delivered.meta["extra_tensors"][n])]
    assert kept == ["words.weight_scale", "b.weight_ratios", "b.weight_unit"]


def test_a_row_that_says_all_by_its_bias_keeps_it():
    """Its scale may not become finer than 32 bits of bias allow: the integer would be cut off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[:3] *= 1e-12
        model[0].bias[:3] = torch.tensor([1.0, 2.0, -3.0])
    x = torch.randn(64, 8)
    graph = trace(model, (x[:2],)).module
    student, _ = with_numbers(
        prepared(graph, (x[:2],), ["0", "2"], lambda: iter([(x,)])), [int8.step(n) for n in ("0", "2")]
    )
    layers = module.layers_that_learn(student)
    grids = module._opened(student, layers)
    with torch.no_grad():
        student.get_submodule("0").change.fill_(-5.0 * module.SLOWER)  # 150 times as fine
    module._closed(student, layers, grids)
    assert torch.allclose(student.get_submodule("0").bias[:3].detach(), model[0].bias[:3].detach(), rtol=1e-4)
    assert_on_its_grids(student, 127)


@pytest.mark.parametrize("name", ["tokens", "depthwise behind zeros", "one dimension", "no biases"])
def test_every_kind_of_layer_is_opened_and_closed_without_a_trace(name: str):
    one = nets.delivered(name)
    student = copy.deepcopy(one.graph)
    layers = module.layers_that_learn(student)
    with torch.no_grad():
        expected = student(*one.example)
        grids = module._opened(student, layers)
        assert torch.equal(student(*one.example), expected)
    assert len(grids) == len(set(grids_of(one.graph).values()))
    assert slots(one.graph, layers)
    module._closed(student, layers, grids)
    assert_same(student, one.graph)


def test_what_does_not_fit_is_refused(teacher, delivered):
    with pytest.raises(UsageError, match="no layer of the network is in int8"):
        taught(copy.deepcopy(teacher), teacher)
    student = copy.deepcopy(delivered)
    with pytest.raises(UsageError, match="no descent"):
        taught(student, teacher, Distill())
    with pytest.raises(UsageError, match="judged nan"):
        taught(student, teacher, judge=lambda graph: math.nan)
    assert_same(student, delivered)
    for bad in (-1, True):
        with pytest.raises(UsageError, match="quantized_epochs"):
            Distill(quantized_epochs=bad)
    with pytest.raises(UsageError, match="no setting"):
        read_recover("distill:quantized_epochs=1.5")
    assert read_recover("distill:epochs=3,quantized_epochs=1") == Distill(3, quantized_epochs=1)
