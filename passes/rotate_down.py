"""R4: rotate the input of the linears that follow a nonlinear function (QuaRot, arXiv 2404.00456, section 4, stage 1b).

Before:  linear(silu(gate) * up, W)
After:   linear((silu(gate) * up)·R, W·R),            R a (block) Hadamard matrix

R cannot move through the product into what makes it, so x·R happens at run time: one op, O(d log d) a row, that a backend
may fuse with the quantization of the activations. The inverse folds into W. d = k·2^p with a Hadamard matrix of order k
built by Paley's construction where there is one (12288 = 12·1024, 18944 = 148·128), block Hadamard otherwise.

Declines a value whose readers cannot undo the rotation: a weight that somebody else reads or that is no constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from dlqc import hadamard
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.errors import RecipeError
from dlqc.graph import NORMS, aten, is_call, linears, width
from dlqc.motion import ACTIVATIONS
from dlqc.ops import TRANSFORM
from dlqc.regions import Refused, edges, keep_online, readers
from dlqc.transform import Hadamard


@dataclass(frozen=True)
class RotateDown(Pass):
    """Rotate inputs of linears at run time.

    Options:
        sites: "nonlinear" takes values made by a product or an activation function; "norm" takes the outputs of norms (for
            models whose stream cannot be rotated); "all" takes every input of a linear that has no transform yet.
        block: order of the Hadamard blocks; None takes the largest that divides the width.
    """

    name: ClassVar[str] = "rotate_down"
    needs: ClassVar[frozenset[str]] = frozenset({"normal-form", "float-weights"})
    scope: ClassVar = "block"
    preserves: ClassVar = "exact"

    sites: Literal["nonlinear", "norm", "all"] = "nonlinear"
    block: int | None = None

    def __post_init__(self) -> None:
        if self.sites not in ("nonlinear", "norm", "all"):
            raise RecipeError(
                f"unknown sites {self.sites!r}", where="rotate_down.sites", remedy="Use nonlinear, norm or all"
            )
        if self.block is not None and (self.block < 1 or hadamard.order(self.block) is None):
            raise RecipeError(
                f"no Hadamard matrix of order {self.block} can be built",
                where="rotate_down.block",
                remedy="Use a power of two, or None",
            )

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        report = PassReport()
        for value in edges(ctx.nodes(graph), ctx.weights):
            if not self.wants(value):
                continue
            reader = next(linears(value.users, ctx.weights))
            block = self.block or hadamard.largest_block(width(value))
            found = readers(graph, ctx.weights, value, "orthogonal")
            reason = str(found) if isinstance(found, Refused) else None
            if reason is None and (width(value) % block or block == 1):
                reason = f"{width(value)} features do not divide into Hadamard blocks of {block}"
            if reason is not None or isinstance(found, Refused):
                report.declined.append(Declined(f"input of {reader.name}", str(reason)))
                continue
            keep_online(graph, ctx.weights, found, Hadamard(width(value), block))
            report.sites += 1
            report.details[reader.name] = {"width": width(value), "block": block}
        if report.sites:
            report.metrics["online"] = report.sites
        return report

    def wants(self, value: fx.Node) -> bool:
        if self.sites == "all":
            return not is_call(value, TRANSFORM)
        return is_call(value, *(NORMS if self.sites == "norm" else (aten.mul.Tensor, *ACTIVATIONS)))
