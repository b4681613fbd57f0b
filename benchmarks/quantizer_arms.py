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
        "GPTQ, true-sequential": f"calibrate, quantize_weights(bits={bits}, sequential='layer'), pack, lower",
        "GPTAQ": f"{scheme}-gptaq",
        "HQQ": f"{scheme}-hqq",
        "AutoRound": f"{scheme}-autoround",
        "GPTQ, rank 16 (LQER)": f"{scheme}-lqer",
        "nearest, bias correction (ICQBC)": f"{scheme}-icqbc",
        "k-means, groups of 128": f"calibrate, {tables}, lower",
    }


ARMS: dict[str, dict[str, str]] = {
    "W4": {
        **weight_only(4),
        "NF4": "w4a16-nf4",
        "MXFP4": "w4a16-mxfp4",
        "NVFP4": "w4a16-nvfp4",
        "SqueezeLLM": "w4a16-squeezellm",
        "mixed 2 to 8 bits, 4 on average": "w4a16-mixed-gptq",
        "SparseGPT 50 %, GPTQ": "w4a16-sparsegpt",
        "Wanda 50 %, nearest": "w4a16-wanda-rtn",
        "embedding and head in 8 bits, GPTQ": "w4a16-gptq-e8h8",
        "embedding and head in 4 bits, GPTQ": "w4a16-gptq-e4h4",
    },
    "W3": {
        **weight_only(3),
        "SqueezeLLM": "w3a16-squeezellm",
        "mixed 2 to 8 bits, 3.2 on average": "w3.2a16-mixed-gptq",
    },
    "W2": {
        **weight_only(2),
        "mixed 2 to 8 bits, 2.5 on average": "w2.5a16-mixed-gptq",
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
        "AutoRound": "w4a4-autoround",
        "nearest, bias correction (ICQBC)": "w4a4-icqbc",
        "QuaRot, activations in groups of 128": "w4a4-ag128-quarot",
        "QuaRot, KV4": "w4a4-kv4-quarot",
        "SmoothQuant, QKV4 (QDLM)": "w4a4-asym-qkv4-smoothquant",
        "DuQuant, QKV4 (QDLM)": "w4a4-asym-qkv4-duquant",
        "DLLMQuant on QuaRot": "w4a4-dllmquant",
        "DLLMQuant on AWQ": "w4a4-dllmquant-awq",
    },
    "W8A8": {
        "nearest": "w8a8-rtn",
        "SmoothQuant": "w8a8-smoothquant",
        "AWQ": "w8a8-awq",
        "GPTQ": "w8a8-gptq",
        "QuaRot": "w8a8-quarot",
        "DuQuant": "w8a8-duquant",
        "DLLMQuant on QuaRot": "w8a8-dllmquant",
        "LLM.int8()": "w8a8-llmint8",
        "nearest, fixed ranges": "w8a8-static-rtn",
        "nearest, fixed ranges for 4 mask ratios": "w8a8-static4-rtn",
        "SmoothQuant, fixed ranges for 4 mask ratios": "w8a8-static4-smoothquant",
        "SmoothQuant, QKVP8": "w8a8-qkv8-p8-smoothquant",
        "FP8 weights, activations as they are": "w8a16-fp8",
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
    *((s, "GPTQ", "GPTAQ", "GPTAQ") for s in ("W4", "W3", "W2")),
    *((s, "nearest", "HQQ", "HQQ") for s in ("W4", "W3", "W2")),
    *((s, "GPTQ", "AutoRound", "AutoRound") for s in ("W4", "W3", "W2")),
    *((s, "nearest", "nearest, bias correction (ICQBC)", "ICQBC") for s in ("W4", "W3", "W2", "W4A4")),
    *((s, "GPTQ", "GPTQ, rank 16 (LQER)", "LQER") for s in ("W4", "W3", "W2")),
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
    ("W4A4", "AWQ", "DLLMQuant on AWQ", "DLLMQuant"),
    ("W4A4", "QuaRot", "DLLMQuant on QuaRot", "DLLMQuant"),
    ("W4A4", "QuaRot", "QuaRot, activations in groups of 128", "reused-cache study"),
    ("W8A8", "nearest", "SmoothQuant", "SmoothQuant"),
    ("W8A8", "nearest", "LLM.int8()", "LLM.int8()"),
)
