"""The contract of a pass: what it is, what it may assume, what it owes, what it reports.

A pass may assume a legal graph (`dlqc.check`) and must leave one; in between it owes nothing. It edits the graph and the
constants in place, through `dlqc.graph` and `dlqc.weights`, and returns a `PassReport`. The user's model is out of reach.

Facts are names of things that hold for the graph. A pass `needs` some, `gives` some and `invalidates` some; the manager
checks the whole order before any work and never sorts it.

    normal-form            canonical spelling (holds after capture)
    float-weights          no linear is quantized yet (holds after capture)
    float-activations      no input of a linear is quantized yet (holds after capture)
    float-attention        no query, key, value or attention probability is quantized yet, nor a cache (holds after capture)
    states                 denoising states for calibration exist
    assignment             each linear to quantize has a scheme of its own, in `Context.assignment`
    unit-gain              every norm that feeds only linears has gain one
    original               the block as it was before its weights were rounded is at hand; a graph-scoped pass ends this
    quantized-weights      the linears that were asked for are linear_q
    quantized-embeddings   the tables of embeddings are stored in few bits
    quantized-activations  their inputs are quantized
    quantized-attention    what attentions read is quantized as asked for
    quantized-cache        caches store keys and values in few bits
    adapted-precision      nested weights are read, and activations rounded, in the widths that a schedule says
    packed                 no linear_q is left: codes are stored as bit streams
    lowered                every quantized linear is a kernel of the backend
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import fx

from dlqc.diffusion.spec import DiffusionSpec
from dlqc.weights import Weights

if TYPE_CHECKING:
    from dlqc.backend import Backend, LinearSpec
    from dlqc.blocks import Block
    from dlqc.calibration import States, TokenRows
    from dlqc.formats.integer import IntFormat
    from dlqc.observers import Observer
    from dlqc.schemes import Scheme

#: Facts that are about the context: giving one changes no graph.
FACTS_OF_CONTEXT = frozenset({"states", "assignment"})
#: Statistics of the inputs of linears: weight name → statistic → tensor.
Statistics = Mapping[str, Mapping[str, torch.Tensor]]

#: Which activations statistics are taken of, see `Pass.sequence`.
Sequential = Literal["none", "block", "layer"]

#: What of the calibration states and of the block before rounding a pass reads itself, see `Pass.reads`.
Reads = Literal["nothing", "current", "original", "paired"]

FACTS_OF_CAPTURE = frozenset({"normal-form", "float-weights", "float-activations", "float-attention"})


@dataclass(frozen=True)
class Declined:
    """A site that looked right and was left alone."""

    site: str
    reason: str


@dataclass
class PassReport:
    """What a pass did.

    Attributes:
        sites: number of sites rewritten.
        declined: sites that looked right and were left alone, with reasons.
        metrics: numbers of the pass as a whole.
        details: numbers per site, by site name.
        choices: what was chosen per site, in words (the kernel, for lowering).
        certificate: for passes that preserve the function, the worst relative deviation seen in float64.
        notes: sentences for the reader.
    """

    sites: int = 0
    declined: list[Declined] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    certificate: float | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, *sentences: str) -> None:
        """Add what is not said yet."""
        self.notes += [sentence for sentence in sentences if sentence not in self.notes]

    def merge(self, other: PassReport) -> None:
        """Add the report of another block of the same pass."""
        self.sites += other.sites
        self.declined += other.declined
        self.details |= other.details
        self.choices |= other.choices
        if other.certificate is not None:
            self.certificate = max(self.certificate or 0.0, other.certificate)
        self.note(*other.notes)
        for key, value in other.metrics.items():
            self.metrics[key] = self.metrics.get(key, 0.0) + value


@dataclass
class Plan:
    """What the pipeline will make of each linear, found without touching a weight.

    `sites` maps the module name to its planned spec; passes fill it in order. `beside` has bits that are stored beside the
    weight of a site; `tables` are embeddings that are stored in few bits and are no head, with rows and width; `pruned` are
    linears with zeros, and the share of weights that is kept. `problems` lists everything that would fail, so that all
    offenders are named at once. `kept` are linears that stay, with the reason. `assigned` are the sites whose scheme is found
    while compiling, with the candidates; of these `sites` has the last, and together they are stored in no more than
    `limit_bits`, where what comes behind the blocks has `assigned_head` bits. `notes` are sentences for the reader.
    """

    sites: dict[str, LinearSpec] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[IntFormat, int, int]] = field(default_factory=dict)
    pruned: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    assigned: dict[str, tuple[Scheme, ...]] = field(default_factory=dict)
    limit_bits: int = 0
    assigned_head: int | None = None
    notes: list[str] = field(default_factory=list)

    def specs(self) -> Iterator[tuple[str, LinearSpec]]:
        """Every spec that a site may come to have: one, or one for each candidate format."""
        for name, spec in self.sites.items():
            formats = dict.fromkeys(scheme.format for scheme in self.assigned.get(name, ()))
            for weight in formats or (spec.weight,):
                yield name, dataclasses.replace(spec, weight=weight)


@dataclass(frozen=True)
class BlockInput:
    """A part of the calibration states at the input of a block.

    Attributes:
        ids: int64 [B, L]. weights: float32 [B, L], token weights.
        hidden: behind the blocks as they are now, as the graph has it ([B, L, d], as a rule).
        exact: behind the blocks as they were before their weights were rounded; `hidden` itself where that was not asked for.
        mask_ratio: float64 [B], see `dlqc.precision`; None: that of the ids.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    hidden: torch.Tensor
    exact: torch.Tensor
    mask_ratio: torch.Tensor | None = None


@dataclass
class Context:
    """What a pass can see besides the graph.

    Attributes:
        weights: the constants of the graph.
        spec: facts of the diffusion model.
        seed: seed of everything random in the compilation.
        backend: where the module will run.
        rows: token rows to calibrate on, or None (the `calibrate` pass then draws the model's own rollouts).
        states: denoising states, once `calibrate` has made them.
        block: the block at hand while a block-scoped pass runs, else None.
        stats: statistics of the inputs of the block's linears.
        collect: statistics of the inputs of the linears with the given weights, on the block as it is now; there for a
            pass whose `sequence` is "layer", which has no `stats`.
        inputs: the calibration states at the input of the block, in parts, for a pass that `reads` them.
        original: graph and weights with the block as it was before its weights were rounded, for a pass that `reads` it and
            comes after rounding.
        observed: the observers that the pass at hand asked for, by its names for them, after they saw the states.
        facts: what holds now.
        blocks: the stack of blocks, in order.
        reference: graph and weights as captured, for a pass that measures against them.
        assignment: by module name, the scheme that a pass chose for a linear; `quantize_weights` follows it.
    """

    weights: Weights
    spec: DiffusionSpec
    backend: Backend
    seed: int = 0
    rows: TokenRows | None = None
    states: States | None = None
    block: Block | None = None
    stats: Statistics = field(default_factory=dict)
    collect: Callable[[Sequence[str]], Statistics] | None = None
    inputs: Sequence[BlockInput] = ()
    original: tuple[fx.Graph, Weights] | None = None
    observed: Mapping[str, Observer] = field(default_factory=dict)
    facts: set[str] = field(default_factory=lambda: set(FACTS_OF_CAPTURE))
    blocks: Sequence[Block] = ()
    assignment: Mapping[str, Scheme] = field(default_factory=dict)
    reference: tuple[fx.Graph, Weights] | None = None

    def nodes(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes a pass may rewrite: the block's in block scope, else all."""
        return list(graph.nodes) if self.block is None else self.block.nodes(graph)


Preserves = Literal["exact", "no"]
Scope = Literal["graph", "block"]


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are the options.

    Class attributes:
        name: the spelling in recipes; equal to the file name for passes of dlqc.
        needs, gives, invalidates: facts, see the module docstring.
        scope: "graph" runs once on the whole graph, "block" once per block with the block's statistics.
        preserves: "exact" if the function of the graph stays the same in exact arithmetic (then a certificate is made).

    Options:
        required: a pass that finds nothing to rewrite is an error; set False where that is expected.
        strict: a site that looks right and has to be left alone is an error, too.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Scope] = "graph"
    preserves: ClassVar[Preserves] = "no"

    required: bool = field(default=True, kw_only=True)
    strict: bool = field(default=False, kw_only=True)

    def needed_facts(self) -> frozenset[str]:
        """Facts needed with these options; the class's `needs` unless options add to it."""
        return self.needs

    def given_facts(self) -> frozenset[str]:
        """Facts given with these options; the class's `gives` unless options add to it."""
        return self.gives

    def statistics(self) -> frozenset[str]:
        """Statistics of linear inputs that `apply` reads from `ctx.stats` (names of `dlqc.stats`)."""
        return frozenset()

    def reaches_tail(self) -> bool:
        """Whether a block-scoped pass also runs on what lies between the last block and the logits."""
        return False

    def sequence(self) -> Sequential:
        """Which activations the statistics are of.

        "block": those of the block as the pass finds it, behind the blocks that are rewritten already.
        "layer": likewise, and `apply` asks for them by `ctx.collect`, anew after each part that it rewrites.
        "none": those of the model before any weight was rounded.
        """
        return "block"

    def reads(self) -> Reads:
        """What `apply` needs to run the block itself.

        "current": the states at its input, `ctx.inputs`.
        "original": likewise, and the block as it was before its weights were rounded, `ctx.original`.
        "paired": likewise, and the states behind the blocks as they were, `BlockInput.exact`.
        """
        return "nothing"

    def observers(self, graph: fx.Graph, ctx: Context) -> Mapping[str, Observer]:
        """What a block-scoped pass that needs "states" wants to see of the block at hand; it finds them in `ctx.observed`."""
        return {}

    def plan(self, graph: fx.Graph, ctx: Context, plan: Plan) -> None:
        """Say what `apply` will do and what would fail, reading no weight."""

    def apply(self, graph: fx.Graph, ctx: Context) -> PassReport:
        """Rewrite the graph in place."""
        raise TypeError(f"{type(self).__name__} does not define apply()")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name fits one of the glob patterns.

    >>> matches("model.blocks.3.q_proj", ["*.q_proj"])
    True
    """
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def plain_options(options: Any) -> dict[str, Any]:
    """The options of a frozen dataclass by name."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
