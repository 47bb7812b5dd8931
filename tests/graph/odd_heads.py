"""Attention in all its spellings, each net with the groups that a person finds in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import net
from .odd import HEAD, TOKENS, Case, Found, conv, image

THREE = torch.randn(2, 3, 8)  # batch token channel


def by_heads(x: Tensor, heads: int, width: int) -> Tensor:
    """(batch, token, channel) as (batch, head, token, channel of the head)."""
    return x.view(x.shape[0], x.shape[1], heads, width).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def projections(queries: int = 8, keys: int = 8) -> dict[str, nn.Module]:
    return {
        "q": nn.Linear(8, queries), "k": nn.Linear(8, keys), "v": nn.Linear(8, keys), "o": nn.Linear(queries, 8),
        "fc": nn.Linear(8, 5),
    }  # fmt: skip


def written_out() -> nn.Module:
    def forward(self, x):
        q, k, v = (by_heads(part(x), 2, 4) for part in (self.q, self.k, self.v))
        return self.fc(self.o(together(torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v)).mean(1))

    return net(forward, **projections())


def masked_scores() -> nn.Module:
    def forward(self, x):
        q, k, v = (by_heads(part(x), 2, 4) for part in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1)).masked_fill(self.mask, -1e9)
        return self.fc(self.o(together(torch.softmax(scores, -1) @ v)).mean(1))

    return net(forward, mask=torch.ones(3, 3).triu(1).bool(), **projections())


def biased_scores() -> nn.Module:
    """A learned bias for every head (as in Swin)."""

    def forward(self, x):
        q, k, v = (by_heads(part(x), 2, 4) for part in (self.q, self.k, self.v))
        return self.fc(self.o(together(torch.softmax(q @ k.transpose(-2, -1) + self.bias, -1) @ v)).mean(1))

    return net(forward, bias=nn.Parameter(torch.randn(1, 2, 3, 3)), **projections())


def fused_kernel() -> nn.Module:
    def forward(self, x):
        q, k, v = (by_heads(part(x), 2, 4) for part in (self.q, self.k, self.v))
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v, is_causal=True))).mean(1))

    return net(forward, **projections())


def cross() -> nn.Module:
    def forward(self, x, y):
        q, k, v = by_heads(self.q(x), 2, 4), by_heads(self.k(y), 2, 4), by_heads(self.v(y), 2, 4)
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v))).mean(1))

    return net(forward, **projections())


def shared_keys() -> nn.Module:
    """Grouped queries: two heads of keys for four of queries, repeated as Llama's code does."""

    def forward(self, x):
        q, k, v = by_heads(self.q(x), 4, 2), by_heads(self.k(x), 2, 2), by_heads(self.v(x), 2, 2)
        k, v = (p[:, :, None].expand(-1, -1, 2, -1, -1).reshape(p.shape[0], 4, -1, 2) for p in (k, v))
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v))).mean(1))

    return net(forward, **projections(8, 4))


def shared_keys_interleaved() -> nn.Module:
    def forward(self, x):
        q, k, v = by_heads(self.q(x), 4, 2), by_heads(self.k(x), 2, 2), by_heads(self.v(x), 2, 2)
        k, v = (p.repeat_interleave(2, 1) for p in (k, v))
        return self.fc(self.o(together(torch.softmax(q @ k.mT, -1) @ v)).mean(1))

    return net(forward, **projections(8, 4))


def one_key() -> nn.Module:
    """Multi-query attention: all heads read the same keys, which therefore stay."""

    def forward(self, x):
        q, k, v = by_heads(self.q(x), 4, 2), by_heads(self.k(x), 1, 2), by_heads(self.v(x), 1, 2)
        return self.fc(self.o(together(torch.softmax(q @ k.mT, -1) @ v)).mean(1))

    return net(forward, **projections(8, 2))


def one_head() -> nn.Module:
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.fc(self.o(torch.softmax(q @ k.mT, -1) @ v).mean(1))

    return net(forward, **projections())


def fused_qkv() -> nn.Module:
    def forward(self, x):
        q, k, v = (by_heads(p, 2, 4) for p in self.qkv(x).chunk(3, -1))
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v))).mean(1))

    return net(forward, qkv=nn.Linear(8, 24), o=nn.Linear(8, 8), fc=nn.Linear(8, 5))


def fused_qkv_unbound() -> nn.Module:
    def forward(self, x):
        y = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v))).mean(1))

    return net(forward, qkv=nn.Linear(8, 24), o=nn.Linear(8, 8), fc=nn.Linear(8, 5))


def einsums() -> nn.Module:
    def forward(self, x):
        q, k, v = (part(x).view(x.shape[0], 3, 2, 4) for part in (self.q, self.k, self.v))
        scores = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k), -1)
        y = torch.einsum("bhij,bjhd->bihd", scores, v)
        return self.fc(self.o(y.reshape(x.shape[0], 3, -1)).mean(1))

    return net(forward, **projections())


def rotary() -> nn.Module:
    def turned(self, x):
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, x):
        q, k, v = (by_heads(part(x), 2, 4) for part in (self.q, self.k, self.v))
        q, k = turned(self, q), turned(self, k)
        return self.fc(self.o(together(F.scaled_dot_product_attention(q, k, v))).mean(1))

    angles = torch.arange(3)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    return net(forward, cos=angles.cos(), sin=angles.sin(), **projections())


def patches() -> nn.Module:
    """A class token and positions before two linear layers: the stream of a vision transformer without its norms."""

    def forward(self, x):
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.positions
        y = y + self.b(F.gelu(self.a(y)))
        return self.fc(y[:, 0])

    return net(
        forward, patch=nn.Conv2d(3, 6, 4, 4), token=nn.Parameter(torch.randn(1, 1, 6)),
        positions=nn.Parameter(torch.randn(1, 5, 6)), a=nn.Linear(6, 12), b=nn.Linear(12, 6), fc=nn.Linear(6, 5),
    )  # fmt: skip


def words() -> nn.Module:
    def forward(self, ids):
        y = self.embed(ids) + self.positions
        return self.fc(F.gelu(self.a(y)).mean(1))

    return net(
        forward, embed=nn.Embedding(11, 6), positions=nn.Parameter(torch.randn(7, 6)), a=nn.Linear(6, 9),
        fc=nn.Linear(9, 5),
    )  # fmt: skip


def block() -> nn.Module:
    """A transformer block: the stream is normalised over its channels and stays; heads and neurons can go."""

    def forward(self, x):
        y = self.before(x)
        q, k, v = (by_heads(part(y), 2, 4) for part in (self.q, self.k, self.v))
        x = x + self.o(together(F.scaled_dot_product_attention(q, k, v)))
        x = x + self.down(F.gelu(self.up(self.behind(x))))
        return self.fc(x.mean(1))

    return net(
        forward, before=nn.LayerNorm(8), behind=nn.LayerNorm(8), up=nn.Linear(8, 16), down=nn.Linear(16, 8),
        **projections(),
    )  # fmt: skip


def multihead_module() -> nn.Module:
    """Torch's own module: its projection is a loose tensor, and its forward merges the batch with the heads."""

    def forward(self, x):
        y = self.a(x)
        return self.fc(self.attention(y, y, y, need_weights=False)[0].mean(1))

    return net(forward, a=nn.Linear(6, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 5))


def picture_attention() -> nn.Module:
    """Self-attention of a picture's positions by batched products, as in SAGAN: no heads, the inner size stays."""

    def forward(self, x):
        y = self.stem(x)
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        seen = torch.bmm(v, weights.transpose(1, 2)).view(y.shape)
        return self.fc((y + self.o(seen)).mean((2, 3)))

    return net(
        forward, stem=conv(3, 6), q=conv(6, 2, 1), k=conv(6, 2, 1), v=conv(6, 6, 1), o=conv(6, 6, 1),
        fc=nn.Linear(6, 5),
    )  # fmt: skip


QKV = [[*range(4 * h, 4 * h + 4), *range(8 + 4 * h, 12 + 4 * h), *range(16 + 4 * h, 20 + 4 * h)] for h in (0, 1)]
PRODUCT = "multiplies two values along them"
OUT = {"o": Found(8, "o", {"fc": 1}), "fc": HEAD}


def heads(literals: tuple[int, ...], **carries: int | list[list[int]]) -> Found:
    """Two heads of four."""
    return Found(2, {"q": 4, "k": 4, "v": 4}, {"o": 4}, carries, literals=literals, kind="heads")


SPLIT = (1, 1, 1, 4)  # a head is one of the written number of heads, and four of the channels joined again
HEADS: dict[str, Case] = {
    "attention written out": (written_out, (THREE,), {"q": heads(SPLIT), **OUT}),
    "attention with a mask": (masked_scores, (THREE,), {"q": heads(SPLIT), **OUT}),
    "attention with a bias a head": (biased_scores, (THREE,), {"q": heads(SPLIT, bias=1), **OUT}),
    "attention as one operator": (fused_kernel, (THREE,), {"q": heads(SPLIT), **OUT}),
    "cross attention": (cross, (THREE, torch.randn(2, 5, 8)), {"q": heads(SPLIT), **OUT}),
    "grouped queries": (shared_keys, (THREE,), {
        "q": Found(2, {"q": 4, "k": 2, "v": 2}, {"o": 4}, literals=(2, 1, 1, 1, 2, 1, 2, 4), kind="heads"), **OUT}),
    "grouped queries interleaved": (shared_keys_interleaved, (THREE,), {
        "q": Found(2, {"q": 4, "k": 2, "v": 2}, {"o": 4}, literals=(2, 1, 1, 4), kind="heads"), **OUT}),
    "multi-query": (one_key, (THREE,), {
        "q": Found(4, {"q": 2}, {"o": 2}, literals=(1, 2), kind="heads"), "k": Found(2, "k", frozen=PRODUCT),
        "v": Found(2, "v", frozen=PRODUCT), **OUT}),
    "one head": (one_head, (THREE,), {
        "q": Found(8, "q", frozen=PRODUCT), "k": Found(8, "k", frozen=PRODUCT), "v": Found(8, "v", {"o": 1}), **OUT}),
    "fused qkv": (fused_qkv, (THREE,), {
        "qkv": Found(2, {"qkv": QKV}, {"o": 4}, literals=SPLIT, kind="heads"), **OUT}),
    "fused qkv unbound": (fused_qkv_unbound, (THREE,), {
        "qkv": Found(2, {"qkv": QKV}, {"o": 4}, literals=(1, 4), kind="heads"), **OUT}),
    "attention by einsum": (einsums, (THREE,), {"q": heads(SPLIT), **OUT}),
    "rotary": (rotary, (THREE,), {"q": heads(SPLIT), **OUT}),
    "patches": (patches, (image(),), {
        "patch": Found(6, "patch b", {"a": 1, "fc": 1}, {"token": 1, "positions": 1}, literals=(1,)),
        "a": Found(12, "a", {"b": 1}), "fc": HEAD}),
    "words": (words, (torch.arange(14).view(2, 7) % 11,), {
        "embed": Found(6, "embed", {"a": 1}, {"positions": 1}), "a": Found(9, "a", {"fc": 1}), "fc": HEAD}),
    "transformer block": (block, (THREE,), {
        "q": heads(SPLIT), "o": Found(8, "o down", frozen="normalises over the channels"),
        "up": Found(16, "up", {"down": 1}), "fc": HEAD}),
    "nn.MultiheadAttention": (multihead_module, (TOKENS,), {
        "a": Found(8, "a", {"attention.in_proj": 1}),
        "attention.in_proj": Found(2, {"attention.in_proj": QKV}, {"attention.out_proj": 4}, literals=SPLIT[:3], kind="heads"),
        "attention.out_proj": Found(8, "attention.out_proj", {"fc": 1}), "fc": HEAD}),
    "attention of a picture": (picture_attention, (image(),), {
        "stem": Found(6, "stem o", {"q": 1, "k": 1, "v": 1, "fc": 1}), "q": Found(2, "q", frozen=PRODUCT),
        "k": Found(2, "k", frozen=PRODUCT), "v": Found(6, "v", {"o": 1}, literals=(1,)), "fc": HEAD}),
}  # fmt: skip
