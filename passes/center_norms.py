"""Turn layer norms into RMS norms: the mean is projected out where the residual stream is written.

Before:  linear(layer_norm(x; g, b), W),            x = Σ writers
After:   linear(rms_norm(x·M; g) + b, W),           x·M = Σ writers·M,   M = I - 11ᵀ/d

layer_norm(x; g, b) = rms_norm(x·M; g) + b, and M moves up through every sum into the embedding (E·M) and the writers
(MᵀW, b·M). A stream that is read by layer norms alone does not notice, because M·M = M. Rotations need this: a layer norm
keeps no length until the mean is gone (Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.2). Exact in real arithmetic.

Declines:
    - a stream that somebody else than layer norms reads (a post-norm model, in which linears read the norm's output and the sum
      of it): the mean would be missing there
    - a norm whose gain or bias is no constant
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.graph import LAYER_NORM, RMS_NORM, arg, args_of, aten, call_before, is_call, replace, tied, untie, width
from dlqc.motion import shape
from dlqc.regions import Refused, Region, fits, fold, grow
from dlqc.transform import Center


@dataclass(frozen=True)
class CenterNorms(Pass):
    """Layer norms become RMS norms, their writers centered.

    Options:
        untie: give a head that is tied to the embedding its own weight first, since only the embedding loses its mean.
    """

    name: ClassVar[str] = "center_norms"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    invalidates: ClassVar[frozenset[str]] = frozenset({"unit-gain"})
    preserves: ClassVar = "exact"

    untie: bool = False

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        heads = tied(graph, ctx.weights, graph.nodes)
        centered: set[fx.Node] = set()
        for node in list(graph.nodes):
            if not is_call(node, LAYER_NORM):
                continue
            stream = args_of(node)[0]
            if stream not in centered:
                region = match(node, graph, ctx)
                if isinstance(region, Refused) and self.untie and heads:
                    report.notes += [untie(graph, ctx.weights, site) for site in heads]
                    heads, region = [], match(node, graph, ctx)
                if isinstance(region, Refused):
                    hint = "; set untie=True" if any(region.node is site.node for site in heads) else ""
                    report.declined.append(Declined(f"%{node.name}", f"{region}{hint}"))
                    continue
                reason = fits(region, Center(region.width))
                if reason is not None:
                    report.declined.append(Declined(f"%{node.name}", f"its stream takes no mean away: {reason}"))
                    continue
                fold(ctx.weights, region, Center(region.width))
                # A value that was cut into heads has no mean in all of them together, not in each.
                centered |= {v for v, carry in region.carries.items() if carry.dims == (len(shape(v)) - 1,)}
            rewrite(node, graph)
            report.sites += 1
        return report


def match(node: fx.Node, graph: fx.Graph, ctx: Context) -> Region | Refused:
    """The stream that a layer norm reads, if the mean may be taken out of all of it."""
    if len(args_of(node)[1]) != 1:
        return Refused(node, "it normalizes several axes")
    return grow(graph, ctx.weights, args_of(node)[0], "center")


def rewrite(node: fx.Node, graph: fx.Graph) -> None:
    """layer_norm(x; g, b) → rms_norm(x; g) + b for a centered x."""
    x, gain, bias, eps = args_of(node)[0], arg(node, 2, "weight"), arg(node, 3, "bias"), arg(node, 4, "eps", 1e-5)
    new = call_before(graph, node, RMS_NORM, (x, [width(node)], gain, eps))
    if bias is not None:
        new = call_before(graph, node, aten.add.Tensor, (new, bias))
    replace(node, new)
