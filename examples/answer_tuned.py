"""Tune tiny-llada on answers: what instruction tuning is to a large model, small enough for one core and three minutes.

    python examples/answer_tuned.py build/answer-tuned

Rows hold generated questions of the training split (`dlqc.diffusion.tasks`); only answers are masked and only they count in the
loss, as LLaDA tunes on pairs of prompt and response (Nie et al., arXiv 2502.09992, section 2.3 and Algorithm 2): t ~ U(0, 1) for
each row, answers masked with probability t, cross-entropy at masked tokens over t. The folder is one of Hugging Face in LLaDA's
names, beside the model it came from in all but the weights; `examples/study.yaml` compares the two.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

import dlqc
from dlqc.diffusion.masking import apply_mask, bernoulli_mask, generator, logits_of, stratified_t
from dlqc.diffusion.tasks import TASKS, make_items, pack
from dlqc.errors import DlqcError
from dlqc.models.describe import spec_of


def main(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    steps: int = 100,
    batch: Annotated[int, typer.Option(help="rows a step")] = 8,
    length: Annotated[int, typer.Option(help="tokens a row")] = 256,
    lr: float = 3e-4,
    items: Annotated[int, typer.Option(help="questions made for each task")] = 3000,
    seed: int = 0,
) -> None:
    """Tune, and write the folder."""
    console, started = Console(), time.perf_counter()
    model = dlqc.load_model("tiny-llada").float().requires_grad_(True)
    tokenizer, spec = dlqc.load_tokenizer(model), spec_of(model)
    packed = [
        pack(make_items(items, seed=seed, split="train", tasks=(name,)), tokenizer, length=length) for name in TASKS
    ]
    rows, slots = torch.cat([p.ids for p in packed]), torch.cat([p.slots for p in packed])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    mean = 0.0
    for step in range(steps):
        rng = generator(seed, "answers", step)
        chosen = torch.randint(0, len(rows), (batch,), generator=rng)
        t = stratified_t(batch, rng)
        masked = bernoulli_mask(slots[chosen], t, rng)
        logits = logits_of(model, apply_mask(rows[chosen], masked, spec.mask_id), spec)[masked]
        ce = torch.nn.functional.cross_entropy(logits.float(), rows[chosen][masked], reduction="none")
        weight = masked / t[:, None] / slots[chosen].sum(1, keepdim=True) / batch
        loss = (ce * weight[masked].float()).sum()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean += float(loss.detach()) / min(10, steps)
        if (step + 1) % 10 == 0 or step + 1 == steps:
            console.print(f"step {step + 1}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s")
            mean = 0.0
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except DlqcError as error:
        Console(stderr=True).print(f"[red]error[/red] {error}")
        raise SystemExit(1) from None
