"""GPTQ of other packages on given weights and Hessians, for `gptq_block.py --peers`. Each is called by its own function.

    llmcompressor   `quantize_weight` on the batch of linears that have the same shape and input, as its pipeline calls it;
                    scales by compressed-tensors' minmax
    gptqmodel       `GPTQ(module, config).quantize()`, linear after linear, its Hessian set

All with the settings of the benchmark: symmetric groups, scales fixed before rounding, columns by falling diagonal, damping of
1 %, blocks of 128 columns. They want torch, transformers and what their packages need, in an environment of their own.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

Peer = Callable[[list[torch.Tensor], torch.Tensor, int, int], Callable[[], list[torch.Tensor]]]


def llmcompressor(weights: list[torch.Tensor], hessian: torch.Tensor, bits: int, group: int) -> Any:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(num_bits=bits, group_size=group, strategy="group", symmetric=True, actorder="weight")
    stacked = torch.stack(weights)
    hessians = hessian.float().unsqueeze(0).repeat(len(weights), 1, 1)  # it takes one each, and overwrites them

    def run() -> list[torch.Tensor]:
        least, most = torch.aminmax(stacked.unflatten(-1, (-1, group)), dim=-1)
        scale, zero = calculate_qparams(least, most, args)
        found, _, failed = quantize_weight(stacked.clone(), hessians, scale, zero, None, args, 128, 0.01)
        if bool(failed.any()):
            raise RuntimeError("llmcompressor fell back to rounding to nearest")
        return list(found)

    return run


def gptqmodel(weights: list[torch.Tensor], hessian: torch.Tensor, bits: int, group: int) -> Any:
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=bits,
        group_size=group,
        sym=True,
        desc_act=True,
        static_groups=True,
        act_group_aware=False,
        damp_percent=0.01,
        fallback=None,
    )
    tasks = []
    for weight in weights:
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight.data = weight
        task = GPTQ(module, config)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples, task._hessian_total_samples = hessian.float().clone(), 1, 1
        tasks.append(task)

    def run() -> list[torch.Tensor]:
        return [task.quantize(blocksize=128)[0].float() for task in tasks]

    return run


PEERS: dict[str, Peer] = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel}


def version(name: str) -> str:
    return importlib.metadata.version(name)
