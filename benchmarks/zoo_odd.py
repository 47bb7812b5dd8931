"""Networks of the zoo that are called, written or stored in odd ways; those that no graph can hold are refused."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from zoo_models import OUTPUT, Case, conv, image, net, pooled, sequence, signal, tokens, vector

__all__ = ["ODD", "REFUSED"]

MLP = {"a": 32, "b": 24}  # what is found in `mlp`


def mlp(forward: Callable[..., object] | None = None, **parts: object) -> nn.Module:
    """Three linear layers, 12 to 32 to 24 to 5, and more parts; `forward` by default calls them in turn."""
    plain: dict[str, object] = {"a": nn.Linear(12, 32), "b": nn.Linear(32, 24), "fc": nn.Linear(24, 5)}
    return net(forward or (lambda self, x: self.fc(inner(self, x))), **plain | parts)


def inner(self: Any, x: Tensor) -> Tensor:
    """What `mlp` hands to its head."""
    return F.relu(self.b(F.relu(self.a(x))))


# ---- how it computes ----


def in_place() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        y += 0.5
        z = self.c(y).relu_()
        z += self.b(y)
        return pooled(self, z.mul_(0.5).clamp_(min=-1.0))

    return net(forward, a=conv(3, 16), act=nn.ReLU(inplace=True), b=conv(16, 24), c=conv(16, 24), fc=nn.Linear(24, 5))


class Steps(torch.autograd.Function):
    """Rounding with a straight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """Multiples of 1/4."""
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """The gradient as it is."""
        return grad


@torch.library.custom_op("zoo::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator of the user's own."""
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def branches_in_the_graph() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = inner(self, x)
        return self.fc(torch.cond(y.sum() > 0, lambda z: z + 1.0, lambda z: z - 1.0, (y,)))  # type: ignore[no-any-return]

    return mlp(forward)


def branch_on_shape() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = inner(self, x) if x.shape[-1] == 12 and self.deep else self.a(x)[:, :24]
        return self.fc(y)  # type: ignore[no-any-return]

    made = mlp(forward)
    made.deep = True  # type: ignore[assignment]
    return made


def counts_its_calls() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(inner(self, x))  # type: ignore[no-any-return]

    return mlp(forward, calls=torch.zeros((), dtype=torch.int64))


def running_mean() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.fc(inner(self, x - self.seen))  # type: ignore[no-any-return]

    return mlp(forward, seen=torch.zeros(12))


def checkpointed() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc(checkpoint(lambda y: inner(self, y), x, use_reentrant=False))  # type: ignore[no-any-return]

    return mlp(forward)


def spectrum() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        power = torch.view_as_real(torch.fft.rfft(x.flatten(1))).square().sum(-1)
        return self.fc(F.relu(self.b(F.relu(self.a(torch.log1p(power))))))  # type: ignore[no-any-return]

    return net(forward, a=nn.Linear(17, 32), b=nn.Linear(32, 24), fc=nn.Linear(24, 5))


def complex_weights() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.fc((inner(self, x).to(torch.complex64) @ self.turn).abs())  # type: ignore[no-any-return]

    return mlp(forward, turn=nn.Parameter(torch.randn(24, 24, dtype=torch.complex64)))


def many_layers() -> nn.Module:
    return nn.Sequential(*[part for _ in range(60) for part in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 5))


def gathers() -> nn.Module:
    # every sample reads the steps it asks for: positions move, channels stay
    def forward(self: Any, x: Tensor, order: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = y.gather(1, order[:, :, None].expand(-1, -1, y.shape[-1]))
        return self.fc(F.relu(self.b(y)).mean(1))  # type: ignore[no-any-return]

    return net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 24), fc=nn.Linear(24, 5))


def any_length() -> nn.Module:
    return net(
        lambda self, x: pooled(self, F.relu(self.b(F.relu(self.a(x))))),
        a=nn.Conv1d(1, 16, 5, padding=2), b=nn.Conv1d(16, 24, 5, padding=2), fc=nn.Linear(24, 5),
    )  # fmt: skip


# ---- how its weights are kept ----


def reparametrized(change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A network whose second layer computes its weight."""

    def made() -> nn.Module:
        plain = net(
            lambda self, x: self.fc(F.relu(self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))))),
            a=nn.Linear(12, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 32), d=nn.Linear(32, 24), fc=nn.Linear(24, 5),
        )  # fmt: skip
        plain.b = change(plain.b)  # type: ignore[arg-type]
        return plain

    return made


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)


def standardised() -> nn.Module:
    # a convolution whose weight is normalised at every call
    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.a.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        y = F.relu(F.conv2d(x, w, self.a.bias, padding=1))
        return pooled(self, F.relu(self.c(F.relu(self.b(y)))))

    return net(forward, a=conv(3, 8), b=conv(8, 32), c=conv(32, 16), fc=nn.Linear(16, 5))


def loose_weights() -> nn.Module:
    # layers written as functions of parameters
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(F.linear(x, self.weights[0], self.weights[1]))
        return self.fc(F.relu(self.b(F.relu(self.parts["a"](y)))))  # type: ignore[no-any-return]

    return net(
        forward, weights=nn.ParameterList([torch.randn(16, 12), torch.zeros(16)]),
        parts=nn.ModuleDict({"a": nn.Linear(16, 32)}), b=nn.Linear(32, 24), fc=nn.Linear(24, 5),
    )  # fmt: skip


def functional_use() -> nn.Module:
    # real layers, called as functions of their weights
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(F.linear(x, self.a.weight, self.a.bias))
        return self.fc(F.relu(self.b(y)))  # type: ignore[no-any-return]

    return mlp(forward)


def einsum_weights() -> nn.Module:
    # heads of a projection written as one einsum over a parameter
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.einsum("bi,oi->bo", F.relu(self.a(x)), self.mix)
        return self.fc(F.relu(self.b(y)))  # type: ignore[no-any-return]

    return net(
        forward, a=nn.Linear(12, 8), mix=nn.Parameter(torch.randn(8, 8)), b=nn.Linear(8, 48), fc=nn.Linear(48, 5)
    )


def changed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    """`mlp` after something was done to it."""

    def made() -> nn.Module:
        model = mlp()
        given = change(model)
        return model if given is None else given  # type: ignore[no-any-return]

    return made


def hooked(hook: Callable[..., Any]) -> Callable[[], nn.Module]:
    """`mlp` with a hook on its first layer."""

    def made() -> nn.Module:
        model = mlp()
        model.a.register_forward_hook(hook)  # type: ignore[union-attr]
        return model

    return made


def lazy_but_called() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = mlp(a=nn.LazyLinear(32), b=nn.LazyLinear(24))
    made(torch.randn(2, 12))
    return made


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mlp(b=nn.LazyLinear(24))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Linear(12, 5)))  # type: ignore[no-any-return]


def quantized_already() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})  # type: ignore[no-any-return]


def named(first: str, second: str) -> Callable[[], nn.Module]:
    """A network whose layers have these names."""

    def made() -> nn.Module:
        plain = net(
            lambda self, x: self.fc(F.relu(self._modules[second](F.relu(self._modules[first](x))))), fc=nn.Linear(24, 5)
        )
        plain.add_module(first, nn.Linear(12, 32))
        plain.add_module(second, nn.Linear(32, 24))
        return plain

    return made


# ---- how it is called, and what it gives back ----


@dataclasses.dataclass
class Answer:
    """What a model of the Hugging Face kind gives back."""

    logits: Tensor
    hidden: Tensor | None = None


def answers(answer: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """`mlp` that hands (itself, logits, what the head reads) to `answer`."""

    def forward(self: Any, x: Tensor) -> Any:
        y = inner(self, x)
        return answer(self, self.fc(y), y)

    return lambda: mlp(forward)


def two_inputs() -> nn.Module:
    def forward(self: Any, picture: Tensor, facts: Tensor) -> Tensor:
        y = torch.cat([F.relu(self.a(picture)).mean((2, 3)), F.relu(self.b(facts))], 1)
        return self.fc(F.relu(self.c(y)))  # type: ignore[no-any-return]

    return net(forward, a=conv(3, 16), b=nn.Linear(12, 24), c=nn.Linear(40, 32), fc=nn.Linear(32, 5))


def keywords_only() -> nn.Module:
    def forward(self: Any, *, x: Tensor, weight: Tensor) -> Tensor:
        return self.fc(inner(self, x) * weight[:, None])  # type: ignore[no-any-return]

    return mlp(forward)


def optional_inputs() -> nn.Module:
    def forward(self: Any, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = inner(self, x)
        return self.fc((y if mask is None else y * mask) * scale)  # type: ignore[no-any-return]

    return mlp(forward)


def bag_of_words() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        counts = F.one_hot(ids, 50).float().sum(1)
        return self.fc(inner(self, counts))  # type: ignore[no-any-return]

    return mlp(forward, a=nn.Linear(50, 32))


def nested_inputs() -> nn.Module:
    return mlp(lambda self, parts: self.fc(inner(self, torch.cat(list(parts), 1))))


ODD: dict[str, Case] = {
    "in place": Case(in_place, image(), {"a": 16, "c": 24}),
    "own autograd function": Case(lambda: mlp(lambda self, x: self.fc(Steps.apply(inner(self, x)))), vector(), MLP),
    "branch on a shape": Case(branch_on_shape, vector(), MLP),
    "counts its calls": Case(counts_its_calls, vector(), MLP, note="trace.state-dropped"),
    "checkpointed": Case(checkpointed, vector(), MLP),
    "spectrum": Case(spectrum, lambda n: (torch.randn(n, 1, 32),), MLP),
    "many layers": Case(many_layers, vector(16), {str(i): 16 for i in range(0, 120, 2)} | {"120": OUTPUT}),
    "one layer": Case(
        lambda: nn.Sequential(nn.Linear(256, 64)), vector(256), {"0": OUTPUT}, budget="size<=60%"
    ),
    "gather": Case(
        gathers, lambda n: (torch.randn(n, 6, 8), torch.rand(n, 6).argsort(1)[:, :4]), {"a": "gather", "b": 24}
    ),
    "any length": Case(any_length, signal(), {"a": 16, "b": 24}),
    "weight norm": Case(
        reparametrized(parametrizations.weight_norm), vector(), {"a": "", "c": 32, "d": 24}, budget="macs<=80%"
    ),
    "spectral norm": Case(
        reparametrized(parametrizations.spectral_norm), vector(), {"a": "", "c": 32, "d": 24}, budget="macs<=80%"
    ),
    "standardised weights": Case(standardised, image(), {"b": 32, "c": 16}),
    "loose weights": Case(loose_weights, vector(), {"parts.a": 32, "weights.0": 16, "b": 24}),
    "layers called as functions": Case(functional_use, vector(), MLP),
    "einsum of weights": Case(einsum_weights, vector(), {"a": "", "b": 48}, budget="macs<=80%"),
    "half": Case(changed(lambda m: m.half()), lambda n: (torch.randn(n, 12).half(),), MLP, note="trace.dtype"),
    "bfloat16": Case(changed(lambda m: m.bfloat16()), lambda n: (torch.randn(n, 12).bfloat16(),), MLP,
                     note="trace.dtype"),
    "double": Case(changed(lambda m: m.double()), lambda n: (torch.randn(n, 12).double(),), MLP, note="trace.dtype"),
    "frozen": Case(changed(lambda m: m.requires_grad_(False)), vector(), MLP),
    "left in training": Case(changed(lambda m: m.train()), vector(), MLP),
    "data parallel": Case(changed(nn.DataParallel), vector(), MLP, note="trace.unwrapped"),
    "compiled": Case(changed(torch.compile), vector(), MLP, note="trace.unwrapped"),
    "lazy but called": Case(lazy_but_called, vector(), MLP),
    "hooks that look": Case(
        hooked(lambda *_: None), vector(), MLP, note="trace.hooks"
    ),
    "foreign names": Case(named("größe", "слой"), vector(), {"größe": 32, "слой": 24}),
    "odd names": Case(named("in-put 1", "2nd"), vector(), {"in-put 1": 32, "2nd": 24}),
    "names of other things": Case(named("self", "torch"), vector(), {"self": 32, "torch": 24}),
    "complex weights": Case(complex_weights, vector(), {"a": 32, "b": ""}),
    "dict output": Case(answers(lambda self, y, h: {"logits": y, "extra": {"norm": h.norm(dim=1), "no": None}}),
                        vector(), {"a": 32, "b": ""}),
    "tuple and None": Case(answers(lambda self, y, h: (y, None, [h])), vector(), {"a": 32, "b": OUTPUT}),
    "dataclass": Case(answers(lambda self, y, h: Answer(y, h)), vector(), {"a": 32, "b": OUTPUT},
                      note="trace.output-type"),
    "whole number output": Case(answers(lambda self, y, h: {"logits": y, "label": y.argmax(1)}), vector(), MLP),
    "two inputs": Case(two_inputs, lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 12)), {"a": 16, "b": 24, "c": 32}),
    "keywords only": Case(keywords_only, lambda n: {"x": torch.randn(n, 12), "weight": torch.rand(n)}, MLP),
    "optional inputs": Case(  # the mask has a number for every one of b's outputs
        optional_inputs, lambda n: {"x": torch.randn(n, 12), "mask": (torch.rand(n, 24) > 0.3).float()},
        {"a": 32, "b": "not known"},
    ),
    "bag of words": Case(bag_of_words, tokens(), MLP),
    "steps as a batch": Case(
        lambda: mlp(lambda self, x: self.fc(inner(self, x.reshape(-1, 12))).unflatten(0, (-1, 6)).mean(1)),
        sequence(6, 12), MLP,
    ),
}  # fmt: skip

REFUSED: dict[str, Case] = {
    "cond": Case(branches_in_the_graph, vector(), refused="`cond` (a branch or a loop"),
    "own operator": Case(
        lambda: mlp(lambda self, x: self.fc(twice(inner(self, x)))), vector(), refused="zoo.twice.default is not supported"
    ),
    "running mean of inputs": Case(running_mean, vector(), refused="two equal calls"),
    "named like a word of Python": Case(named("import", "class"), vector(), refused="a word of Python"),
    "old weight norm": Case(reparametrized(old_weight_norm), vector(), refused="cannot be copied"),
    "lazy": Case(lazy, vector(), refused="uninitialised parameters"),
    "quantized already": Case(quantized_already, vector(), refused="quantized already"),
    "hook that changes": Case(
        hooked(lambda part, args, y: y * 2), vector(), refused="a hook changes"
    ),
    "scripted": Case(
        scripted, vector(), refused="a TorchScript program"
    ),
    "statistics of the batch": Case(
        lambda: mlp(
            lambda self, x: self.fc(self.norm(inner(self, x))), norm=nn.BatchNorm1d(24, track_running_stats=False)
        ),
        vector(), refused="more than 1 value per channel",
    ),
    "random": Case(
        lambda: mlp(lambda self, x: self.fc(F.dropout(inner(self, x)))), vector(), refused="two equal calls"
    ),
    "loss": Case(lambda: mlp(lambda self, x: self.fc(inner(self, x)).square().mean()), vector(), refused="one number"),
    "a layer alone": Case(lambda: nn.Linear(12, 5), vector(), refused="Budget not met"),
    "empty": Case(nn.Identity, vector(), refused="Budget not met"),
    "no rows": Case(mlp, lambda n: (torch.randn(0, 12),), refused="is empty"),
}  # fmt: skip
