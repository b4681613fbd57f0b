"""`dlqc recommend`: which recipe for which purpose, as published, checked against the model at hand.

Each scenario is a ladder of presets. On its first rung is what the literature advises; the next ones keep more. A rung is
tried quickly on the model (a short calibration, a few rows), and the first one whose divergence from the original stays
within the scenario's tolerance is recommended, with what was measured of it and of those before it.

    general     GPTQ at 4 bits (QDLM, arXiv 2508.14896)
    quality     DLLMQuant at W8A8 (arXiv 2508.14090)
    math-code   GPTQ at 8 bits: reasoning and code lose first (QDLM)
    extreme     Quant-dLLM, 2 to 3 bits (arXiv 2510.03274)
    edge        mixed precision at 3.2 bits on average

Tolerances are ours: KL(original || quantized) in nats per masked token, the mean over mask ratios, and it is the upper end of
its 95 % interval that must stay below. By Pinsker's inequality no event's probability then changes by more than √(KL/2), on
average over tokens: 0.07 at 0.01, 0.16 at 0.05, 0.22 at 0.1, 0.5 at 0.5.

A model of more than `MEASURED_BELOW` parameters is not quantized whole to find out: the Fisher estimate of `dlqc.sensitivity` is
summed over the linears of a few blocks and scaled up to all. It is about weights alone, and says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from dlqc.assignment import Choices, choices
from dlqc.backend import load_backend
from dlqc.budget import Budget
from dlqc.calibration import TokenRows, rollout_rows
from dlqc.compile import Text, prepare
from dlqc.contract import Context, Pass
from dlqc.diffusion.fidelity import fidelity
from dlqc.errors import CalibrationError, DlqcError, FeasibilityError, nearest
from dlqc.execute import forward
from dlqc.knapsack import frontier
from dlqc.manager import PassManager
from dlqc.recipe import Recipe, as_recipe
from dlqc.report import measure_storage
from dlqc.sensitivity import sensitivities
from dlqc.trial import tried

Probe = Literal["auto", "compile", "sites"]

MEASURED_BELOW = 1 << 28
RATIOS = (0.25, 0.5, 0.75)

#: Rows that are measured, and that calibrate a trial.
_ROWS, _SEQUENCES = 12, 32
#: Tokens a row, where the model makes its own.
_LENGTH = 64
#: Blocks, rows and mask ratios of an estimate.
_BLOCKS, _FEW_ROWS, _FEW_RATIOS = 4, 4, (0.5,)


@dataclass(frozen=True)
class Scenario:
    """A purpose.

    Attributes:
        advice: what is published for it, one sentence. ladder: presets, the advised one first, then safer ones.
        tolerance: the largest divergence that it bears, nats per masked token.
    """

    advice: str
    ladder: tuple[str, ...]
    tolerance: float


SCENARIOS = {
    "general": Scenario(
        "for general deployment, GPTQ at 4 bits loses next to nothing (QDLM, arXiv 2508.14896)",
        ("w4a16-gptq", "w5a16-mixed-gptq", "w8a16-gptq"),
        0.05,
    ),
    "quality": Scenario(
        "for the highest quality with quantized activations, DLLMQuant at W8A8 (arXiv 2508.14090)",
        ("w8a8-dllmquant", "w8a8-gptq", "w8a16-gptq"),
        0.01,
    ),
    "math-code": Scenario(
        "mathematics and code lose first at few bits: GPTQ at 8 bits (QDLM, arXiv 2508.14896)",
        ("w8a16-gptq", "w8a16-g128-gptq"),
        0.01,
    ),
    "extreme": Scenario(
        "for extreme compression, Quant-dLLM at 2 to 3 bits (arXiv 2510.03274)",
        ("w2a16-quant-dllm", "w2a16-daq", "w2.5a16-mixed-gptq", "w3.2a16-mixed-gptq", "w4a16-gptq"),
        0.5,
    ),
    "edge": Scenario(
        "for edge devices, mixed precision at 3.2 bits on average",
        ("w3.2a16-mixed-gptq", "w4a16-mixed-gptq", "w5a16-mixed-gptq", "w8a16-gptq"),
        0.1,
    ),
}


@dataclass(frozen=True)
class Trial:
    """A rung that was tried.

    Attributes:
        recipe: name of the preset.
        kl: divergence, nats per masked token. worst: the upper end of its interval (of an estimate, the estimate itself).
        agreement: share of masked positions with the same most probable token; None of an estimate.
        bits: per quantized weight. megabytes: of all weights, 10⁶ bytes.
        refused: why it cannot be done on this model; then there are no numbers.
    """

    recipe: str
    kl: float | None = None
    worst: float | None = None
    agreement: float | None = None
    bits: float | None = None
    megabytes: float | None = None
    refused: str | None = None

    def fits(self, tolerance: float) -> bool:
        """Whether it can be done and stays within the tolerance."""
        return self.worst is not None and self.worst <= tolerance

    def in_words(self, tolerance: float) -> str:
        """One sentence without a full stop."""
        if self.refused is not None:
            return f"{self.recipe}: refused, {self.refused}"
        verdict = "within" if self.fits(tolerance) else "beyond"
        size = f"{self.bits:.2f} bits per quantized weight, {self.megabytes:,.2f} MB"
        if self.agreement is None:
            return f"{self.recipe}: KL about {self.kl:.2g} by estimate, {verdict} {tolerance:g} ({size})"
        measured = f"KL {self.kl:.2g}, at most {self.worst:.2g}, {verdict} {tolerance:g}"
        return f"{self.recipe}: {measured}; top-1 agreement {self.agreement:.1%} ({size})"


@dataclass(frozen=True)
class Recommendation:
    """A recipe and the reasons for it.

    Attributes:
        model: its name. scenario: key of `SCENARIOS`. tolerance: nats per masked token.
        recipe: what to compile with. fits: whether it is within the tolerance; if not, nothing on the ladder was.
        reasons: sentences, without full stops. trials: the rungs that were tried.
    """

    model: str
    scenario: str
    tolerance: float
    recipe: Recipe
    fits: bool
    reasons: tuple[str, ...]
    trials: tuple[Trial, ...]

    def to_plain(self) -> dict[str, Any]:
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        return {"model": self.model, "scenario": self.scenario, "tolerance": self.tolerance, "fits": self.fits} | {
            "recipe": self.recipe.to_plain(),
            "line": str(self.recipe),
            "reasons": list(self.reasons),
            "trials": trials,
        }

    def render(self) -> str:
        """A recipe file, the reasons as comments at its head."""
        head = [f"{self.recipe.name} for {self.model}, scenario {self.scenario}", *self.reasons]
        return "\n".join([*(f"# {' '.join(line.split())}" for line in head), self.recipe.to_yaml()])


def recommend(
    model: nn.Module,
    scenario: str = "general",
    *,
    calibration: Text | None = None,
    tolerance: float | None = None,
    probe: Probe = "auto",
    mask_id: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Recommendation:
    """The recipe for a purpose, tried on the model, which is not changed.

    Args:
        model, calibration, mask_id, seed: as for `compile`; without text the model's own rollouts are measured on, too.
        scenario: a key of `SCENARIOS`.
        tolerance: in place of the scenario's own, nats per masked token.
        probe: "compile" quantizes the model with each rung, "sites" estimates; "auto" compiles up to `MEASURED_BELOW` parameters.
        progress: called with the name of each rung.

    Raises:
        FeasibilityError: unknown scenario, impossible tolerance, or no rung can be done on this model at all.
        CalibrationError: too little text.
    """
    if scenario not in SCENARIOS:
        raise FeasibilityError(f"unknown {scenario!r}", where="scenario", remedy=nearest(scenario, SCENARIOS))
    if probe not in ("auto", "compile", "sites"):
        raise FeasibilityError(f"unknown {probe!r}", where="probe", remedy="Use auto, compile or sites")
    wanted = SCENARIOS[scenario]
    bound = wanted.tolerance if tolerance is None else tolerance
    if not 0 < bound < float("inf"):
        raise FeasibilityError(
            f"a divergence of {bound} cannot be asked for", where="tolerance", remedy=f"Use {wanted.tolerance}"
        )
    bench = _Bench(model, calibration, mask_id, seed)
    whole = probe == "compile" or (probe == "auto" and bench.parameters <= MEASURED_BELOW)
    trials: list[Trial] = []
    for name in wanted.ladder:
        progress(name)
        try:
            found = bench.measured(name) if whole else bench.estimated(name)
        except DlqcError as error:
            found = Trial(name, refused=error.what)
        trials.append(found)
        if found.fits(bound):
            break
    done = [trial for trial in trials if trial.refused is None]
    if not done:
        reasons = "; ".join(f"{trial.recipe}: {trial.refused}" for trial in trials)
        raise FeasibilityError(f"no recipe of the ladder can be done ({reasons})", remedy="Write a recipe of your own")
    best = done[-1]
    said = [wanted.advice[0].upper() + wanted.advice[1:], bench.how(whole)]
    said += [trial.in_words(bound) for trial in trials]
    if not best.fits(bound):
        said.append(
            f"nothing on the ladder stays within {bound:g}; this is its safest rung, or keep the model as it is"
        )
    name = getattr(model, "dlqc_source", type(model).__name__).rstrip("/").split("/")[-1]
    return Recommendation(name, scenario, bound, as_recipe(best.recipe), best.fits(bound), tuple(said), tuple(trials))


class _Bench:
    """A captured model with rows to calibrate trials on, and others to measure them on."""

    def __init__(self, model: nn.Module, calibration: Text | None, mask_id: int | None, seed: int) -> None:
        steps = as_recipe("calibrate")
        self._captured, _, self._ctx = prepare(
            model, load_backend("reference"), calibration=calibration, mask_id=mask_id, seed=seed, recipe=steps
        )
        self._original = self._captured.weights.clone()
        self.parameters = sum(c.leaf.numel() for c in self._original.values())
        self._run: Callable[[torch.Tensor], torch.Tensor] = functools.partial(
            forward, self._captured.graph, self._original
        )
        rows = self._ctx.rows or rollout_rows(
            self._run, self._ctx.spec, rows=_SEQUENCES + _ROWS, length=_LENGTH, seed=seed
        )
        clean = rows.ids[(rows.ids != self._ctx.spec.mask_id).all(dim=1)]
        if len(clean) < 4:
            what = f"{len(clean)} rows of text are too few to calibrate on some and to measure on others"
            raise CalibrationError(what, where="calibration", remedy="Give four rows or more, better forty")
        held = torch.zeros(len(clean), dtype=torch.bool)
        count = min(_ROWS, len(clean) // 2)
        held[torch.arange(count) * len(clean) // count] = True
        self._held, self._ctx.rows = clean[held], TokenRows(clean[~held], rows.source)

    def how(self, whole: bool) -> str:
        """What was done, one sentence."""
        rows = self._ctx.rows
        assert rows is not None
        if whole:
            return f"tried on {len(self._held)} rows of {rows.source} that did not calibrate, at mask ratios 0.25, 0.5, 0.75"
        return (
            f"estimated from {_BLOCKS} blocks or fewer on {_FEW_ROWS} rows of {rows.source}: rounding of weights alone, "
            "without transforms and activations"
        )

    def measured(self, name: str) -> Trial:
        """Quantize with a preset, quickly, and compare."""
        graph, weights = tried(self._captured.graph, self._ctx, [_quick(p) for p in as_recipe(name).passes])
        candidate = functools.partial(forward, graph, weights)
        table = fidelity(self._run, candidate, self._held, self._ctx.spec, ratios=RATIOS, seed=self._ctx.seed)
        storage = measure_storage(self._original, graph, weights, {})
        kl, agreement = table.mean_kl, table.mean_agreement.mean
        size = (storage.bits_per_quantized_weight, storage.bits / 8e6)
        return Trial(name, kl.mean, max(kl.mean, kl.high), agreement, *size)

    def estimated(self, name: str) -> Trial:
        """The Fisher estimate of rounding the weights as a preset does, from a few blocks."""
        recipe = as_recipe(name)
        assign: Any = next((p for p in recipe.passes if p.name == "assign_bits"), None)
        quantize: Any = next(p for p in recipe.passes if p.name == "quantize_weights")
        graph, ctx = self._captured.graph, dataclasses.replace(self._ctx, weights=self._original.clone())
        PassManager([_quick(p) for p in as_recipe("calibrate").passes]).run(graph, ctx)
        found = choices(graph, ctx, assign.candidates if assign else (quantize.scheme,))
        if found.problems:
            raise FeasibilityError("; ".join(found.problems))
        limit = Budget.read(assign.budget).limit(found.weights, found.rest) if assign else found.largest
        best = frontier(found.items(_sampled(graph, ctx, found)))
        size, cost = best.sizes[best.at(limit)], best.costs[best.at(limit)]
        return Trial(name, cost, cost, None, size / found.weights, (size + found.rest) / 8e6)


def _quick(p: Pass) -> Pass:
    """A pass with less to calibrate on."""
    less: dict[str, Any] = {"calibrate": {"sequences": _SEQUENCES}, "assign_bits": {"rows": _FEW_ROWS}}.get(p.name, {})
    return dataclasses.replace(p, **less)


def _sampled(graph: fx.Graph, ctx: Context, found: Choices) -> list[list[float]]:
    """Fisher estimates of all units: of a few blocks, and for the others those of the nearest block that is built alike."""
    places: dict[int, list[int]] = {}
    for i, unit in enumerate(found.units):
        places.setdefault(unit.block, []).append(i)
    built = {block: [found.sizes[i] for i in units] for block, units in places.items()}
    blocks = list(places)
    chosen = {blocks[(2 * i + 1) * len(blocks) // (2 * _BLOCKS)] for i in range(_BLOCKS)}
    for block in blocks:
        if all(built[block] != built[other] for other in chosen):
            chosen.add(block)
    picked = [i for block in blocks if block in chosen for i in places[block]]
    units, schemes = ([part[i] for i in picked] for part in (found.units, found.schemes))
    table = sensitivities(graph, ctx, units, schemes, "fisher", rows=_FEW_ROWS, ratios=_FEW_RATIOS)  # type: ignore[arg-type]
    costs = {i: [cost["fisher"] for cost in row] for i, row in zip(picked, table, strict=True)}
    for block in blocks:
        near = min((other for other in chosen if built[other] == built[block]), key=lambda other: abs(other - block))
        costs |= {i: costs[j] for i, j in zip(places[block], places[near], strict=True)}
    return [costs[i] for i in range(len(found.units))]
