"""A small denoiser twice: as a module that can be captured, and position by position in plain loops.

Both compute in float64, from the same parameters. The second knows nothing of graphs and caches: it is told, for every position,
whether keys and values are to be computed now or taken from an earlier time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, MASK, WIDTH, HEADS, LAYERS = 11, 10, 16, 2, 2
Pair = tuple[Tensor, Tensor]


class ToyDenoiser(nn.Module):
    """`forward(ids [B, L])` gives logits [B, L, V]; full attention, or block-causal with blocks of `block` positions."""

    def __init__(self, seed: int, block: int | None = None) -> None:
        super().__init__()
        self.block = block
        rng = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64) / shape[-1] ** 0.5)

        self.embed = weight(VOCAB, WIDTH)
        self.qkv = nn.ParameterList([weight(3 * WIDTH, WIDTH) for _ in range(LAYERS)])
        self.out = nn.ParameterList([weight(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.up = nn.ParameterList([weight(2 * WIDTH, WIDTH) for _ in range(LAYERS)])
        self.down = nn.ParameterList([weight(WIDTH, 2 * WIDTH) for _ in range(LAYERS)])
        self.head = weight(VOCAB, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = 3.0 * F.embedding(ids, self.embed)
        size = WIDTH // HEADS
        position = torch.arange(length)
        angles = position.double()[:, None] / 100.0 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.cat((angles, angles), dim=-1)
        mask = None if self.block is None else position[:, None] // self.block >= position // self.block
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down, strict=True):
            q, k, v = (
                t.view(batch, length, HEADS, size).transpose(1, 2) for t in F.linear(x, qkv).split(WIDTH, dim=-1)
            )
            q, k = _turn(q, angles), _turn(k, angles)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, length, WIDTH), out)
            x = x + F.linear(torch.tanh(F.linear(x, up)), down)
        return 4.0 * F.linear(x, self.head)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * angles.sin()


def naive_forward(
    model: ToyDenoiser, ids: list[int], fresh: range, store: dict[tuple[int, int], list[Pair]], visible: int
) -> dict[int, Tensor]:
    """Logits [V] of the positions `fresh` of one row; their keys and values go to `store`, those of all others come from there.

    Args:
        store: (layer, position) -> key and value of each head.
        visible: positions below it are seen (as far as the model's blocks allow).
    """
    size = WIDTH // HEADS
    with torch.no_grad():
        hidden = {i: 3.0 * model.embed[ids[i]] for i in fresh}
        for layer in range(LAYERS):
            queries = {}
            for i in fresh:
                q, k, v = (model.qkv[layer] @ hidden[i]).split(WIDTH)
                angle = torch.tensor(
                    [i / 100.0 ** (2 * (j % (size // 2)) / size) for j in range(size)], dtype=torch.float64
                )
                cut = [slice(h * size, (h + 1) * size) for h in range(HEADS)]
                queries[i] = [_turn(q[c], angle) for c in cut]
                store[layer, i] = [(_turn(k[c], angle), v[c]) for c in cut]
            for i in fresh:
                seen = [j for j in range(visible) if model.block is None or j // model.block <= i // model.block]
                mixed = []
                for h in range(HEADS):
                    scores = torch.stack([queries[i][h] @ store[layer, j][h][0] / math.sqrt(size) for j in seen])
                    shares = scores.softmax(0)
                    mixed.append(sum(p * store[layer, j][h][1] for p, j in zip(shares, seen, strict=True)))
                x = hidden[i] + model.out[layer] @ torch.cat(mixed)
                hidden[i] = x + model.down[layer] @ torch.tanh(model.up[layer] @ x)
        return {i: 4.0 * (model.head @ hidden[i]) for i in fresh}
