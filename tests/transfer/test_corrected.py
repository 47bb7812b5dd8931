"""f(x) + Δf(x): one graph and one file, a source that stays, a corrector within its share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import flyweight as fw
from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.errors import ModelError, UsageError
from flyweight.graph.cost import total_macs
from flyweight.graph.trace import trace
from flyweight.transfer.record import fingerprint, state_of

from .nets import Reader, drawn, ids

ORT = runtimes.get("onnxruntime")


class Masked(nn.Module):
    """Token numbers and a mask to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.wide, self.out = nn.Embedding(60, 32), nn.Linear(32, 256), nn.Linear(256, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[:, :, None].float()
        return self.out(torch.relu((self.wide(self.words(input_ids)) * real).sum(1)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10),
    )  # fmt: skip


CASES = {
    "images": (convolutional, lambda: (drawn(4, 3, 17, 13, seed=1),)),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 6), nn.Unflatten(1, (2, 3))),
        lambda: (drawn(4, 20, seed=1),),
    ),
    "tokens": (Reader, lambda: (ids(4),)),
    "tokens and a mask": (Masked, lambda: (ids(4) % 60, torch.tensor([[1, 1, 1, 1, 0]] * 4))),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    net, inputs = CASES[request.param]
    torch.manual_seed(3)
    return net().eval(), inputs()


def macs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    return total_macs(trace(model, inputs).module)


def test_a_corrector_takes_its_share_changes_nothing_at_first_and_is_one_graph_with_its_source(case, tmp_path: Path):
    """Three laws in one test: tracing is what takes the time."""
    source, inputs = case
    corrector = fw.corrector_like(source, inputs, macs=0.3, reads="inputs")
    whole, own = macs_of(source, inputs), macs_of(corrector, inputs)
    assert 0.2 * whole < own <= 0.3 * whole  # near it, too: one more channel would be above
    with torch.no_grad():
        wanted = source(*inputs)
        assert torch.equal(fw.Corrected(source, corrector)(*inputs), wanted)
        for p in corrector.last.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
        both = fw.Corrected(source, corrector).eval()
        answers = both(*inputs)
        assert not torch.allclose(answers, wanted)
        torch.testing.assert_close(answers, wanted + corrector(*inputs))
    graph = trace(both, inputs).module
    assert total_macs(graph) == whole + own
    export(graph, inputs, tmp_path / "both.onnx")
    names = ORT.input_names(tmp_path / "both.onnx")
    run = ORT.load(tmp_path / "both.onnx", 1)
    for rows in (1, 3):
        feed = {name: x[:rows].numpy() for name, x in zip(names, inputs, strict=True)}
        (found,) = run(feed).values()
        torch.testing.assert_close(torch.from_numpy(found), answers[:rows], rtol=1e-4, atol=1e-4)


def inner(source: nn.Module, corrector: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The correction, from values that a graph of the source shows by name: no hooks."""
    shown = trace(source, inputs).module
    seen: dict[str, Tensor] = {}

    class Watching(fx.Interpreter):
        def call_module(self, target, args, kwargs):
            seen[target] = args[0]
            return super().call_module(target, args, kwargs)

    Watching(shown).run(*inputs)
    means = [
        x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x for x in map(seen.get, corrector.reads)
    ]
    return corrector.last(torch.relu(corrector.first(corrector.scale(torch.cat(means, 1)))))


@pytest.mark.parametrize(("name", "share"), [("images", 0.05), ("tokens", 0.3), ("sequences", 0.3)])
def test_a_corrector_of_inner_values_sees_what_the_source_sees(name: str, share: float, tmp_path: Path):
    torch.manual_seed(3)
    source, inputs = {
        "sequences": (
            nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.Flatten(), nn.Linear(200, 3)),
            (drawn(4, 5, 8, seed=1),),
        )
    }.get(name) or (CASES[name][0](), CASES[name][1]())  # fmt: skip
    corrector = fw.corrector_like(source.eval(), inputs, macs=share)
    whole = macs_of(source, inputs)
    both = fw.Corrected(source, corrector)
    with torch.no_grad():
        wanted = source(*inputs)
        assert torch.equal(both.train()(*inputs), wanted)  # and the scale of these rows was learned
        for p in corrector.last.parameters():
            p.normal_(generator=torch.Generator().manual_seed(0))
        answers = both.eval()(*inputs)
        torch.testing.assert_close(answers, wanted + inner(source, corrector, inputs))
        again = copy.deepcopy(both)
        torch.testing.assert_close(again(*inputs), answers)  # the copy reads its own source
    graph = trace(both, inputs).module
    own = total_macs(graph) - whole
    assert 2 / 3 * share * whole < own <= share * whole
    export(graph, inputs, tmp_path / "both.onnx")
    run = ORT.load(tmp_path / "both.onnx", 1)
    (found,) = run(
        dict(zip(ORT.input_names(tmp_path / "both.onnx"), (x.numpy() for x in inputs), strict=True))
    ).values()
    torch.testing.assert_close(torch.from_numpy(found), answers, rtol=1e-4, atol=1e-4)


def test_inner_values_correct_what_inputs_alone_do_not():
    """What is missing in the source's answer is a sum over its hidden layer, which its last layer does not read."""
    torch.manual_seed(0)
    hidden, x = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()), drawn(512, 16, seed=4)
    source = nn.Sequential(hidden, nn.Linear(32, 4))
    with torch.no_grad():
        for layer in (hidden[0], hidden[2]):
            layer.weight.mul_(4)  # so steep that two layers cannot say it
        wanted = hidden(x) @ drawn(32, 4, seed=5)
        source[1].weight.zero_()
    left = {}
    for reads in ("inputs", "layers"):
        torch.manual_seed(1)
        both = fw.Corrected(copy.deepcopy(source), fw.corrector_like(source, x[:2], macs=2.0, reads=reads)).train()
        optimizer = torch.optim.Adam(both.corrector.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (both(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        left[reads] = float(loss.detach())
    assert left["layers"] < 0.7 * left["inputs"]


def test_only_the_corrector_learns_and_the_source_keeps_answering():
    source, x = convolutional(), drawn(16, 3, 17, 13, seed=1)
    before = fingerprint(state_of(source))
    both = fw.Corrected(source, fw.corrector_like(source, x, macs=0.3)).train()
    assert both.corrector.training
    assert not any(part.training for part in source.modules())
    wanted = copy.deepcopy(source)(x) + drawn(16, 10, seed=2)
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (both(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert fingerprint(state_of(source)) == before  # norms' statistics, too


def test_a_source_keeps_the_modes_of_its_parts_while_it_is_looked_at():
    source, x = convolutional().train(), drawn(16, 3, 17, 13, seed=1)
    source[1].eval()  # a frozen norm, as fine-tuning has it
    before = fingerprint(state_of(source)), [part.training for part in source.modules()]
    fw.corrector_like(source, x)
    assert (fingerprint(state_of(source)), [part.training for part in source.modules()]) == before


def test_what_cannot_be_added_is_refused():
    source = nn.Linear(4, 3)
    with pytest.raises(ModelError, match="answers 2×1, the source 2×3"):
        fw.Corrected(source, nn.Linear(4, 1))(torch.zeros(2, 4))  # would broadcast
    with pytest.raises(ModelError, match="answers 2×3×1"):
        fw.Corrected(source, nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))))(torch.zeros(2, 4))
    with pytest.raises(ModelError, match="the source answers a tuple"):
        fw.Corrected(nn.LSTM(4, 3), nn.Linear(4, 3))(torch.zeros(2, 4))
    with pytest.raises(UsageError, match=r"not a torch\.nn\.Module"):
        fw.Corrected(source, torch.relu)
    with pytest.raises(UsageError, match="one module"):
        fw.Corrected(source, source)


def test_sources_and_shares_that_have_no_corrector_are_refused():
    with pytest.raises(UsageError, match=r"computes in torch\.bfloat16"):
        fw.corrector_like(nn.Linear(4, 3).bfloat16(), torch.zeros(2, 4).bfloat16())
    with pytest.raises(UsageError, match=r"not a torch\.nn\.Module"):
        fw.corrector_like(len, torch.zeros(2, 4))
    with pytest.raises(UsageError, match="reads is 'outputs'"):
        fw.corrector_like(nn.Linear(4, 3), torch.zeros(2, 4), reads="outputs")
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        fw.corrector_like(nn.Flatten(), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="the smallest corrector takes 7"):
        fw.corrector_like(nn.Linear(4, 3), torch.zeros(2, 4), macs=0.05)
    with pytest.raises(UsageError, match="macs is 0"):
        fw.corrector_like(nn.Linear(4, 3), torch.zeros(2, 4), macs=0)
    with pytest.raises(UsageError, match=r"no corrector for inputs 2×5×4(?s:.*)of your own"):
        fw.corrector_like(nn.Linear(4, 3), torch.zeros(2, 5, 4), reads="inputs")
