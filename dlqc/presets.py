"""Presets: recipes whose name says what they make.

    w<bits>a<bits>[-g<size>|-channel][-sym][-mixed][-<activations>]-<method>[-<variant>][-e<bits>h<bits>]

`w4a16-gptq` is 4-bit weights in groups of 128 with zero points, 16-bit activations, GPTQ on masked states. Weights of 8 bits, and
weights next to activations of fewer than 8 bits, have one scale per channel and no zero points unless the name says
otherwise. Activations are quantized per token, and queries, keys, values and attention probabilities stay as they are, unless
the name says otherwise: see `dlqc.activation_presets`. Embeddings and head stay as they are without the last part: `-e8h8` stores
both in 8 bits, `-e4`, `-h8` and so on one of them; 8 bits have one scale for each row.

With -mixed the number is a budget: no more stored bits per quantized weight of the blocks than that, scales and zero points
counted, on average over linears of 2, 3, 4 and 8 bits (`w3.2a16-mixed-gptq`). Elsewhere it is the width of a code.

DLLMQuant (arXiv 2508.14090) is TMAS, IA-AQ and CGQ behind the rotations of QuaRot, or (`-awq`) behind AWQ: the model is
transformed first, its rollouts are drawn then, values get the fixed scales of IA-AQ, and weights are rounded last, by GPTQ on
certainty-weighted statistics. Values have the width of the activations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from dlqc.activation_presets import WORDS, Activations
from dlqc.contract import Pass
from dlqc.errors import RecipeError
from dlqc.pruning import Wanda

PRESETS = {
    "w8a16-rtn": "8-bit weights per channel, nearest rounding, no calibration",
    "w4a16-rtn": "4-bit weights g128, nearest rounding, no calibration",
    "w8a8-rtn": "8-bit weights per channel, 8-bit activations per token, nearest rounding",
    "w4a4-rtn": "4-bit weights per channel, 4-bit activations per token, nearest rounding",
    "w8a8-smoothquant": "as w8a8-rtn after SmoothQuant on masked states",
    "w8a8-llmint8": "as w8a8-rtn with outlier columns of activations in 16 bits, by LLM.int8() on masked states",
    "w8a8-gptq": "8-bit weights per channel by GPTQ, 8-bit activations per token",
    "w4a8-gptq": "4-bit weights g128 by GPTQ, 8-bit activations per token",
    "w4a16-gptq": "4-bit weights g128 by GPTQ on masked states",
    "w4a16-gptq-e8h8": "as w4a16-gptq with embeddings and head in 8 bits, a scale per row",
    "w4a16-gptq-e4h4": "as w4a16-gptq with embeddings and head in 4 bits g128",
    "w4a16-sym-gptq": "as w4a16-gptq without zero points, for engines that take none",
    "w4a16-gptq-clean": "as w4a16-gptq on clean text, as tools for autoregressive models calibrate",
    "w4a16-gptq-cgq": "as w4a16-gptq with certainty-weighted statistics",
    "w4a16-gptq-tmas": "as w4a16-gptq on snapshots of the model's own denoising",
    "w4a16-gptq-tmas-cgq": "as w4a16-gptq-tmas with certainty-weighted statistics",
    "w4a16-gptaq": "4-bit weights g128 by GPTAQ on masked states, layer by layer",
    "w4a16-gptaq-cgq": "as w4a16-gptaq with certainty-weighted statistics",
    "w4a16-gptaq-tmas": "as w4a16-gptaq on snapshots of the model's own denoising",
    "w4a16-gptaq-tmas-cgq": "as w4a16-gptaq-tmas with certainty-weighted statistics",
    "w4a16-sparsegpt": "4-bit weights g128 by GPTQ, half of them zero by SparseGPT on masked states",
    "w4a16-wanda": "4-bit weights g128 by GPTQ, half of them zero by Wanda on masked states",
    "w4a16-smooth": "4-bit weights g128 after smoothing on masked states, nearest rounding",
    "w4a16-awq": "4-bit weights g128 after AWQ's scaling and clipping on masked states, nearest rounding",
    "w4a4-smoothquant": "as w4a4-rtn after SmoothQuant on masked states",
    "w4a4-quarot": "4-bit weights per channel by GPTQ, 4-bit activations per token, after QuaRot's rotations",
    "w4a4-spinquant": "as w4a4-rtn after rotations that are learned on the masked loss",
    "w4a4-flatquant": "as w4a4-rtn after affine transforms that are learned edge by edge",
    "w4a4-duquant": "as w4a4-rtn after smoothing and DuQuant's rotations on masked states",
    "w8a8-static-rtn": "as w8a8-rtn with fixed activation ranges from states at all mask ratios",
    "w8a8-static4-rtn": "as w8a8-static-rtn with ranges for each of four mask ratios",
    "w8a8-static4-smoothquant": "as w8a8-smoothquant with fixed activation ranges for each of four mask ratios",
    "w4a4-ag128-quarot": "as w4a4-quarot with activations in groups of 128",
    "w4a4-kv4-quarot": "as w4a4-quarot with 4-bit keys, rotated, and values, per token",
    "w4a4-asym-qkv4-smoothquant": "as w4a4-smoothquant with zero points, and 4-bit queries, keys and values per token and head",
    "w4a4-asym-qkv4-duquant": "as w4a4-duquant with zero points, and 4-bit queries, keys and values per token and head",
    "w4a16-cache4-gptq": "as w4a16-gptq with a cache of 4-bit keys, per channel, and values, per token",
    "w4a16-cache2-gptq": "as w4a16-cache4-gptq with 2 bits, scores corrected",
    "w8a8-qkv8-p8-smoothquant": "as w8a8-smoothquant with all that attention reads in 8 bits",
    "w4a4-dllmquant": "as w4a4-quarot by DLLMQuant: TMAS, 4-bit values with fixed scales by IA-AQ, CGQ",
    "w8a8-dllmquant": "as w4a4-dllmquant with 8 bits throughout",
    "w4a4-kv4-dllmquant": "as w4a4-dllmquant with 4-bit keys, rotated, per token",
    "w4a4-dllmquant-awq": "as w4a4-dllmquant after AWQ's scaling and clipping instead of rotations",
    "w3a16-gptq": "3-bit weights g128 by GPTQ on masked states",
    "w2a16-gptq": "2-bit weights g128 by GPTQ on masked states",
    "w3a16-gptaq": "3-bit weights g128 by GPTAQ on masked states, layer by layer",
    "w2a16-gptaq": "2-bit weights g128 by GPTAQ on masked states, layer by layer",
    "w4a16-autoround": "4-bit weights g128, rounding learned block by block on masked states (SignRound)",
    "w3a16-autoround": "3-bit weights g128, rounding learned block by block on masked states (SignRound)",
    "w2a16-autoround": "2-bit weights g128, rounding learned block by block on masked states (SignRound)",
    "w4a4-autoround": "as w4a4-rtn with rounding learned block by block under 4-bit activations on masked states (SignRound)",
    "w3a16-lqer": "as w3a16-gptq with corrections of rank 16 in 8 bits",
    "w2a16-lqer": "as w2a16-gptq with corrections of rank 16 in 8 bits",
    "w4a16-icqbc": "as w4a16-rtn with biases that give outputs the means of full precision on masked states",
    "w3a16-icqbc": "as w4a16-icqbc with 3-bit weights",
    "w4a4-icqbc": "as w4a4-rtn with biases that give outputs the means of full precision on masked states",
    "w4a16-mixed-gptq": "2, 3, 4 and 8-bit weights g128 by GPTQ on masked states, 4 bits per weight on average, all counted",
    "w3.2a16-mixed-gptq": "as w4a16-mixed-gptq at 3.2 bits",
    "w2.5a16-mixed-gptq": "as w4a16-mixed-gptq at 2.5 bits",
    "w8a16-fp8": "fp8 (E4M3) weights, a scale per channel, nearest rounding, no calibration",
    "w4a16-nf4": "nf4 weights in blocks of 64 with doubly quantized scales, nearest rounding, no calibration",
    "w4a16-mxfp4": "mxfp4 weights, blocks of 32, nearest rounding, no calibration",
    "w4a16-nvfp4": "nvfp4 weights, blocks of 16, nearest rounding, no calibration",
    "w4a16-hqq": "4-bit weights g128 with real zero points by HQQ, no calibration",
    "w3a16-hqq": "3-bit weights g128 with real zero points by HQQ, no calibration",
    "w2a16-hqq": "2-bit weights g128 with real zero points by HQQ, no calibration",
    "w2a16-g128-kmeans": "2-bit tables g128 (2.5 bits in all) by k-means with GPTQ's feedback on masked states",
    "w4a16-squeezellm": "4-bit tables per channel by k-means weighted with the loss's Fisher on masked states, 0.45 % sparse",
    "w3a16-squeezellm": "as w4a16-squeezellm with 3-bit tables",
    "w2a16-daq": "two sign planes g128 by DAQ on masked states, with the steps beyond the paper",
    "w2a16-quant-dllm": "two sign planes g128 on average by DAQ and ABMP as the paper has them, on masked states",
    "w2a16-e8p": "2-bit E8P lattice per channel by LDLQ and descent on masked states, without rotations",
    "w8a16-nested-adaptive": "8-bit nested weights g128 by GPTQ on masked states, read in 2, 3, 4 or 8 bits by mask ratio",
    "w8a8-nested-adaptive": "as w8a16-nested-adaptive, with activations in 4, 5, 6 or 8 bits by mask ratio",
    "w2a16-quip": "as w2a16-e8p after QuaRot's rotations, in place of QuIP#'s two-sided ones",
}

GRAMMAR = re.compile(
    r"w(?P<w>\d(?:\.\d+)?)a(?P<a>4|6|8|16)(?:-(?:g(?P<g>\d+)|(?P<channel>channel)))?(?P<sym>-sym)?(?P<mixed>-mixed)?"
    rf"(?P<acts>{WORDS})-(?P<method>[a-z]+8?)(?:-(?P<variant>clean|cgq|tmas|tmas-cgq|rtn|gptq|gptaq|autoround|lqer|awq))?"
    r"(?:-(?=[eh])(?:e(?P<e>[48]))?(?:h(?P<h>[48]))?)?"
)

#: Widths of a code, as names spell them.
WIDTHS = ("2", "3", "4", "8")

#: Roundings of integers that take statistics.
CALIBRATED = ("gptq", "gptaq", "autoround", "lqer")

Maker = Callable[..., Pass]


def preset(name: str, pass_class: Callable[[str], Any]) -> tuple[Pass, ...] | None:
    """The passes of a preset, or None if the name is none.

    Raises:
        RecipeError: a variant that the method does not have.
    """
    if name in CODED:
        return _coded(pass_class, *CODED[name]())
    if name in ("w8a16-nested-adaptive", "w8a8-nested-adaptive"):
        return _adaptive(pass_class, activations=name.startswith("w8a8"))
    found = GRAMMAR.fullmatch(name)
    if found is None or found["method"] not in METHODS:
        return None
    if not found["mixed"] and found["w"] not in WIDTHS:
        if "." not in found["w"]:
            return None
        what, remedy = f"no code has {found['w']} bits", f"For an average use {name.replace('-', '-mixed-', 1)!r}"
        raise RecipeError(what, where=name, remedy=remedy)
    before, needs_states, rounding = METHODS[found["method"]]
    variant, without = found["variant"], name.replace(f"-{found['variant']}", "", 1)
    activations = Activations.of(found["acts"], int(found["a"]), name)
    if found["method"] == "dllmquant":
        return _dllmquant(name, found, activations, pass_class)
    if variant == "awq":
        raise RecipeError("-awq goes with dllmquant only", where=name, remedy=f"Use {without!r}")
    if variant in ("clean", "cgq", "tmas", "tmas-cgq") and rounding not in CALIBRATED and not activations.static:
        what = f"-{variant} goes with {', '.join(CALIBRATED)} and fixed ranges only"
        raise RecipeError(what, where=name, remedy=f"Use {without!r}")
    if variant in ("rtn", *CALIBRATED):
        if not before:
            raise RecipeError(f"-{variant} goes with transforms only", where=name, remedy=f"Use {without!r}")
        rounding = variant
    if found["mixed"] and any(step in ROUNDED for step, _ in before):
        what = f"-mixed does not go with {found['method']}, which has to know the width of each weight beforehand"
        raise RecipeError(what, where=name, remedy="Use -mixed with gptq, rtn or quarot")
    if found["mixed"] and (rounding == "lqer" or found["method"] in AFTER):
        what = f"-mixed does not go with {'lqer' if rounding == 'lqer' else found['method']}, whose corrections no budget counts"
        raise RecipeError(what, where=name, remedy="Use -mixed with gptq, rtn or quarot")
    weights = _format(found, activations)
    drawn = needs_states or rounding in CALIBRATED or activations.static or found["mixed"]
    steps = [_calibrate(pass_class, variant, everywhere=activations.static)] if drawn else []
    steps += _transforms(pass_class, found["method"], weights, activations)
    steps += _quantize(pass_class, weights, rounding, activations.bits, found)
    steps += activations.of_linears(pass_class)
    steps += activations.of_attention(pass_class, "token" if found["method"] == "quarot" else "head")
    steps += [pass_class(step)(**options) for step, options in AFTER.get(found["method"], ())]
    return _finished(pass_class, steps, found)


def _finished(pass_class: Callable[[str], Any], steps: list[Pass], found: re.Match[str]) -> tuple[Pass, ...]:
    """The embedding, if the name asks for it, and what ends every recipe of integers."""
    if found["e"]:
        # Behind the transforms of the whole graph, before what goes block by block: its states come from the rounded table.
        # And before budgets are reckoned.
        first = [i for i, step in enumerate(steps) if step.scope == "block" or step.name == "assign_bits"]
        steps.insert(min(first, default=len(steps)), pass_class("quantize_embedding")(**_table(int(found["e"]))))
    return (*steps, pass_class("pack")(), pass_class("lower")())


def _transforms(
    pass_class: Callable[[str], Any], method: str, weights: dict[str, Any], activations: Activations
) -> list[Pass]:
    """The transforms of a method. Rotations include that of queries and keys where keys are quantized."""
    widths = {**weights, "weight_bits": weights.get("bits"), "act_bits": activations.bits}
    steps = [
        pass_class(step)(**{option: widths[option] for option in ROUNDED.get(step, ())}, **options)
        for step, options in METHODS[method][0]
    ]
    rotated = method in ("quarot", "duquant") and "keys" in activations.attention
    return [*steps, pass_class("rotate_qk")()] if rotated else steps


def _dllmquant(
    name: str, found: re.Match[str], activations: Activations, pass_class: Callable[[str], Any]
) -> tuple[Pass, ...]:
    """TMAS on the transformed model, IA-AQ, CGQ."""
    from dlqc.heads import IaAq

    variant = found["variant"]
    if variant not in (None, "awq"):
        remedy = f"Use {name.removesuffix('-' + variant)!r}"
        raise RecipeError(
            f"dllmquant brings its own states and rounding, there is no -{variant}", where=name, remedy=remedy
        )
    if found["mixed"]:
        raise RecipeError("-mixed does not go with dllmquant", where=name, remedy="Use -mixed with gptq, rtn or quarot")
    if activations.bits is None:
        what = "DLLMQuant is about activations of fewer than 16 bits"
        raise RecipeError(what, where=name, remedy="Use w8a8-dllmquant, or w4a16-gptq-tmas-cgq")
    weights, method = _format(found, activations), "awq" if variant else "quarot"
    heads = {"values": activations.bits} | activations.attention
    steps = _transforms(pass_class, method, weights, activations)
    steps = [
        *([_calibrate(pass_class, "tmas")] if variant else []),  # AWQ itself looks at states
        *steps,
        _calibrate(pass_class, "tmas-cgq"),
        *dataclasses.replace(activations, attention=heads).of_attention(pass_class, "token", IaAq()),
        *_quantize(pass_class, weights, "gptq", activations.bits, found),
        *activations.of_linears(pass_class),
    ]
    return _finished(pass_class, steps, found)


def _coded(pass_class: Callable[[str], Any], fmt: Any, method: Any, before: tuple[Step, ...] = ()) -> tuple[Pass, ...]:
    """Weights in a format that is not integers: there is nothing left to pack."""
    steps = [pass_class(step)(**options) for step, options in before]
    steps += [_calibrate(pass_class, None)] if method.statistics else []
    return (*steps, pass_class("quantize_weights")(format=fmt, method=method), pass_class("lower")())


def _adaptive(pass_class: Callable[[str], Any], *, activations: bool) -> tuple[Pass, ...]:
    """Nested weights and a schedule. States are at all mask ratios, since each is measured by itself; no kernel reads planes."""
    from dlqc.formats.nested import NestedFormat
    from dlqc.rounding.nested_gptq import NestedGptq

    rounded = pass_class("quantize_weights")(format=NestedFormat(), method=NestedGptq())
    start = (_calibrate(pass_class, None, everywhere=True), rounded)
    if not activations:
        return (*start, pass_class("adapt_precision")())
    return (*start, pass_class("quantize_activations")(bits=8), pass_class("adapt_precision")(act_bits=(4, 5, 6, 8)))


def _hqq(bits: int) -> Callable[[], tuple[Any, Any]]:
    def made() -> tuple[Any, Any]:
        from dlqc.formats.offset import OffsetFormat
        from dlqc.rounding.hqq import Hqq

        return OffsetFormat(bits), Hqq()

    return made


def _kmeans() -> tuple[Any, Any]:
    from dlqc.formats.codebook import CodebookFormat
    from dlqc.rounding.kmeans import Kmeans

    return CodebookFormat(2, 128), Kmeans(feedback=True)


def _data_free(fmt: Callable[[Any], Any]) -> Callable[[], tuple[Any, Any]]:
    def made() -> tuple[Any, Any]:
        from dlqc.formats import coded
        from dlqc.rounding.rtn import Rtn

        return fmt(coded), Rtn()

    return made


def _squeezellm(bits: int) -> Callable[[], tuple[Any, Any]]:
    def made() -> tuple[Any, Any]:
        from dlqc.formats.codebook import CodebookFormat
        from dlqc.rounding.kmeans import Kmeans

        return CodebookFormat(bits, sparse=0.0045), Kmeans(sensitivity="fisher")

    return made


def _daq() -> tuple[Any, Any]:
    from dlqc.formats.planes import PlanesFormat
    from dlqc.rounding.daq import Daq

    return PlanesFormat(), Daq()


def _quant_dllm() -> tuple[Any, Any]:
    from dlqc.formats.planes import PlanesFormat
    from dlqc.rounding.daq import PAPER

    return PlanesFormat(), dataclasses.replace(PAPER, share=0.05)


def _e8p() -> tuple[Any, Any]:
    from dlqc.formats.lattice import LatticeFormat
    from dlqc.rounding.vector import Ldlq

    return LatticeFormat(), Ldlq()


def _quip() -> tuple[Any, Any, tuple[Step, ...]]:
    return (*_e8p(), METHODS["quarot"][0])


#: Presets whose weights are not integers: name → format, rounding, and the transforms before them. They are listed, not composed.
CODED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "w8a16-fp8": _data_free(lambda formats: formats.Fp8Format()),
    "w4a16-nf4": _data_free(lambda formats: formats.Nf4Format()),
    "w4a16-mxfp4": _data_free(lambda formats: formats.MicroscalingFormat("mxfp4")),
    "w4a16-nvfp4": _data_free(lambda formats: formats.MicroscalingFormat("nvfp4")),
    "w4a16-hqq": _hqq(4),
    "w3a16-hqq": _hqq(3),
    "w2a16-hqq": _hqq(2),
    "w2a16-g128-kmeans": _kmeans,
    "w4a16-squeezellm": _squeezellm(4),
    "w3a16-squeezellm": _squeezellm(3),
    "w2a16-daq": _daq,
    "w2a16-quant-dllm": _quant_dllm,
    "w2a16-e8p": _e8p,
    "w2a16-quip": _quip,
}


def _calibrate(pass_class: Callable[[str], Any], variant: str | None, *, everywhere: bool = False) -> Pass:
    """States on masked text, or as the variant says; `everywhere`: at all mask ratios, which a visible prefix rules out."""
    from dlqc.calibration import Certainty, Clean, ForwardProcess, MaskedSimulation, Rollout, Uniform

    parts = (variant or "").split("-")
    masked = ForwardProcess() if everywhere else MaskedSimulation()
    sampler = Clean() if "clean" in parts else Rollout() if "tmas" in parts else masked
    weight = Certainty() if "cgq" in parts else Uniform()
    made: Pass = pass_class("calibrate")(sampler=sampler, weight=weight)
    return made


def _format(found: re.Match[str], activations: Activations) -> dict[str, Any]:
    """The weight format that a name spells, as options of the passes that round."""
    wide = (found["w"] == "8" and not found["mixed"]) or found["a"] in ("4", "6")
    group = None if found["channel"] or (wide and not found["g"]) else int(found["g"] or 128)
    symmetric = found["sym"] is not None or (wide and activations.symmetric)
    width = {} if found["mixed"] else {"bits": int(found["w"])}
    return width | {"group_size": group, "symmetric": symmetric}


def _table(bits: int) -> dict[str, Any]:
    """The format of an embedding table."""
    return {"bits": 8} if bits == 8 else {"bits": bits, "group_size": 128, "symmetric": False}


def _quantize(
    pass_class: Callable[[str], Any], weights: dict[str, Any], rounding: str, act: int | None, found: re.Match[str]
) -> list[Pass]:
    """The passes that round weights, and where the name asks for it, before them the one that chooses their widths."""
    from dlqc.rounding.gptaq import Gptaq
    from dlqc.rounding.gptq import Gptq
    from dlqc.rounding.low_rank import LowRank
    from dlqc.rounding.rtn import Rtn
    from dlqc.rounding.signround import SignRound

    methods: dict[str, Callable[[], Any]] = {
        "rtn": Rtn,
        "gptq": Gptq,
        "gptaq": Gptaq,
        "lqer": Gptq,
        "autoround": partial(SignRound, act_bits=act),
    }
    # GPTAQ lives on seeing all that rounding has done to an input, within the block, too; its authors have it so.
    hows: dict[str, dict[str, Any]] = {"gptaq": {"sequential": "layer"}, "lqer": {"low_rank": LowRank()}}
    options = {**weights, "method": methods[rounding](), "head": int(found["h"]) if found["h"] else None}
    if not found["mixed"]:
        return [pass_class("quantize_weights")(**options, **hows.get(rounding, {}))]
    # A method that rounds a block at once has no cost of one linear: what a linear is worth, GPTQ tells.
    probe = Gptq() if rounding == "autoround" else None
    assigned = [pass_class("assign_bits")(budget=f"{found['w']}bpw", probe=probe, **options)]
    return [*assigned, pass_class("quantize_weights")(**options, **hows.get(rounding, {}))]


Step = tuple[str, dict[str, Any]]

#: Transforms that look ahead to the rounding, and the options in which they take what they have to know.
ROUNDED = {
    "awq_scale": ("bits", "group_size", "symmetric"),
    "awq_clip": ("bits", "group_size", "symmetric"),
    "learn_rotation": ("weight_bits", "act_bits"),
    "flatquant": ("weight_bits", "act_bits"),
}

#: What comes behind the quantization of weights and activations.
AFTER: dict[str, tuple[Step, ...]] = {"icqbc": (("correct_bias", {"against": "stream"}),)}

#: method → (transforms, whether they need states, rounding)
METHODS: dict[str, tuple[tuple[Step, ...], bool, str]] = {
    "rtn": ((), False, "rtn"),
    "gptq": ((), False, "gptq"),
    "gptaq": ((), False, "gptaq"),
    "autoround": ((), False, "autoround"),
    "lqer": ((), False, "lqer"),
    "icqbc": ((), True, "rtn"),
    "smooth": ((("smooth", {}),), True, "rtn"),
    "smoothquant": ((("smooth", {}),), True, "rtn"),
    "llmint8": ((("split_outliers", {"required": False}),), True, "rtn"),
    "sparsegpt": ((("sparsify", {}),), True, "gptq"),
    "wanda": ((("sparsify", {"method": Wanda()}),), True, "gptq"),
    "awq": ((("awq_scale", {"relative": True}), ("awq_clip", {})), True, "rtn"),
    "quarot": (
        (
            ("fold_norm_scale", {"untie": True}),
            ("rotate_hidden", {}),
            ("rotate_heads", {"across": True}),
            ("rotate_down", {"required": False}),
        ),
        False,
        "gptq",
    ),
    "dllmquant": ((), True, "gptq"),
    "spinquant": (
        (("fold_norm_scale", {"untie": True}), ("rotate_down", {"required": False}), ("learn_rotation", {})),
        True,
        "rtn",
    ),
    "flatquant": ((("flatquant", {}),), True, "rtn"),
    "duquant": ((("smooth", {"sites": "all"}), ("duquant", {})), True, "rtn"),
}
