"""What `quantizers.py` compares: arms by scheme, and orderings that were published."""

from __future__ import annotations

MODELS = ("tiny-llada", "tiny-llada, outlier twin", "rxnmapper ALBERT")

ROTATED = (
    "fold_norm_scale(untie=True), rotate_hidden, rotate_heads(across=True), rotate_down(required=False), calibrate"
)


def weight_only(bits: int) -> dict[str, str]:
    """Arms that differ in the width alone; groups of 128 with zero points."""
    scheme = f"w{bits}a16"
    end = f"quantize_weights(bits={bits}), pack, lower"
    tables = f"quantize_weights(format=codebook(bits={bits}, group_size=128), method=kmeans)"
    return {
        "nearest": f"{scheme}-rtn",
        "SmoothQuant": f"{scheme}-smooth",
        "AWQ": f"{scheme}-awq",
        "GPTQ, clean text": f"{scheme}-gptq-clean",
        "GPTQ": f"{scheme}-gptq",
        "GPTQ, CGQ": f"{scheme}-gptq-cgq",
        "GPTQ, TMAS": f"{scheme}-gptq-tmas",
        "GPTQ, TMAS and CGQ": f"{scheme}-gptq-tmas-cgq",
        "GPTQ, early states": f"calibrate(sampler=masked_simulation(emphasis='early')), {end}",
        "GPTQ, late states": f"calibrate(sampler=masked_simulation(emphasis='late')), {end}",
        "GPTQ, frontier weights": f"calibrate(weight=frontier), {end}",
        "GPTQ after QuaRot": f"{ROTATED}, {end}",
        "k-means, groups of 128": f"calibrate, {tables}, lower",
    }


ARMS: dict[str, dict[str, str]] = {
    "W4": {
        **weight_only(4),
        "NF4": "w4a16-nf4",
        "MXFP4": "w4a16-mxfp4",
        "NVFP4": "w4a16-nvfp4",
        "SqueezeLLM": "calibrate, quantize_weights(format=codebook(bits=4, sparse=0.0045), method=kmeans), lower",
    },
    "W3": {**weight_only(3), "SqueezeLLM": "w3a16-squeezellm"},
    "W2": {
        **weight_only(2),
        "Quant-dLLM (DAQ and ABMP as published)": "w2a16-quant-dllm",
        "DAQ": "w2a16-daq",
        "DAQ and ABMP": "calibrate, quantize_weights(format=planes, method=daq(share=0.05)), lower",
        "DAQ after QuaRot": f"{ROTATED}, quantize_weights(format=planes, method=daq), lower",
        "E8P, LDLQ alone": "calibrate, quantize_weights(format=lattice, method=ldlq(sweeps=0)), lower",
        "E8P": "w2a16-e8p",
        "E8P, groups of 64": "calibrate, quantize_weights(format=lattice(group_size=64), method=ldlq), lower",
        "E8P after QuaRot, LDLQ alone": f"{ROTATED}, quantize_weights(format=lattice, method=ldlq(sweeps=0)), lower",
        "E8P after QuaRot": "w2a16-quip",
        "E8P after QuaRot, groups of 64": f"{ROTATED}, quantize_weights(format=lattice(group_size=64), method=ldlq), lower",
    },
    "W4A4": {
        "nearest": "w4a4-rtn",
        "SmoothQuant": "w4a4-smoothquant",
        "AWQ": "w4a4-awq",
        "QuaRot": "w4a4-quarot",
        "SpinQuant": "w4a4-spinquant",
        "FlatQuant": "w4a4-flatquant",
        "DuQuant": "w4a4-duquant",
    },
    "W8A8": {
        "nearest": "w8a8-rtn",
        "SmoothQuant": "w8a8-smoothquant",
        "AWQ": "w8a8-awq",
        "GPTQ": "w8a8-gptq",
        "QuaRot": "w8a8-quarot",
        "DuQuant": "w8a8-duquant",
        "FP8 weights": "w8a16-fp8",
    },
}

#: (scheme, first arm, second arm, who reports that the second is better)
CLAIMS: tuple[tuple[str, str, str, str], ...] = (
    *((s, "AWQ", "GPTQ", "QDLM on LLaDA") for s in ("W4", "W3")),
    *((s, "nearest", "AWQ", "AWQ") for s in ("W4", "W3", "W2")),
    *((s, "GPTQ, clean text", "GPTQ", "Quant-dLLM (MCS)") for s in ("W4", "W3", "W2")),
    *((s, "GPTQ", "GPTQ, CGQ", "DLLMQuant") for s in ("W4", "W3", "W2")),
    *((s, "GPTQ", "GPTQ, TMAS", "DLLMQuant") for s in ("W4", "W3", "W2")),
    *((s, "GPTQ", "GPTQ, frontier weights", "FAIR-Calib") for s in ("W4", "W3", "W2")),
    ("W4", "nearest", "NF4", "QLoRA"),
    ("W4", "MXFP4", "NVFP4", "NVIDIA"),
    ("W3", "GPTQ", "SqueezeLLM", "SqueezeLLM"),
    ("W2", "GPTQ", "Quant-dLLM (DAQ and ABMP as published)", "Quant-dLLM"),
    ("W2", "DAQ", "DAQ and ABMP", "Quant-dLLM (ABMP)"),
    ("W2", "GPTQ", "DAQ and ABMP", "Quant-dLLM, with the steps beyond the paper"),
    ("W2", "DAQ", "E8P", "lattices over sums of planes (Gaussian bounds)"),
    ("W2", "DAQ after QuaRot", "E8P after QuaRot, groups of 64", "lattices over sums of planes (Gaussian bounds)"),
    ("W2", "E8P, LDLQ alone", "E8P after QuaRot, LDLQ alone", "QuIP# (incoherence)"),
    ("W4A4", "nearest", "SmoothQuant", "QDLM"),
    ("W4A4", "SmoothQuant", "QuaRot", "QDLM"),
    ("W4A4", "QuaRot", "DuQuant", "QDLM"),
    ("W4A4", "QuaRot", "SpinQuant", "SpinQuant"),
    ("W4A4", "QuaRot", "FlatQuant", "FlatQuant"),
    ("W4A4", "AWQ", "QuaRot", "STaR-Quant's table"),
    ("W8A8", "nearest", "SmoothQuant", "SmoothQuant"),
)
