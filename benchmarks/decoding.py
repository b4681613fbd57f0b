"""Decode with tiny-llada in every way: tokens per second, forwards, tokens per forward, and task accuracy beside them.

    python benchmarks/decoding.py --out docs/results/decoding.json                                # all: some minutes
    python benchmarks/decoding.py --out smoke.json --prompts 2 --repeats 1 --items 2 --length 32  # a look: under a minute

Every model (float32 and quantized) decodes the same prompts, beginnings of the bundled evaluation tales, in every way, one prompt
at a time. One run measures all, in turn, `repeats` times over, so that a slow minute of the machine falls on all alike; seconds
are those of a pass over all prompts, and ratios are those of medians. `threshold` commits what is surer than it, the others one
token a step. Accuracy is exact match on generated questions, each after three solved ones, decoded in the same way.

Tales hold few tokens that the bundled model is sure of, so `threshold` is lower than the 0.9 that large models use.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer

import dlqc
from dlqc.compiled import Compiled
from dlqc.diffusion.intervals import Interval, wilson
from dlqc.diffusion.registry import as_sampler, sampler_text
from dlqc.diffusion.tasks import END, PAD, TASKS, make_items
from dlqc.evaluate import bundled_text, rows_to_measure

MODELS = {"float32": (), "W4A16 GPTQ": "w4a16-gptq", "W8A8 RTN": "w8a8-rtn"}
WAYS = {
    "full sequence": "fast_dllm(cache='none', threshold=None)",
    "prefix cache": "fast_dllm(cache='prefix', threshold=None)",
    "dual cache": "fast_dllm(cache='dual', threshold=None)",
    "full sequence, threshold": "fast_dllm(cache='none')",
    "prefix cache, threshold": "fast_dllm(cache='prefix')",
    "dual cache, threshold": "fast_dllm(cache='dual')",
}
#: Tokens that an answer may take: the widest has six, and the end.
ANSWER = 8


def options(way: str, threshold: float) -> dict[str, float]:
    return {"threshold": threshold} if "threshold" in way else {}


def decode(
    model: Compiled, way: str, prompts: torch.Tensor, length: int, block: int, threshold: float
) -> dict[str, float]:
    """One pass over the prompts [N, P]: seconds, forwards and tokens, all prompts together."""
    sampler = as_sampler(WAYS[way], model.spec, {"gen_length": length, "block_length": block} | options(way, threshold))
    seconds = nfe = tokens = computed = 0.0
    for prompt in prompts:
        started = time.perf_counter()
        result = sampler.run(model, prompt[None], model.spec, seed=0)
        seconds += time.perf_counter() - started
        nfe, tokens, computed = nfe + result.nfe, tokens + length, computed + result.computed
    return {"seconds": seconds, "nfe": nfe, "tokens": tokens, "positions": computed}


def accuracy(model: Compiled, way: str, items: int, threshold: float) -> tuple[dict[str, Interval], float]:
    """Exact match by task and over all, and the tokens per forward of the answers."""
    words, found, right, forwards = model.tokenizer, {}, 0, 0
    ends = {words.encode(token, add_special_tokens=False)[0] for token in (PAD, END)}
    for task in TASKS:
        shown = make_items(3, seed=1, split="train", tasks=(task,))
        asked = make_items(items, seed=0, tasks=(task,))
        head = "".join(f"{item.prompt}{item.answer}{END}" for item in shown)
        prompts = [words.encode(head + item.prompt, add_special_tokens=False) for item in asked]
        made = dlqc.generate_batch(
            model, prompts, sampler=WAYS[way], gen_length=ANSWER, block_length=ANSWER, **options(way, threshold)
        )
        good = 0
        for item, answer in zip(asked, made, strict=True):
            stop = next((i for i, token in enumerate(answer.ids) if token in ends), ANSWER)
            forwards += answer.nfe
            good += words.decode(list(answer.ids[:stop])).strip() == item.answer
        found[task] = wilson(good, items)
        right += good
    answers = items * len(TASKS)
    return found | {"all": wilson(right, answers)}, ANSWER * answers / forwards


def plain(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def main(
    out: Annotated[Path, typer.Option(help="JSON to write")],
    prompts: Annotated[int, typer.Option(min=1, help="tales to continue")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="passes over all models and ways")] = 5,
    items: Annotated[int, typer.Option(min=1, help="questions per task")] = 50,
    start: Annotated[int, typer.Option(help="tokens of a prompt")] = 64,
    length: Annotated[int, typer.Option(help="tokens to generate")] = 128,
    block: Annotated[int, typer.Option(help="tokens of a block")] = 32,
    threshold: Annotated[float, typer.Option(help="certainty from which a token is committed")] = 0.5,
) -> None:
    """Measure and write the results."""
    source = dlqc.load_model("tiny-llada")
    text = bundled_text("calib")
    models = {name: dlqc.compile(source, recipe, calibration=text, progress=False) for name, recipe in MODELS.items()}
    spec = models["float32"].spec
    starts = rows_to_measure(dlqc.load_tokenizer(source), spec, length=start)[:prompts]
    for model in models.values():
        decode(model, "dual cache", starts[:1], block, block, threshold)
    measured: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for way in WAYS:
            for name, model in models.items():
                measured.setdefault((name, way), []).append(decode(model, way, starts, length, block, threshold))
    base = statistics.median(m["seconds"] for m in measured["float32", "full sequence"])
    rows: list[dict[str, Any]] = []
    for (name, way), passes in measured.items():
        seconds = [m["seconds"] for m in passes]
        last, middle = passes[-1], statistics.median(seconds)
        scores, rate = accuracy(models[name], way, items, threshold)
        rows.append(
            {
                "model": name,
                "recipe": str(MODELS[name]) or "none",
                "way": way,
                "sampler": sampler_text(as_sampler(WAYS[way], spec, options(way, threshold))),
                "seconds": seconds,
                "tokens_per_second": last["tokens"] / middle,
                "speedup": base / middle,
                "nfe": last["nfe"],
                "tokens_per_forward": last["tokens"] / last["nfe"],
                "positions": last["positions"],
                "accuracy": {task: plain(i) for task, i in scores.items()},
                "answer_tokens_per_forward": rate,
            }
        )
        typer.echo(
            f"{name:11s} {way:26s} {rows[-1]['tokens_per_second']:7.1f} tok/s  x{rows[-1]['speedup']:.2f}  "
            f"{rows[-1]['tokens_per_forward']:.2f} tok/forward  answers: {scores['all'].mean:.2f} right, {rate:.2f} tok/forward"
        )
    result = {
        "command": f"python benchmarks/decoding.py --out {out.name} --prompts {prompts} --repeats {repeats} --items {items} "
        f"--start {start} --length {length} --block {block} --threshold {threshold:g}",
        "machine": machine.facts(),
        "dlqc": dlqc.__version__,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
