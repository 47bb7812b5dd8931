"""Networks of the zoo with attention, recurrence and shared weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_models import OUTPUT, Case, conv, image, net, pooled, sequence, tokens, vector

__all__ = ["ATTENTION", "SHARED"]

HEADS, SIZE = 4, 32


def heads(y: Tensor, count: int = HEADS) -> Tensor:
    """(batch, steps, width) to (batch, heads, steps, width of a head)."""
    rows, steps, width = y.shape
    return y.view(rows, steps, count, width // count).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    """The reverse of `heads`."""
    return y.transpose(1, 2).flatten(2)


def block(attend: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> Callable[[], nn.Module]:
    """A pre-norm transformer block around `attend`: the residual stream is fixed by its norms, the inside is free."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.inp(x)
        y = y + self.o(attend(self, self.norm1(y)))
        y = y + self.ff2(F.gelu(self.ff1(self.norm2(y))))
        return self.fc(y.mean(1))  # type: ignore[no-any-return]

    return lambda: net(
        forward, inp=nn.Linear(8, SIZE), norm1=nn.LayerNorm(SIZE), norm2=nn.LayerNorm(SIZE), o=nn.Linear(SIZE, SIZE),
        ff1=nn.Linear(SIZE, 64), ff2=nn.Linear(64, SIZE), fc=nn.Linear(SIZE, 5), **parts,
    )  # fmt: skip


def qkv(width: int = SIZE) -> dict[str, nn.Module]:
    """Three projections; keys and values of `width`."""
    return {"q": nn.Linear(SIZE, SIZE), "k": nn.Linear(SIZE, width), "v": nn.Linear(SIZE, width)}


def by_matmul(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
    return joined((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v)


def by_bmm(self: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(part(x)).flatten(0, 1) for part in (self.q, self.k, self.v))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(8**-0.5).softmax(-1), v)
    return joined(y.unflatten(0, (-1, HEADS)))


def by_sdpa(self: Any, x: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(x)), heads(self.v(x))))


def by_einsum(self: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (HEADS, -1)) for part in (self.q, self.k, self.v))
    share = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", share, v).flatten(2)


def fused_split(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.qkv(x).split(SIZE, -1)
    return joined(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def fused_chunk(self: Any, x: Tensor) -> Tensor:
    q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
    return joined((q @ k.mT * 8**-0.5).softmax(-1) @ v)


def fused_unbind(self: Any, x: Tensor) -> Tensor:
    rows, steps, width = x.shape
    q, k, v = self.qkv(x).reshape(rows, steps, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).reshape(rows, steps, width)


def grouped_repeat(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x)), heads(self.k(x), 2), heads(self.v(x), 2)
    return joined(F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


def grouped_expand(self: Any, x: Tensor) -> Tensor:
    def wide(y: Tensor) -> Tensor:
        rows, count, steps, size = y.shape
        return y[:, :, None].expand(rows, count, 2, steps, size).reshape(rows, count * 2, steps, size)

    q, k, v = heads(self.q(x)), wide(heads(self.k(x), 2)), wide(heads(self.v(x), 2))
    return joined((q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v)


def with_bias(self: Any, x: Tensor) -> Tensor:
    q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
    return joined((q @ k.transpose(-1, -2) * 8**-0.5 + self.table).softmax(-1) @ v)


def rotary(self: Any, x: Tensor) -> Tensor:
    def turned(y: Tensor) -> Tensor:
        left, right = y.chunk(2, -1)
        return y * self.cos + torch.cat([-right, left], -1) * self.sin

    q, k, v = turned(heads(self.q(x))), turned(heads(self.k(x))), heads(self.v(x))
    return joined(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def cross_attention() -> nn.Module:
    def forward(self: Any, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        y = x + self.o(joined(F.scaled_dot_product_attention(q, k, v)))
        return self.fc(y.mean(1))  # type: ignore[no-any-return]

    return net(
        forward, q=nn.Linear(8, SIZE), k=nn.Linear(12, SIZE), v=nn.Linear(12, SIZE), o=nn.Linear(SIZE, 8),
        fc=nn.Linear(8, 5),
    )  # fmt: skip


def masked_tokens() -> nn.Module:
    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        y = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device))
        y = self.norm(y)
        bias = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        share = (heads(self.q(y)) @ heads(self.k(y)).transpose(-1, -2) / 8**0.5 + bias).softmax(-1)
        y = y + self.o(joined(share @ heads(self.v(y))))
        y = y + self.ff2(F.gelu(self.ff1(y)))
        return {"logits": self.fc(y[:, 0]), "hidden": y}

    return net(
        forward, embed=nn.Embedding(50, SIZE), place=nn.Embedding(6, SIZE), norm=nn.LayerNorm(SIZE), **qkv(),
        o=nn.Linear(SIZE, SIZE), ff1=nn.Linear(SIZE, 64), ff2=nn.Linear(64, SIZE), fc=nn.Linear(SIZE, 5),
    )  # fmt: skip


def masked_inputs(rows: int) -> dict[str, Tensor]:
    """Word numbers and a mask that hides up to two of the last words."""
    lengths = torch.randint(4, 7, (rows, 1))
    return {"input_ids": torch.randint(0, 50, (rows, 6)), "attention_mask": (torch.arange(6) < lengths).long()}


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.1, batch_first=True, norm_first=True)
    return net(
        lambda self, x: self.fc(self.encoder(self.inp(x)).mean(1)), inp=nn.Linear(8, 16),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), fc=nn.Linear(16, 5),
    )  # fmt: skip


def torch_attention() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.mid(F.relu(self.inp(x))))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.fc(y.mean(1))  # type: ignore[no-any-return]

    return net(
        forward, inp=nn.Linear(8, 48), mid=nn.Linear(48, 16), attention=nn.MultiheadAttention(16, 4, batch_first=True),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def non_local() -> nn.Module:
    # theta and phi only meet each other: no layer reads them, so nothing says which of their channels matter
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        q, k, v = self.theta(y).flatten(2), self.phi(y).flatten(2), self.g(y).flatten(2)
        z = (v @ (k.transpose(1, 2) @ q).softmax(1)).view(y.shape[0], 24, *y.shape[2:])
        return pooled(self, y + self.out(z))

    return net(
        forward, stem=conv(3, 16), theta=conv(16, 8, 1), phi=conv(16, 8, 1), g=conv(16, 24, 1), out=conv(24, 16, 1),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def recurrent(make: Callable[[], nn.Module], width: int) -> Callable[[], nn.Module]:
    """Linear layers, a recurrent one, and the head on its last step."""
    return lambda: net(
        lambda self, x: self.fc(self.rnn(self.proj(F.relu(self.pre(x))))[0][:, -1]),
        pre=nn.Linear(8, 64), proj=nn.Linear(64, 16), rnn=make(), fc=nn.Linear(width, 5),
    )  # fmt: skip


# ---- weights with two roles ----


def tied_embedding() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        y = self.embed(ids)
        return self.head((y + self.b(F.gelu(self.a(y)))).mean(1))  # type: ignore[no-any-return]

    made = net(
        forward,
        embed=nn.Embedding(50, 16),
        a=nn.Linear(16, 64),
        b=nn.Linear(64, 16),
        head=nn.Linear(16, 50, bias=False),
    )
    made.head.weight = made.embed.weight  # type: ignore[union-attr]
    return made


def embedding() -> nn.Module:
    def forward(self: Any, ids: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(self.embed(ids).mean(1))))  # type: ignore[no-any-return]

    return net(forward, embed=nn.Embedding(50, 16, padding_idx=0), a=nn.Linear(16, 32), fc=nn.Linear(32, 5))


def called_twice() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.inp(x))
        for _ in range(3):
            y = y + self.b(F.relu(self.a(y)))
        return self.fc(y)  # type: ignore[no-any-return]

    return net(forward, inp=nn.Linear(12, 16), a=nn.Linear(16, 32), b=nn.Linear(32, 16), fc=nn.Linear(16, 5))


def siamese() -> nn.Module:
    def forward(self: Any, left: Tensor, right: Tensor) -> Tensor:
        y, z = (F.relu(self.b(F.relu(self.a(one)))) for one in (left, right))
        return self.fc((y - z).abs())  # type: ignore[no-any-return]

    return net(forward, a=nn.Linear(12, 32), b=nn.Linear(32, 24), fc=nn.Linear(24, 5))


def shared_kernel() -> nn.Module:
    # two convolutions of different dilation on one weight: both write `a`'s channels
    def forward(self: Any, x: Tensor) -> Tensor:
        return pooled(self, F.relu(self.d(F.relu(self.c(F.relu(self.a(x)) + F.relu(self.b(x)))))))

    made = net(
        forward, a=conv(3, 8), b=conv(3, 8, dilation=2, padding=2), c=conv(8, 32), d=conv(32, 16), fc=nn.Linear(16, 5)
    )
    made.b.weight = made.a.weight  # type: ignore[union-attr]
    return made


def weight_twice() -> nn.Module:
    # an autoencoder whose decoder is the encoder's transpose
    def forward(self: Any, x: Tensor) -> Tensor:
        code = torch.tanh(self.mid2(F.relu(self.mid(F.relu(self.enc(x))))))
        return F.linear(code, self.enc.weight.t(), self.back)  # type: ignore[no-any-return]

    return net(
        forward,
        enc=nn.Linear(12, 16),
        mid=nn.Linear(16, 32),
        mid2=nn.Linear(32, 16),
        back=nn.Parameter(torch.zeros(12)),
    )


BLOCK: dict[str, int | str] = {"inp": "norm", "ff1": 64}
THREE = BLOCK | {"q": "heads 4", "k": "heads 4", "v": "heads 4"}
FUSED = BLOCK | {"qkv": "heads 4"}
SHARING = BLOCK | {"q": "heads 2", "k": "heads 2", "v": "heads 2"}


def one_qkv(attend: Callable[[Any, Tensor], Tensor]) -> Case:
    """A block whose projections are one layer."""
    return Case(block(attend, qkv=nn.Linear(SIZE, 3 * SIZE)), sequence(), FUSED)


ATTENTION: dict[str, Case] = {
    "attention matmul": Case(block(by_matmul, **qkv()), sequence(), THREE),
    "attention bmm": Case(block(by_bmm, **qkv()), sequence(), THREE),
    "attention sdpa": Case(block(by_sdpa, **qkv()), sequence(), THREE),
    "attention einsum": Case(block(by_einsum, **qkv()), sequence(), THREE),
    "qkv split": one_qkv(fused_split),
    "qkv chunk": one_qkv(fused_chunk),
    "qkv unbind": one_qkv(fused_unbind),
    "grouped queries repeat": Case(block(grouped_repeat, **qkv(16)), sequence(), SHARING),
    "grouped queries expand": Case(block(grouped_expand, **qkv(16)), sequence(), SHARING),
    "attention bias": Case(
        block(with_bias, **qkv(), table=nn.Parameter(torch.randn(HEADS, 6, 6))),  # type: ignore[arg-type]
        sequence(), THREE,
    ),
    "rotary causal": Case(
        block(rotary, **qkv(), cos=torch.rand(6, 8), sin=torch.rand(6, 8)),  # type: ignore[arg-type]
        sequence(), THREE,
    ),
    "cross attention": Case(
        cross_attention, lambda n: (torch.randn(n, 6, 8), torch.randn(n, 5, 12)),
        {"q": "heads 4", "k": "heads 4", "v": "heads 4", "o": ""},
    ),
    "masked tokens": Case(
        masked_tokens, masked_inputs, {"q": "heads 4", "embed": "norm", "ff1": 64},
    ),
    "torch encoder": Case(
        torch_encoder, sequence(),
        {"inp": "norm"} | {f"encoder.layers.{i}.{name}": found for i in (0, 1)
                           for name, found in (("self_attn.in_proj", "heads 4"), ("linear1", 48))},
    ),
    "torch attention": Case(torch_attention, sequence(), {"inp": 48, "mid": 16, "attention.in_proj": "heads 4"}),
    "non local": Case(non_local, image(), {"stem": 16, "theta": "multiplies", "g": 24}),
    "lstm": Case(recurrent(lambda: nn.LSTM(16, 24, batch_first=True), 24), sequence(), {"pre": 64, "proj": "lstm"}),
    "gru": Case(
        recurrent(lambda: nn.GRU(16, 12, 2, batch_first=True, bidirectional=True), 24), sequence(),
        {"pre": 64, "proj": "gru"},
    ),
}  # fmt: skip

SHARED: dict[str, Case] = {
    "tied embedding": Case(tied_embedding, tokens(), {"a": 64, "b": "", "head": OUTPUT}),
    "embedding": Case(embedding, tokens(), {"embed": 16, "a": 32}),
    "called three times": Case(called_twice, vector(), {"inp": 16, "a": 32}),
    "siamese": Case(siamese, lambda n: (torch.randn(n, 12), torch.randn(n, 12)), {"a": 32, "b": 24}),
    "shared kernel": Case(shared_kernel, image(), {"a": "shared", "c": 32, "d": 16}),
    "weight used twice": Case(weight_twice, vector(), {"enc": "shared", "mid": 32, "mid2": ""}),
}
