"""sparsify: masks are the methods', zeros go along to the artifact, and what has no zero is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import captured

import dlqc
from dlqc.backend import load_backend
from dlqc.blocks import find_blocks
from dlqc.contract import Context, Declined
from dlqc.errors import ContractError, FeasibilityError, ModelError, RecipeError
from dlqc.execute import Executor, placeholder
from dlqc.formats.codebook import CodebookFormat
from dlqc.formats.coded import weight_of
from dlqc.formats.integer import IntFormat, QuantizedWeight
from dlqc.formats.lattice import LatticeFormat
from dlqc.formats.microscaling import MicroscalingFormat
from dlqc.formats.nf4 import Nf4Format
from dlqc.formats.offset import OffsetFormat
from dlqc.formats.packing import unpack
from dlqc.formats.planes import PlanesFormat
from dlqc.formats.sparse import SparseFormat
from dlqc.graph import args_of, fingerprint, is_call, linears
from dlqc.manager import PassManager
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM
from dlqc.ops import LINEAR_CODED, LINEAR_PACKED
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.fold_norm_scale import FoldNormScale
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.rotate_hidden import RotateHidden
from dlqc.passes.smooth import Smooth
from dlqc.passes.sparsify import Sparsify
from dlqc.passes.split_outliers import SplitOutliers
from dlqc.planning import plan_report
from dlqc.pruning import Magnitude, Pattern, SparseGpt, Wanda
from dlqc.rounding.daq import Daq
from dlqc.rounding.hqq import Hqq
from dlqc.rounding.kmeans import Kmeans
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.vector import Ldlq

CaseMaker = Callable[..., Any]
METHODS = (Magnitude(), Wanda(), SparseGpt())


def run(k: Any, *passes: Any) -> Any:
    """Run the passes; gives the report of the first."""
    return PassManager(passes).run(k.graph, k.ctx)[0][1]


def stored(k: Any, name: str) -> torch.Tensor:
    """The float32 weight of a quantized linear, from the constants of the graph."""
    for node in k.graph.nodes:
        if is_call(node, LINEAR_CODED) and str(args_of(node)[1][0].target).rpartition(".")[0] == name:
            x, parts, _, spec, n = args_of(node)
            tensors = [k.ctx.weights.value(str(part.target)) for part in parts]
            return weight_of(spec, tensors, n, int(x.meta["val"].shape[-1])).dequantize()
        if is_call(node, LINEAR_PACKED) and str(args_of(node)[1].target) == f"{name}.codes_packed":
            x, codes, scales, zeros, _, bits, group = args_of(node)
            width = int(x.meta["val"].shape[-1])
            own = k.ctx.weights.value(str(scales.target))
            points = None if zeros is None else unpack(k.ctx.weights.value(str(zeros.target)), bits, own.shape[1])
            fmt = IntFormat(bits, group or None, zeros is None)
            return QuantizedWeight(
                unpack(k.ctx.weights.value(str(codes.target)), bits, width), own, points, fmt
            ).dequantize()
    raise AssertionError(name)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize(("name", "text"), [("llada", "2:4"), ("dream", None), ("llada bf16", None), ("shared", "4:8")])
def test_the_pattern_holds_at_every_site_and_the_graph_computes_with_it(
    case: CaseMaker, method: Any, name: str, text: str | None
) -> None:
    k, plain = case(name), case(name)
    inside = [s.name for b in k.ctx.blocks for s in linears(b.nodes(k.graph), k.ctx.weights)]
    report = run(k, Sparsify(0.5, text, method))
    assert sorted(report.details) == sorted(set(inside))
    for site in report.details:
        weight = k.ctx.weights.value(f"{site}.weight")
        assert weight.dtype == k.model.state_dict()[f"{site}.weight"].dtype
        kept = k.ctx.weights[f"{site}.weight"].kept()
        assert kept is not None
        assert not bool(weight[~kept].any())
        if text is not None:
            n, m = Pattern.read(0.5, text).kept, Pattern.read(0.5, text).of
            assert ((weight != 0).reshape(len(weight), -1, m).sum(-1) <= n).all()
        assert report.details[site]["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        plain.ctx.weights.put(f"{site}.weight", weight)
    assert torch.equal(k.forward(k.ids()), plain.forward(k.ids()))
    assert report.notes[0].startswith(
        "weights are sparse (" + (text or "50%") + ") and stored dense, which saves nothing"
    )


def test_masks_are_the_methods_on_the_statistics_of_the_states(case: CaseMaker) -> None:
    """Of the first linear, whose input no pruning has changed."""
    clean = case("llada")
    first = next(s for s in linears(clean.graph.nodes, clean.ctx.weights))
    x0 = Executor(clean.graph, clean.ctx.weights, [placeholder(clean.graph)], [first.x])(clean.ctx.states.ids)[0]
    x0 = x0.reshape(-1, 64).double() * clean.ctx.states.weights.reshape(-1, 1).sqrt()
    own = clean.model.state_dict()[first.weight].double()
    stats = {"energy": x0.square().sum(0), "hessian": x0.T @ x0}
    for method in METHODS:
        k = case("llada")
        run(k, Sparsify(0.6, None, method))
        expected = method.prune(own, Pattern.read(0.6, None), stats)
        kept = k.ctx.weights[first.weight].kept()
        # Statistics are summed in float32 there: a score or two may change places.
        assert float((kept != expected.kept).float().mean()) < 0.003
        value = own * expected.kept if expected.moved is None else expected.moved
        same = kept == expected.kept
        found = k.ctx.weights.value(first.weight).double()
        assert float((found - value)[same].abs().max()) < 0.02


def test_sparsegpt_loses_least_at_the_logits(case: CaseMaker) -> None:
    clean = case("llada")
    expected = clean.forward(clean.ctx.rows.ids)
    errors = {}
    for method in (Magnitude(), Wanda(), SparseGpt(refine=0), SparseGpt()):
        k = case("llada")
        run(k, Calibrate(sequences=64, length=16), Sparsify(0.5, None, method))
        errors[method] = float((k.forward(k.ctx.rows.ids) - expected).norm())
    assert errors[SparseGpt()] < errors[SparseGpt(refine=0)] < errors[Wanda()] < 1.1 * errors[Magnitude()]


# Then quantized


@pytest.mark.parametrize(
    ("quantize", "methods"),
    [
        (QuantizeWeights(4, 32), METHODS),
        (QuantizeWeights(3, None, True), METHODS[2:]),
        (QuantizeWeights(4, 32, True, Rtn()), METHODS[2:]),
        (QuantizeWeights(format=SparseFormat(4, 32)), METHODS[1:]),
        (QuantizeWeights(format=SparseFormat(16), method=Rtn()), METHODS[2:]),
        (QuantizeWeights(format=Nf4Format(32), method=Rtn()), METHODS[:1]),
        (QuantizeWeights(format=MicroscalingFormat(), method=Rtn()), METHODS[:1]),
    ],
    ids=lambda p: getattr(getattr(p, "target", None), "label", ""),
)
def test_zeros_stay_zero_through_rounding_and_packing(case: CaseMaker, quantize: Any, methods: Any) -> None:
    for method in methods:
        k = case("llada")
        masks: dict[str, torch.Tensor] = {}
        look = Sparsify(pattern="2:4", method=method)
        manager = PassManager((look, quantize, Pack(required=False)), (Masks(masks),))
        manager.run(k.graph, k.ctx)
        assert len(masks) == 14
        for site, kept in masks.items():
            found = stored(k, site)
            assert not bool(found[~kept].any())
            assert ((found != 0).reshape(len(found), -1, 4).sum(-1) <= 2).all()
            assert float((found != 0).float().mean()) > 0.3


class Masks:
    """Keeps the masks of each block between pruning and rounding."""

    def __init__(self, found: dict[str, torch.Tensor]) -> None:
        self.found = found

    def before(self, *_: Any) -> None: ...
    def after(self, *_: Any) -> None: ...
    def on_error(self, *_: Any) -> None: ...

    def after_block(self, p: Any, graph: Any, ctx: Any, report: Any) -> None:
        if p.name == "sparsify":
            for site in report.details:
                self.found[site] = ctx.weights[f"{site}.weight"].kept()


@pytest.mark.parametrize(
    ("fmt", "method"),
    [
        (PlanesFormat(group_size=32), Daq()),
        (CodebookFormat(3), Kmeans()),
        (LatticeFormat(), Ldlq()),
        (OffsetFormat(3, 32), Hqq()),
    ],
    ids=lambda x: getattr(x, "label", ""),
)
def test_formats_without_a_zero_are_refused_before_any_work(case: CaseMaker, fmt: Any, method: Any) -> None:
    k = case("llada")
    mark = fingerprint(k.graph, k.ctx.weights)
    message = (
        r"blocks\.0\.q_proj: pruned weights are zero, and .* has no zero \(use another format\); .* Nothing was changed"
    )
    with pytest.raises(FeasibilityError, match=message):
        run(k, Sparsify(), QuantizeWeights(format=fmt, method=method))
    assert fingerprint(k.graph, k.ctx.weights) == mark


def test_a_sparse_format_wants_pruned_weights(case: CaseMaker) -> None:
    k = case("llada")
    message = r"q_proj: sparse int4 g32 asymmetric stores what pruning left \(put sparsify before\)"
    with pytest.raises(FeasibilityError, match=message):
        run(k, QuantizeWeights(format=SparseFormat(4, 32)))


def test_a_method_that_fills_zeros_is_blamed(case: CaseMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = IntFormat.quantize
    monkeypatch.setattr(IntFormat, "quantize", lambda self, w, **o: plain(self, w + 0.5, **o))
    with pytest.raises(
        ContractError, match=r"q_proj: pruned weights are no longer zero\. This is a fault of the rounding"
    ):
        run(case("llada"), Sparsify(method=Magnitude()), QuantizeWeights(4, 32, method=Rtn()))


# With others


def test_transforms_come_before(case: CaseMaker) -> None:
    k = case("llada")
    message = r"a transform would mix the zeros of a pruned weight with others\. Move the transform before sparsify"
    with pytest.raises(ContractError, match=message):
        run(k, FoldNormScale(), Sparsify(method=Magnitude()), RotateHidden())


def test_scales_of_channels_may_come_after_and_keep_the_mask(case: CaseMaker) -> None:
    k = case("llada")
    run(k, Sparsify(pattern="2:4", method=Magnitude()), Smooth(), SplitOutliers(0.5))
    name = "model.transformer.blocks.0.q_proj"
    main, outliers = (k.ctx.weights[f"{name}{end}"] for end in (".weight", ".outliers.weight"))
    kept = main.kept()
    assert kept is not None
    assert not bool(k.ctx.weights.value(f"{name}.weight")[~kept].any())
    part = outliers.kept()
    assert part is not None
    assert part.shape == outliers.shape
    assert not bool(k.ctx.weights.value(f"{name}.outliers.weight")[~part].any())
    assert bool(k.ctx.weights.value(f"{name}.outliers.weight")[part].any())


def test_run_twice_the_masks_intersect(case: CaseMaker) -> None:
    k = case("llada")
    run(k, Sparsify(pattern="2:4", method=Magnitude()))
    first = k.ctx.weights["model.transformer.blocks.0.q_proj.weight"].kept()
    report = run(k, Sparsify(0.7, method=Wanda()))
    both = k.ctx.weights["model.transformer.blocks.0.q_proj.weight"].kept()
    assert not bool((both & ~first).any())
    assert float(both.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert report.sites == 14


def test_declines_what_skip_names_and_routers(case: CaseMaker) -> None:
    k = case("dream")
    report = run(k, Sparsify(method=Magnitude(), skip=("*.v_proj",)))
    assert [d for d in report.declined if d.reason != "named by skip="] == []
    assert len(report.declined) == 2
    assert report.sites == 12
    graph, weights, spec = captured("llada-moe")
    ctx = Context(weights, spec, load_backend("reference"), blocks=find_blocks(graph))
    found = PassManager((Sparsify(method=Magnitude()),)).run(graph, ctx)[0][1]
    reason = "a router: its output picks experts"
    assert found.declined == [Declined(f"model.layers.{i}.mlp.gate", reason) for i in range(2)]


def test_what_the_plan_refuses(case: CaseMaker) -> None:
    k = case("llada")
    message = r"q_proj: 64 input features do not divide into groups of 6 \(use pattern=None, or exclude it with skip=\)"
    with pytest.raises(FeasibilityError, match=message):
        run(k, Sparsify(pattern="3:6", method=Magnitude()))
    with pytest.raises(FeasibilityError, match=r"skip pattern '\*\.q_porj' matches no linear"):
        run(k, Sparsify(method=Magnitude(), skip=("*.q_porj",)))
    with pytest.raises(RecipeError, match=r"^ratio: a ratio of 1\.5 is not between 0 and 1"):
        Sparsify(1.5)


def test_statistics_that_are_missing_name_the_layer(case: CaseMaker) -> None:
    k = case("llada")
    k.ctx.block = k.ctx.blocks[1]
    with pytest.raises(dlqc.DlqcError, match="wanda needs the statistic 'energy'") as caught:
        k.apply(Sparsify(method=Wanda()))
    assert caught.value.__notes__ == ["while pruning model.transformer.blocks.1.q_proj"]


# The whole way


@functools.cache
def tiny() -> LLaDAModelLM:
    config = LLaDAConfig(
        d_model=128,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=128,
        vocab_size=100,
        max_sequence_length=32,
        mask_token_id=99,
    )
    torch.manual_seed(0)
    return LLaDAModelLM(config).eval()


@pytest.mark.parametrize("bits", [4, 16])
def test_saved_loaded_and_smaller(bits: int, tmp_path: Path) -> None:
    method = ", method=rtn" if bits == 16 else ""
    recipe = (
        f"calibrate(sequences=4), sparsify(pattern='2:4'), quantize_weights(format=sparse(bits={bits}){method}), lower"
    )
    rows = torch.randint(0, 99, (6, 16), generator=torch.Generator().manual_seed(2))
    q = dlqc.compile(tiny(), recipe, calibration=rows, backend="cpu", progress=False)
    dlqc.artifact.save(q, tmp_path / "a", verify_reload=False)
    again = dlqc.load(tmp_path / "a", backend="cpu")
    assert torch.equal(again(rows), q(rows))
    dlqc.artifact.verify(tmp_path / "a", backend="cpu")
    for node in again.graph.nodes:
        if is_call(node, LINEAR_CODED):
            x, parts, _, spec, n = args_of(node)
            tensors = [again.weights.value(str(part.target)) for part in parts]
            found = weight_of(spec, tensors, n, int(x.meta["val"].shape[-1])).dequantize()
            assert ((found != 0).reshape(len(found), -1, 4).sum(-1) <= 2).all()
    storage = q.report.storage
    zeros = 28 / 128 if bits == 4 else 0  # a zero point a row, padded to a word
    expected = 1 + bits / 2 + (0 if bits == 16 else (16 + 4) / 128 + zeros)
    assert storage.bits_per_quantized_weight == pytest.approx(expected, rel=1e-3)
    planned = plan_report(tiny(), recipe).bits
    assert planned == pytest.approx(storage.bits - zeros * storage.quantized, rel=1e-3)
    assert "sparse" in " ".join(q.report.steps[-1].choices.values())


def test_numbers_that_bfloat16_cannot_hold_are_refused(case: CaseMaker) -> None:
    k = case("llada")
    huge = torch.full((64, 64), 3.4e38)
    k.ctx.weights.put("model.transformer.blocks.0.q_proj.weight", huge)
    with pytest.raises(ModelError, match="weights are not finite as float32"):
        run(k, Sparsify(method=Magnitude()), QuantizeWeights(format=SparseFormat(16), method=Rtn()))
