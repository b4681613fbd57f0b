"""The main job on the bundled model: compile to w4a16-gptq with masked calibration, measure, save, reload, export.

Run it:  make demo      or      python examples/demo.py [folder]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

import dlqc
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.evaluate import bundled_text, comparison_table, evaluate, rows_to_measure
from dlqc.models.describe import spec_of

ROWS = 48  # rows of 128 tokens of the evaluation tales
ITEMS = 40  # items per task
PROMPT = "Once upon a time there was a"

screen = Console(soft_wrap=True)


def main(folder: Path) -> None:
    started = time.perf_counter()
    model = dlqc.load_model("tiny-llada")
    spec: DiffusionSpec = spec_of(model)
    tokenizer = dlqc.load_tokenizer(model)

    screen.rule("compile tiny-llada to w4a16-gptq, calibrated on masked states of the bundled calibration tales")
    compiled = dlqc.compile(model, passes="w4a16-gptq", calibration=bundled_text("calib"))
    screen.print(compiled.explain(), highlight=False, markup=False)

    screen.rule("quality on the bundled evaluation tales and the generated tasks, before and after, 95 % intervals")
    original = dlqc.compile(model, passes=(), progress=False)  # the captured graph, no passes: the same arithmetic
    rows = rows_to_measure(tokenizer, spec)[:ROWS]
    options = {"tokenizer": tokenizer, "task_items": ITEMS}
    before = evaluate(original, rows, spec, **options)
    after = evaluate(compiled, rows, spec, reference=original, baseline=before, **options)
    screen.print(comparison_table({"tiny-llada": before, "w4a16-gptq": after}))

    screen.rule("generated text (64 tokens, 64 steps, greedy)")
    for name, each in (("tiny-llada", original), ("w4a16-gptq", compiled)):
        made = dlqc.generate(each, PROMPT, tokenizer=tokenizer, spec=spec, gen_length=64, steps=64, block_length=16)
        screen.print(f"{name}: {PROMPT}{made.text!s}", highlight=False, markup=False)
        screen.print(f"  {made.nfe} forwards, {made.tokens_per_forward:.2f} tokens per forward, {made.seconds:.2f} s")

    screen.rule("save, reload in a fresh process, export")
    saved = compiled.save(folder / "artifact")
    exported = dlqc.export(compiled, folder / "compressed-tensors", format="compressed-tensors")
    for name, size in saved.files.items():
        screen.print(f"  artifact/{name}: {size:,} bytes", highlight=False)
    for name, size in exported.items():
        screen.print(f"  compressed-tensors/{name}: {size:,} bytes", highlight=False)
    screen.print(f"reloaded in a fresh process: largest relative deviation of the logits {saved.reload_deviation:.1e}")
    again = dlqc.load(folder / "artifact")
    screen.print(f"loaded here: {again.report.storage.bits_per_weight:.3f} bits per weight, everything counted")
    screen.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
