"""Gate subspaces by whether the token is masked (SGAT of STaR-Quant 2026, arXiv 2606.04945).

Before:  linear(x, W)
After:   linear(x·P ∘ g, W·P),   g = where(ids == [MASK], g_m, g_u)

P = [U_sh, U_m, U_u] is orthogonal, g_m = (1, 1, 0), g_u = (1, 0, 1).

Masked tokens lose what they have in U_u, visible ones what they have in U_m; one static weight serves both. The gated
coordinates are exact zeros, which no quantizer adds noise to: that is the gain, worth its loss at most while a direction carries
less energy in a class than the quantizer's noise. Without quantization it is a pure loss, so the pass preserves nothing, and
reports what each class loses at each site. With `tolerance=0` all of P is U_sh, no gate is made, and the
function stays.

Choice: with the classes' second moments A (masked) and B (visible), of trace one, on half of the sample, the generalized
eigenvectors of (A - B, A + B) are orthonormalized from either end. U_m takes as many from the masked end as cost visible tokens
energy worth `tolerance` of their variance on the *other* half, then U_u from the other end likewise. (Variance is the measure,
since masked tokens are so alike that nearly all of their energy is their mean, and what tells them apart is little.) Each
subspace is turned by a random rotation, since eigenvectors would gather the energy in few coordinates. A token is masked by its
input id, also where logits are shifted. P is dense: d² multiplications a token at run time and d² numbers for each site.

In trials on the bundled model with 4-bit weights and activations the gate lost more than it saved: tolerance 0, P alone,
was closer to the original.

What cannot be done: scales of its own for each class (x·diag(1/s_m) or x·diag(1/s_u)) would need a weight of its own for each,
W·diag(s_m) and W·diag(s_u); only what is the same for both folds. Scales per token, as `quantize_activations` takes them,
follow the class by themselves. What could differ by class at no cost is the quantizer's clipping or width.

Differences from the paper, whose code is not public: the paper's choice of the subspaces is not known to us, so the choice is
ours; P is orthogonal throughout; its closed-form correction of values before the output projection (TAC) is not built.

Declines a value whose readers cannot undo P, whose rows are not the tokens [B, L], that is transformed at run time already, or
for which the sample holds fewer than 4 tokens of a class. The loss is measured where states were drawn; elsewhere it may be more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport, matches
from dlqc.errors import RecipeError
from dlqc.execute import placeholder
from dlqc.graph import args_of, aten, call_before, is_call, linears, read, width
from dlqc.ops import TRANSFORM
from dlqc.regions import Refused, edges, keep_online, readers
from dlqc.transform import blocks

_FEWEST = 4  # tokens of a class
_RIDGE = 1e-2  # on the mean eigenvalue: a direction that neither class uses belongs to neither


@dataclass(frozen=True)
class MaskGate(Pass):
    """Zero, for masked and for visible tokens, the directions that only the other class uses.

    Options:
        tolerance: energy that each class may lose at a site, as a share of its variance there.
        sites: glob patterns of module names; a value is gated if one of its readers fits.
    """

    name: ClassVar[str] = "mask_gate"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights", "states"})
    scope: ClassVar = "block"

    tolerance: float = 0.001
    sites: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if not 0.0 <= self.tolerance < 1.0:
            remedy = "0.001 is the usual value, 0 loses nothing"
            raise RecipeError(f"{self.tolerance} is outside [0, 1)", where="mask_gate.tolerance", remedy=remedy)
        if not self.sites:
            raise RecipeError("no pattern", where="mask_gate.sites", remedy="Use ('*',) for all inputs of linears")

    def statistics(self) -> frozenset[str]:
        return frozenset({"sample", "masked"})

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for value in edges(ctx.nodes(graph), ctx.weights):
            sites = list(linears(value.users, ctx.weights))
            if not any(matches(site.name, self.sites) for site in sites):
                continue
            x, masked = (ctx.stats[sites[0].weight][name] for name in ("sample", "masked"))
            found = readers(graph, ctx.weights, value, "orthogonal")
            reason = unfit(value, masked, graph) or (str(found) if isinstance(found, Refused) else None)
            if reason is not None or isinstance(found, Refused):
                report.declined.append(Declined(f"input of {sites[0].name}", str(reason)))
                continue
            parts = Subspaces.choose(x[masked].double(), x[~masked].double(), self.tolerance, ctx.seed)
            node = keep_online(graph, ctx.weights, found, blocks(parts.basis))
            if parts.masked or parts.visible:
                gate(graph, ctx, node, parts)
            report.sites += 1
            report.details[sites[0].name] = {
                "shared": width(value) - parts.masked - parts.visible,
                "masked only": parts.masked,
                "visible only": parts.visible,
                "masked lose": parts.masked_lose,
                "visible lose": parts.visible_lose,
            }
        return report


def unfit(value: fx.Node, masked: torch.Tensor, graph: fx.Graph) -> str | None:
    """Why a value cannot be gated, if so."""
    if is_call(value, TRANSFORM):
        return "it is transformed at run time already"
    if [str(n) for n in value.meta["val"].shape[:-1]] != [str(n) for n in placeholder(graph).meta["val"].shape]:
        return "its rows are not the tokens"
    of_masks, of_text = int(masked.sum()), int((~masked).sum())
    if min(of_masks, of_text) < _FEWEST:
        return f"the sample holds {of_masks} masked and {of_text} visible tokens, {_FEWEST} of each are needed"
    return None


@dataclass(frozen=True)
class Subspaces:
    """P = [U_sh, U_m, U_u], float64 [d, d], the widths of U_m and U_u, and what each class loses."""

    basis: torch.Tensor
    masked: int
    visible: int
    masked_lose: float
    visible_lose: float

    @classmethod
    def choose(cls, masked: torch.Tensor, visible: torch.Tensor, tolerance: float, seed: int) -> Subspaces:
        """From the rows of either class, float64 [n, d]; every second row measures what the others chose."""
        d = masked.shape[1]
        a, b = (moment(rows[::2]) for rows in (masked, visible))
        towards_masked, towards_visible = ends(a, b)
        none = torch.zeros(d, 0, dtype=torch.float64)
        u_m, visible_lose = affordable(towards_masked, none, visible[1::2], tolerance)
        u_u, masked_lose = affordable(towards_visible, u_m, masked[1::2], tolerance)
        both = torch.cat((u_m, u_u), dim=1)
        whole, _ = torch.linalg.qr(torch.cat((both, torch.eye(d, dtype=torch.float64)), dim=1))
        u_sh = whole[:, both.shape[1] :]
        generator = torch.Generator().manual_seed(seed)
        basis = torch.cat([u @ rotation(u.shape[1], generator) for u in (u_sh, u_m, u_u)], dim=1)
        return cls(basis, u_m.shape[1], u_u.shape[1], masked_lose, visible_lose)


def moment(rows: torch.Tensor) -> torch.Tensor:
    """Σ xᵀx of rows [n, d], of trace one."""
    m = rows.T @ rows
    return m / m.trace().clamp_min(1e-300)


def ends(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions [d, k] with more of A's energy than of B's, the most one-sided first; and the other way round."""
    d = a.shape[0]
    both = a + b + _RIDGE / d * torch.eye(d, dtype=a.dtype)
    lower = torch.linalg.cholesky(both)
    half = torch.linalg.solve_triangular(lower, a - b, upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T, upper=False)
    contrast, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    directions = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return directions[:, contrast > 0].flip(1), directions[:, contrast < 0]


def affordable(
    directions: torch.Tensor, taken: torch.Tensor, rows: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, float]:
    """The first directions, orthonormalized outside of `taken`, that cost the rows at most `tolerance`; and what they cost."""
    room = directions.shape[0] - taken.shape[1]
    q, _ = torch.linalg.qr(torch.cat((taken, directions[:, :room]), dim=1))
    q = q[:, taken.shape[1] :]
    total = (rows - rows.mean(dim=0)).square().sum()
    lost = ((rows @ q).square().sum(0) / total).cumsum(0)
    count = int((lost <= tolerance).sum()) if tolerance > 0 and bool(total > 0) else 0
    return q[:, :count], float(lost[count - 1]) if count else 0.0


def rotation(n: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix, float64 [n, n]."""
    q: torch.Tensor
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q


def gate(graph: fx.Graph, ctx: Context, node: fx.Node, parts: Subspaces) -> None:
    """Let the readers of x·P read its gated form."""
    users, first = list(node.users), node.next
    flags = masked_flags(graph, ctx.spec.mask_id)
    d, m, v = width(node), parts.masked, parts.visible
    g_m, g_u = (torch.ones(d, dtype=node.meta["val"].dtype) for _ in range(2))
    g_m[d - v :] = 0
    g_u[d - v - m : d - v] = 0
    pair = []
    for g in (g_m, g_u):
        name = next(n for i in itertools.count() if (n := f"gate.{node.name}.{i}") not in ctx.weights)
        ctx.weights.put(name, g)
        pair.append(read(graph, ctx.weights, name, first))
    chosen = call_before(graph, first, aten.where.self, (flags, *pair))
    gated = call_before(graph, first, aten.mul.Tensor, (node, chosen))
    for user in users:
        user.replace_input_with(node, gated)


def masked_flags(graph: fx.Graph, mask_id: int) -> fx.Node:
    """ids == [MASK], bool [B, L, 1]: one pair of nodes for all sites."""
    ids = placeholder(graph)
    for equal in ids.users:
        if is_call(equal, aten.eq.Scalar) and args_of(equal) == (ids, mask_id):
            for flags in equal.users:
                if is_call(flags, aten.unsqueeze.default) and args_of(flags) == (equal, -1):
                    return flags
    after = ids.next
    return call_before(
        graph, after, aten.unsqueeze.default, (call_before(graph, after, aten.eq.Scalar, (ids, mask_id)), -1)
    )
