"""Keys and values of a decoding cache in few bits, on tiny-llada: loss, agreement of trajectories, and bytes.

    python benchmarks/kv_cache.py --out docs/results/kv_cache.json                              # minutes on one core
    python benchmarks/kv_cache.py --out smoke.json --rows 2 --prompts 2 --length 32 --widths 2  # a look

Arms: `quantize_kv` at each width as it is by default, and with one refinement taken away or added: steps of keys around a middle
of each group instead of the channel's mean, a window that is read as stored instead of as computed, masked positions stored as
they are, and at 2 bits no correction of scores. Weights stay in float32. All are measured with a prefix and with a dual cache.

Loss: the text up to a block is known, the block is masked. One refresh stores all keys and values; then a part of the block is
revealed, and the loss of the rest is that of a step from the cache. Trajectories: tales are continued a token a step, and
compared with the same run on an unquantized cache. Intervals are over rows or prompts; differences are paired with the
unquantized cache.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from torch import Tensor

import dlqc
from dlqc.compiled import Compiled
from dlqc.diffusion.intervals import Interval, mean_interval
from dlqc.diffusion.masking import ratio_mask
from dlqc.diffusion.sampler_fast_dllm import Cache, FastDLLMSampler
from dlqc.diffusion.trajectory import Run, record, tabulate
from dlqc.evaluate import rows_to_measure
from dlqc.models.describe import spec_of

#: What is changed of `quantize_kv(keys=b, values=b)`; without options: nothing.
CHANGES = {
    "": "",
    "a middle of each group, keys not centred by channel": "symmetric=False",
    "own window read as stored": "fresh=False",
    "masked positions as they are": "masked=16",
}
ALONE = {"keys alone": "keys={b}, values=None", "values alone": "keys=None, values={b}"}
UNCORRECTED = {"scores not corrected": "correct=False"}
#: Shares of a block that are still masked when the loss is taken.
OPEN = (0.75, 0.5, 0.25)


def arms(widths: tuple[int, ...]) -> dict[str, str]:
    """Name → recipe; the first is the unquantized cache."""
    found = {"float32": ""}
    for b in widths:
        for change, option in (CHANGES | (UNCORRECTED if b == 2 else {})).items():
            parts = [f"keys={b}", f"values={b}", *([option] if option else [])]
            found[f"{b} bits{', ' * bool(change)}{change}"] = f"quantize_kv({', '.join(parts)})"
        for what, option in ALONE.items():
            found[f"{b} bits, {what}"] = f"quantize_kv({option.format(b=b)})"
    return found


@torch.no_grad()
def from_the_cache(model: Compiled, rows: Tensor, cache: str, block: int) -> tuple[Tensor, float]:
    """-log p of the masked tokens of a block, float64 [R], and bytes of the cache for a row; means over blocks and shares."""
    found, held_bytes = torch.zeros(rows.shape[0], dtype=torch.float64), []
    starts = range(block, rows.shape[1] - block, 2 * block)
    for start in starts:
        stop = start + block
        text, known = rows[:, start:stop], rows.clone()
        known[:, start:] = model.spec.mask_id
        for share in OPEN:
            masked = ratio_mask(torch.ones_like(text, dtype=torch.bool), share, 0, start)
            canvas = known.clone()
            canvas[:, start:stop] = text.masked_fill(masked, model.spec.mask_id)
            held = model.cached.new_cache(*rows.shape)
            model.cached.step(known, 0, held)
            end = rows.shape[1] if cache == "prefix" else stop
            log_p = model.cached.step(canvas[:, start:end], start, held)[:, :block].double().log_softmax(-1)
            nll = -log_p.gather(-1, text[..., None])[..., 0]
            found += (nll * masked).sum(1) / masked.sum(1) / (len(OPEN) * len(starts))
            held_bytes.append(held.nbytes / rows.shape[0])
    return found, sum(held_bytes) / len(held_bytes)


def decoded(model: Compiled, prompts: Tensor, cache: Cache, length: int, block: int) -> Run:
    """The prompts continued, a token a step."""
    sampler = FastDLLMSampler(gen_length=length, block_length=block, cache=cache, threshold=None)
    return record(model, list(prompts), model.spec, sampler, seed=0)


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def words(interval: dict[str, float], digits: int = 3) -> str:
    return f"{interval['mean']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Keys and values in few bits",
        "",
        f"Made by `{result['command']}` in {result['seconds']:.0f} s; all numbers are in `kv_cache.json` beside this file.",
        "",
        "tiny-llada in float32; the cache alone is quantized. NLL: nats per masked token of a block that is read from the cache,",
        "paired with the unquantized cache. Flips: generated tokens that differ from those of the unquantized cache. Order:",
        "Kendall's tau of the steps at which positions were committed. Brackets are 95 % intervals over rows or prompts. Bytes:",
        "of a row's cache while the loss was taken, scales included, over those of float32.",
    ]
    for cache in ("prefix", "dual"):
        base = result[cache]["float32"]
        lines += [
            "",
            f"## {cache.capitalize()} cache",
            "",
            f"Unquantized: NLL {words(base['nll'])}, {base['bytes'] / 1024:.0f} KiB a row.",
            "",
            "| keys and values | bytes | NLL, difference | flips | order |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, row in result[cache].items():
            if name != "float32":
                cells = [name, f"{row['bytes'] / base['bytes']:.3f}", words(row["nll_difference"], 4)]
                lines.append(f"| {' | '.join([*cells, words(row['flips']), words(row['kendall'], 2)])} |")
    return "\n".join([*lines, ""])


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a page goes beside it")],
    rows: Annotated[int, typer.Option(min=2, help="rows of 128 tokens that the loss is taken on")] = 32,
    prompts: Annotated[int, typer.Option(min=2, help="tales to continue")] = 16,
    length: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    block: Annotated[int, typer.Option(min=1, help="tokens of a block")] = 32,
    widths: Annotated[str, typer.Option(help="bits, with commas")] = "8,4,3,2",
) -> None:
    """Measure and write the results."""
    started = time.perf_counter()
    source = dlqc.load_model("tiny-llada")
    words_of, spec = dlqc.load_tokenizer(source), spec_of(source)
    measured = rows_to_measure(words_of, spec)[:rows]
    starts = rows_to_measure(words_of, spec, length=64)[:prompts]
    caches: tuple[Cache, ...] = ("prefix", "dual")
    result: dict[str, Any] = {
        "command": f"python benchmarks/kv_cache.py --out docs/results/{out.name} --rows {rows} --prompts {prompts} "
        f"--length {length} --block {block} --widths {widths}",
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
    } | {cache: {} for cache in caches}
    bases: dict[str, tuple[Tensor, Run]] = {}
    for name, recipe in arms(tuple(map(int, widths.split(",")))).items():
        model = dlqc.compile(source, recipe or (), progress=False)
        for cache in caches:
            nll, held = from_the_cache(model, measured, cache, block)
            run = decoded(model, starts, cache, length, block)
            base = bases.setdefault(cache, (nll, run))
            table = tabulate(base[1], run)
            row: dict[str, Any] = {
                "recipe": recipe,
                "bytes": held,
                "nll": plain(mean_interval(nll)),
                "nll_difference": plain(mean_interval(nll - base[0])),
                "flips": plain(mean_interval(table.flips)),
                "kendall": plain(mean_interval(table.kendall)),
                "first_difference": plain(mean_interval(table.first_difference)),
                "identical": table.identical,
            }
            result[cache][name] = row
            typer.echo(
                f"{cache:6s} {name:60s} {words(row['nll_difference'], 4)}  flips {table.flips.mean():.3f}  {held / 1024:.0f} KiB"
            )
    result["seconds"] = time.perf_counter() - started
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
