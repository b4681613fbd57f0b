"""Presets: recipes whose name says what they make.

    w<bits>a<bits>[-g<size>|-channel][-sym][-mixed]-<method>[-<variant>]

`w4a16-gptq` is 4-bit weights in groups of 128 with zero points, 16-bit activations, GPTQ on masked states. Weights of 8 bits, and
weights next to activations of fewer than 8 bits, have one scale per channel and no zero points unless the name says
otherwise. Activations are quantized per token. Keys, values and attention scores stay as they are.

With -mixed the number is a budget: no more stored bits per quantized weight than that, scales and zero points counted, on
average over linears of 2, 3, 4 and 8 bits (`w3.2a16-mixed-gptq`). Elsewhere it is the width of a code.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from dlqc.contract import Pass
from dlqc.errors import RecipeError

PRESETS = {
    "w8a16-rtn": "8-bit weights per channel, nearest rounding, no calibration",
    "w4a16-rtn": "4-bit weights g128, nearest rounding, no calibration",
    "w8a8-rtn": "8-bit weights per channel, 8-bit activations per token, nearest rounding",
    "w4a4-rtn": "4-bit weights per channel, 4-bit activations per token, nearest rounding",
    "w8a8-smoothquant": "as w8a8-rtn after SmoothQuant on masked states",
    "w8a8-gptq": "8-bit weights per channel by GPTQ, 8-bit activations per token",
    "w4a8-gptq": "4-bit weights g128 by GPTQ, 8-bit activations per token",
    "w4a16-gptq": "4-bit weights g128 by GPTQ on masked states",
    "w4a16-sym-gptq": "as w4a16-gptq without zero points, for engines that take none",
    "w4a16-gptq-clean": "as w4a16-gptq on clean text, as tools for autoregressive models calibrate",
    "w4a16-gptq-cgq": "as w4a16-gptq with certainty-weighted statistics",
    "w4a16-gptq-tmas": "as w4a16-gptq on snapshots of the model's own denoising",
    "w4a16-gptq-tmas-cgq": "as w4a16-gptq-tmas with certainty-weighted statistics",
    "w4a16-gptaq": "4-bit weights g128 by GPTAQ on masked states",
    "w4a16-gptaq-cgq": "as w4a16-gptaq with certainty-weighted statistics",
    "w4a16-gptaq-tmas": "as w4a16-gptaq on snapshots of the model's own denoising",
    "w4a16-gptaq-tmas-cgq": "as w4a16-gptaq-tmas with certainty-weighted statistics",
    "w4a16-smooth": "4-bit weights g128 after smoothing on masked states, nearest rounding",
    "w4a16-awq": "4-bit weights g128 after AWQ's scaling and clipping on masked states, nearest rounding",
    "w4a4-smoothquant": "as w4a4-rtn after SmoothQuant on masked states",
    "w4a4-quarot": "4-bit weights per channel by GPTQ, 4-bit activations per token, after QuaRot's rotations",
    "w4a4-spinquant": "as w4a4-rtn after rotations that are learned on the masked loss",
    "w4a4-flatquant": "as w4a4-rtn after affine transforms that are learned edge by edge",
    "w4a4-duquant": "as w4a4-rtn after smoothing and DuQuant's rotations on masked states",
    "w3a16-gptq": "3-bit weights g128 by GPTQ on masked states",
    "w2a16-gptq": "2-bit weights g128 by GPTQ on masked states",
    "w3a16-gptaq": "3-bit weights g128 by GPTAQ on masked states",
    "w2a16-gptaq": "2-bit weights g128 by GPTAQ on masked states",
    "w4a16-mixed-gptq": "2, 3, 4 and 8-bit weights g128 by GPTQ on masked states, 4 bits per weight on average, all counted",
    "w3.2a16-mixed-gptq": "as w4a16-mixed-gptq at 3.2 bits",
    "w2.5a16-mixed-gptq": "as w4a16-mixed-gptq at 2.5 bits",
    "w8a16-fp8": "fp8 (E4M3) weights, a scale per channel, nearest rounding, no calibration",
    "w4a16-nf4": "nf4 weights in blocks of 64 with doubly quantized scales, nearest rounding, no calibration",
    "w4a16-mxfp4": "mxfp4 weights, blocks of 32, nearest rounding, no calibration",
    "w4a16-nvfp4": "nvfp4 weights, blocks of 16, nearest rounding, no calibration",
    "w3a16-squeezellm": "3-bit tables per channel by k-means weighted with diag(H) on masked states, 0.45 % of weights sparse",
    "w2a16-daq": "two sign planes g128 by DAQ on masked states, with the steps beyond the paper",
    "w2a16-quant-dllm": "two sign planes g128 on average by DAQ and ABMP as the paper has them, on masked states",
    "w2a16-e8p": "2-bit E8P lattice per channel by LDLQ and descent on masked states, without rotations",
    "w2a16-quip": "as w2a16-e8p after QuaRot's rotations, in place of QuIP#'s two-sided ones",
}

GRAMMAR = re.compile(
    r"w(?P<w>\d(?:\.\d+)?)a(?P<a>4|6|8|16)(?:-(?:g(?P<g>\d+)|(?P<channel>channel)))?(?P<sym>-sym)?(?P<mixed>-mixed)?"
    r"-(?P<method>[a-z]+)(?:-(?P<variant>clean|cgq|tmas|tmas-cgq|rtn|gptq|gptaq))?"
)

#: Widths of a code, as names spell them.
WIDTHS = ("2", "3", "4", "8")

#: Roundings of integers that take statistics.
CALIBRATED = ("gptq", "gptaq")

Maker = Callable[..., Pass]


def preset(name: str, pass_class: Callable[[str], Any]) -> tuple[Pass, ...] | None:
    """The passes of a preset, or None if the name is none.

    Raises:
        RecipeError: a variant that the method does not have.
    """
    if name in CODED:
        return _coded(pass_class, *CODED[name]())
    found = GRAMMAR.fullmatch(name)
    if found is None or found["method"] not in METHODS:
        return None
    if not found["mixed"] and found["w"] not in WIDTHS:
        if "." not in found["w"]:
            return None
        what, remedy = f"no code has {found['w']} bits", f"For an average use {name.replace('-', '-mixed-', 1)!r}"
        raise RecipeError(what, where=name, remedy=remedy)
    before, needs_states, rounding = METHODS[found["method"]]
    variant = found["variant"]
    if variant in ("clean", "cgq", "tmas", "tmas-cgq") and rounding not in CALIBRATED:
        without = name.removesuffix("-" + variant)
        raise RecipeError(f"-{variant} goes with gptq and gptaq only", where=name, remedy=f"Use {without!r}")
    if variant in ("rtn", *CALIBRATED):
        if not before:
            without = name.removesuffix("-" + variant)
            raise RecipeError(f"-{variant} goes with transforms only", where=name, remedy=f"Use {without!r}")
        rounding = variant
    if found["mixed"] and any(step in ROUNDED for step, _ in before):
        what = f"-mixed does not go with {found['method']}, which has to know the width of each weight beforehand"
        raise RecipeError(what, where=name, remedy="Use -mixed with gptq, rtn or quarot")
    weights, act = _format(found), int(found["a"])
    widths = {**weights, "weight_bits": weights.get("bits"), "act_bits": act if act < 16 else None}
    steps = [_calibrate(pass_class, variant)] if needs_states or rounding in CALIBRATED or found["mixed"] else []
    for step, options in before:
        rounded = {option: widths[option] for option in ROUNDED.get(step, ())}
        steps.append(pass_class(step)(**rounded, **options))
    chosen = {**weights, "method": _rounding(rounding)}
    if found["mixed"]:
        steps.append(pass_class("assign_bits")(budget=f"{found['w']}bpw", **chosen))
    steps.append(pass_class("quantize_weights")(**chosen))
    if act < 16:
        steps.append(pass_class("quantize_activations")(bits=act))
    return (*steps, pass_class("pack")(), pass_class("lower")())


def _coded(pass_class: Callable[[str], Any], fmt: Any, method: Any, before: tuple[Step, ...] = ()) -> tuple[Pass, ...]:
    """Weights in a format that is not integers: there is nothing left to pack."""
    steps = [pass_class(step)(**options) for step, options in before]
    steps += [_calibrate(pass_class, None)] if method.statistics else []
    return (*steps, pass_class("quantize_weights")(format=fmt, method=method), pass_class("lower")())


def _data_free(fmt: Callable[[Any], Any]) -> Callable[[], tuple[Any, Any]]:
    def made() -> tuple[Any, Any]:
        from dlqc.formats import coded
        from dlqc.rounding.rtn import Rtn

        return fmt(coded), Rtn()

    return made


def _squeezellm() -> tuple[Any, Any]:
    from dlqc.formats.codebook import CodebookFormat
    from dlqc.rounding.kmeans import Kmeans

    return CodebookFormat(3, sparse=0.0045), Kmeans()


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
    "w3a16-squeezellm": _squeezellm,
    "w2a16-daq": _daq,
    "w2a16-quant-dllm": _quant_dllm,
    "w2a16-e8p": _e8p,
    "w2a16-quip": _quip,
}


def _calibrate(pass_class: Callable[[str], Any], variant: str | None) -> Pass:
    from dlqc.calibration import Certainty, Clean, MaskedSimulation, Rollout, Uniform

    parts = (variant or "").split("-")
    sampler = Clean() if "clean" in parts else Rollout() if "tmas" in parts else MaskedSimulation()
    weight = Certainty() if "cgq" in parts else Uniform()
    made: Pass = pass_class("calibrate")(sampler=sampler, weight=weight)
    return made


def _format(found: re.Match[str]) -> dict[str, Any]:
    """The weight format that a name spells, as options of the passes that round."""
    wide = (found["w"] == "8" and not found["mixed"]) or found["a"] in ("4", "6")
    group = None if found["channel"] or (wide and not found["g"]) else int(found["g"] or 128)
    width = {} if found["mixed"] else {"bits": int(found["w"])}
    return width | {"group_size": group, "symmetric": wide or found["sym"] is not None}


def _rounding(name: str) -> Any:
    from dlqc.rounding.gptaq import Gptaq
    from dlqc.rounding.gptq import Gptq
    from dlqc.rounding.rtn import Rtn

    return {"rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq}[name]()


Step = tuple[str, dict[str, Any]]

#: Transforms that look ahead to the rounding, and the options in which they take what they have to know.
ROUNDED = {
    "awq_scale": ("bits", "group_size", "symmetric"),
    "awq_clip": ("bits", "group_size", "symmetric"),
    "learn_rotation": ("weight_bits", "act_bits"),
    "flatquant": ("weight_bits", "act_bits"),
}

#: method → (transforms, whether they need states, rounding)
METHODS: dict[str, tuple[tuple[Step, ...], bool, str]] = {
    "rtn": ((), False, "rtn"),
    "gptq": ((), False, "gptq"),
    "gptaq": ((), False, "gptaq"),
    "smooth": ((("smooth", {}),), True, "rtn"),
    "smoothquant": ((("smooth", {}),), True, "rtn"),
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
    "spinquant": (
        (("fold_norm_scale", {"untie": True}), ("rotate_down", {"required": False}), ("learn_rotation", {})),
        True,
        "rtn",
    ),
    "flatquant": ((("flatquant", {}),), True, "rtn"),
    "duquant": ((("smooth", {"sites": "all"}), ("duquant", {})), True, "rtn"),
}
