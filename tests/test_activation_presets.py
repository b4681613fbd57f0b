"""The words of a preset's name that tell of activations tell the truth; DLLMQuant has its parts in their order."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.calibration import Certainty, ForwardProcess, MaskedSimulation, Rollout, Uniform
from dlqc.errors import RecipeError
from dlqc.heads import Dynamic, IaAq
from dlqc.manager import PassManager
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_attention import QuantizeAttention
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.presets import PRESETS
from dlqc.ranges import Percentile
from dlqc.recipe import as_recipe
from dlqc.rounding.gptq import Gptq

WORDS = re.compile(r"static\d*|ag\d+|asym|(?:q?k?v|p)\d")


def parts(name: str) -> dict[str, Any]:
    recipe = as_recipe(name)
    assert recipe.name == name
    PassManager(recipe.passes).check_order()
    return {p.name: p for p in recipe.passes}


names = st.tuples(
    st.sampled_from(["w8a8", "w4a8", "w4a4", "w4a16"]),
    st.sampled_from(["", "-g64", "-channel"]),
    st.sampled_from(["", "-asym"]),
    st.sampled_from(["", "-ag32", "-static", "-static8"]),
    st.sampled_from(["", "-qkv4", "-kv3", "-v8"]),
    st.sampled_from(["", "-p8", "-p4"]),
    st.sampled_from(["-rtn", "-gptq", "-smoothquant", "-quarot", "-duquant"]),
).filter(lambda words: words[0] != "w4a16" or not words[3])


@settings(max_examples=40, deadline=None)
@given(names)
def test_every_combination_does_what_its_words_say(words: tuple[str, ...]) -> None:
    bits, group, asym, scales, heads, p, method = words
    found = parts("".join(words))
    act = int(bits.split("a")[1])
    weights = found["quantize_weights"]
    assert isinstance(weights, QuantizeWeights)
    wide = bits in ("w8a8", "w4a4")
    assert weights.symmetric == (wide and not asym)
    assert weights.group_size == {"-g64": 64, "-channel": None, "": None if wide else 128}[group]
    if act == 16:
        assert "quantize_activations" not in found
    else:
        acts = found["quantize_activations"]
        assert isinstance(acts, QuantizeActivations)
        assert (acts.bits, acts.group_size, acts.symmetric) == (act, 32 if scales == "-ag32" else None, not asym)
        assert acts.ranges == (Percentile() if "static" in scales else None)
        assert acts.buckets == (8 if scales == "-static8" else 1)
    if "static" in scales:
        assert found["calibrate"].sampler == ForwardProcess()
    elif "calibrate" in found:
        assert found["calibrate"].sampler == MaskedSimulation()
    assert ("quantize_attention" in found) == bool(heads or p)
    if heads or p:
        attention = found["quantize_attention"]
        assert isinstance(attention, QuantizeAttention)
        width = int(heads[-1]) if heads else None
        assert attention.values == width
        assert attention.keys == (width if "k" in heads else None)
        assert attention.queries == (width if "q" in heads else None)
        assert attention.probabilities == (int(p[-1]) if p else None)
        per = Dynamic("token" if method == "-quarot" else "head", not asym)
        assert attention.v == per
        assert attention.qk == (per if "k" in heads else Dynamic())
    assert ("rotate_qk" in found) == (method in ("-quarot", "-duquant") and "k" in heads)


@pytest.mark.parametrize("name", [name for name in PRESETS if "dllmquant" in name])
def test_dllmquant_has_its_parts_in_their_order(name: str) -> None:
    """Transform, TMAS on the transformed model, IA-AQ, CGQ; methods of the paper, section by section."""
    recipe, found = as_recipe(name), parts(name)
    order = [p.name for p in recipe.passes]
    bits = int(name[3])
    transforms = ["awq_scale", "awq_clip"] if "awq" in name else ["rotate_hidden", "rotate_heads", "rotate_down"]
    last = len(order) - 1 - order[::-1].index("calibrate")
    assert all(order.index(step) < last for step in transforms)
    assert order[last + 1 :] == ["quantize_attention", "quantize_weights", "quantize_activations", "pack", "lower"]
    assert recipe.passes[last] == Calibrate(sampler=Rollout(), weight=Certainty())
    assert Rollout().proportions == (0.3, 0.2, 0.2, 0.3)
    assert (Certainty().visible, Certainty().base, Certainty().slope) == (0.7, 0.0, 1.0)
    attention = found["quantize_attention"]
    assert isinstance(attention, QuantizeAttention)
    assert attention.v == IaAq()
    assert attention.values == bits
    assert attention.keys == (4 if "kv4" in name else None)
    assert attention.queries is attention.probabilities is None
    assert ("rotate_qk" in order) == ("kv4" in name)
    weights = found["quantize_weights"]
    assert (weights.bits, weights.group_size, weights.symmetric) == (bits, None, True)
    assert isinstance(weights.method, Gptq)
    assert found["quantize_activations"] == QuantizeActivations(bits)
    if "awq" in name:
        assert order[0] == "calibrate"  # AWQ looks at states, too
        assert recipe.passes[0] == Calibrate(sampler=Rollout(), weight=Uniform())


def test_samplers_by_name_go_with_fixed_ranges() -> None:
    assert parts("w8a8-static4-rtn-tmas")["calibrate"].sampler == Rollout()
    assert parts("w8a8-static-rtn-cgq")["calibrate"].weight == Certainty()


def test_descriptions_name_what_the_words_say() -> None:
    for name, words in PRESETS.items():
        for word in filter(WORDS.fullmatch, name.split("-")[1:]):
            said = {
                "static": "fixed activation ranges",
                "static4": "each of four mask ratios",
                "ag128": "groups of 128",
                "asym": "zero points",
                "kv4": "4-bit keys",
                "qkv4": "4-bit queries, keys and values",
                "qkv8": "all that attention reads in 8 bits",
                "p8": "all that attention reads in 8 bits",
            }[word]
            assert said in words, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a16-static-gptq", "-static is about activations of fewer than 16 bits. Write a8 or a4, or leave it out"),
        ("w4a16-ag64-gptq", "-ag64 is about activations of fewer than 16 bits. Write a8 or a4, or leave it out"),
        ("w8a8-rtn-tmas", "-tmas goes with gptq, gptaq, autoround, lqer and fixed ranges only. Use 'w8a8-rtn'"),
        ("w4a4-quarot-awq", "-awq goes with dllmquant only. Use 'w4a4-quarot'"),
        (
            "w4a16-dllmquant",
            "DLLMQuant is about activations of fewer than 16 bits. Use w8a8-dllmquant, or w4a16-gptq-tmas-cgq",
        ),
        ("w4a4-dllmquant-rtn", "dllmquant brings its own states and rounding, there is no -rtn. Use 'w4a4-dllmquant'"),
        ("w8a8-static999-rtn", "quantize_activations.buckets: 999 mask-ratio buckets are not 1 to 256. 4 is usual"),
    ],
)
def test_names_that_make_no_sense(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        as_recipe(name)
    assert str(caught.value).removeprefix(f"{name}: ") == message
