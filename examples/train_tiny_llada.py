"""Train a small masked diffusion language model of LLaDA's architecture, from a folder of text.

    python examples/train_tiny_llada.py texts/ out/ --steps 2000
    python examples/train_tiny_llada.py texts/ out/ --minutes 80       # run it again after an interruption: it resumes

`texts/` holds .txt files; a line `<|doc|>` separates documents. `out/` becomes a Hugging Face folder in LLaDA's names
(config.json, model.safetensors, tokenizer.json), which `dlqc.load_model` reads, and a checkpoint that goes with it.

Loss (LLaDA, arXiv 2502.09992, eq. 3): t ~ U(0, 1) for each row, every token masked with probability t, cross-entropy at
masked tokens divided by t, averaged over the tokens that may be masked. All noise and the choice of data derive from
(seed, step): a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dlqc.diffusion.masking import apply_mask, bernoulli_mask, generator, logits_of, stratified_t
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.diffusion.tasks import TASKS, make_items, pack
from dlqc.errors import ArtifactError, DlqcError, FeasibilityError
from dlqc.models.llada import LLaDAConfig, LLaDAModelLM

NAMES = "startoftext endoftext start_header_id end_header_id eot_id reserved_0 reserved_1 mdm_mask"
SPECIALS = [f"<|{name}|>" for name in NAMES.split()]
SEPARATOR = "\n<|doc|>\n"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Size:
    """Shape of the model; part of the checkpoint, so that a resume with another shape is refused."""

    vocab: int
    d_model: int
    layers: int
    heads: int
    ffn: int
    length: int


@dataclass
class Clock:
    """What a run has used so far; goes with the checkpoint."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def progress(self, steps: int, minutes: float) -> float:
        """Share of the run that is done, by wall-clock time where minutes are given, else by steps."""
        return min(1.0, self.seconds / (60 * minutes) if minutes else self.step / steps)


def train_tokenizer(documents: list[str], vocab: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit a token of its own; the eight special tokens have the last ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    questions = [item.prompt + item.answer for item in make_items(3000, seed=0, split="train")]
    core.train_from_iterator(documents + questions, trainer)
    core.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mdm_mask|>",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def untrained(size: Size, tokenizer: Any, seed: int) -> LLaDAModelLM:
    """Weights of std 0.02; what writes to the residual stream is divided by sqrt(2 * layers)."""
    config = LLaDAConfig(
        d_model=size.d_model,
        n_layers=size.layers,
        n_heads=size.heads,
        mlp_hidden_size=size.ffn,
        vocab_size=len(tokenizer),
        max_sequence_length=2 * size.length,
        rope_theta=10000.0,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LLaDAModelLM"],
        init_std=0.02,
    )
    torch.manual_seed(seed)
    model = LLaDAModelLM(config)
    with torch.no_grad():
        for block in model.model.transformer["blocks"]:
            block.attn_out.weight /= math.sqrt(2 * size.layers)
            block.ff_out.weight /= math.sqrt(2 * size.layers)
    return model


def replace(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside the old one, then put it in its place: an interruption leaves one of the two whole."""
    fresh = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, fresh, {"format": "pt", **metadata})
    os.replace(fresh, path)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, size: Size, clock: Clock) -> None:
    """Parameters, both moments of each, and the clock, in one safetensors file."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    replace(path, tensors, {"size": json.dumps(asdict(size)), "clock": json.dumps(asdict(clock))})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, size: Size) -> Clock:
    """Continue where `save_checkpoint` stopped; another shape of model is refused."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["size"]) != asdict(size):
        raise ArtifactError(
            f"the checkpoint is of {metadata['size']}", where=str(path), remedy="Use its sizes, or another folder"
        )
    clock, tensors = Clock(**json.loads(metadata["clock"])), load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(clock.step)), **moments}
    return clock


def draw_rows(
    stream: Tensor, task_rows: Tensor, task_slots: Tensor, batch: int, share: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch [B, L] and what may be masked in it; in three quarters of the task rows, the answers alone."""
    length = task_rows.shape[1]
    starts = torch.randint(0, stream.numel() - length + 1, (batch,), generator=rng)
    rows = stream[starts[:, None] + torch.arange(length)]
    maskable = torch.ones_like(rows, dtype=torch.bool)
    tasks = (torch.rand(batch, generator=rng) < share).nonzero().flatten()
    chosen = torch.randint(0, len(task_rows), tasks.shape, generator=rng)
    rows[tasks] = task_rows[chosen]
    maskable[tasks] = task_slots[chosen] | (torch.rand(tasks.shape, generator=rng) < 0.25)[:, None]
    if torch.rand((), generator=rng) < 0.01:
        cut = int(torch.randint(min(16, length), length + 1, (), generator=rng))
        if bool(maskable[:, :cut].any(1).all()):
            return rows[:, :cut], maskable[:, :cut]
    return rows, maskable


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up over 2 %, stable, linear decay to 2 % of the peak over the last quarter."""
    return peak * min(1.0, max(progress, 1e-3) / 0.02, max(0.02, 1 - 0.98 * (progress - 0.75) / 0.25))


def main(
    data: Annotated[Path, typer.Argument(help="folder of .txt files")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    steps: Annotated[int, typer.Option(help="length of the run in steps")] = 2000,
    minutes: Annotated[float, typer.Option(help="length of the run in minutes, instead of steps")] = 0.0,
    d_model: int = 256,
    layers: int = 4,
    heads: int = 4,
    ffn: int = 768,
    vocab: int = 2048,
    length: Annotated[int, typer.Option(help="tokens a row")] = 256,
    batch: Annotated[int, typer.Option(help="rows a step")] = 32,
    lr: float = 1.5e-3,
    tasks: Annotated[float, typer.Option(help="share of rows with generated tasks, 0 to 1")] = 0.4,
    task_items: Annotated[int, typer.Option(help="questions made for each task")] = 5000,
    ramp: Annotated[bool, typer.Option(help="start with few masks: t below 0.3, all from 44 % of the run on")] = True,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast")] = True,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 200,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Train, or continue a run that was interrupted."""
    console, size = Console(), Size(vocab, d_model, layers, heads, ffn, length)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    documents = [d for file in sorted(data.glob("*.txt")) for d in file.read_text("utf-8").split(SEPARATOR) if d]
    if not documents:
        raise FeasibilityError("the folder has no text", where=str(data), remedy="Give a folder of .txt files")
    resumed = (out / CHECKPOINT).exists()
    if not resumed:
        train_tokenizer(documents, vocab, model_max_length=2 * length).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    spec = DiffusionSpec(tokenizer.mask_token_id, len(tokenizer), 2 * length, tokenizer.eos_token_id)
    ids = [t for d in documents for t in [*tokenizer.backend_tokenizer.encode(d).ids, tokenizer.eos_token_id]]
    if len(ids) < length:
        raise FeasibilityError(f"the text has {len(ids)} tokens", where=str(data), remedy=f"Give at least {length}")
    stream = torch.tensor(ids)
    questions = [make_items(task_items, seed=seed, split="train", tasks=(name,)) for name in TASKS]
    packed = [pack(items, tokenizer, length=length) for items in questions]
    task_rows, task_slots = torch.cat([p.ids for p in packed]), torch.cat([p.slots for p in packed])

    model = untrained(size, tokenizer, seed).to(target)
    kinds = [([p for p in model.parameters() if (p.ndim > 1) == matrix], 0.1 * matrix) for matrix in (True, False)]
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in kinds]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    clock = load_checkpoint(out / CHECKPOINT, model, optimizer, size) if resumed else Clock()
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {target}, from step {clock.step}")

    with Progress(console=console) as bar:
        shown, mean = bar.add_task("loss", total=1.0), math.nan
        while (progress := clock.progress(steps, minutes)) < 1:
            begun, rng = time.perf_counter(), generator(seed, "step", clock.step)
            rows, maskable = draw_rows(stream, task_rows, task_slots, batch, tasks, rng)
            t = stratified_t(len(rows), rng, high=min(1.0, 0.3 + 1.6 * progress) if ramp else 1.0)
            masked = bernoulli_mask(maskable, t, rng)
            state, hidden = apply_mask(rows, masked, spec.mask_id).to(target), masked.to(target)
            with torch.autocast(target.type, torch.bfloat16, enabled=bf16):
                logits = logits_of(model, state, spec)[hidden]
            ce = nn.functional.cross_entropy(logits.float(), rows[masked].to(target), reduction="none")
            weight = masked / t[:, None] / maskable.sum(1, keepdim=True) / len(rows)
            loss = (ce * weight[masked].float().to(target)).sum()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(lr, progress)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
            clock.step, clock.tokens = clock.step + 1, clock.tokens + rows.numel()
            clock.seconds += time.perf_counter() - begun
            bar.update(shown, completed=clock.progress(steps, minutes), description=f"loss {mean:.3f}")
            if clock.step % save_every == 0:
                save_checkpoint(out / CHECKPOINT, model, optimizer, size, clock)
    save_checkpoint(out / CHECKPOINT, model, optimizer, size, clock)
    replace(out / "model.safetensors", {n: p.to(torch.bfloat16) for n, p in model.state_dict().items()}, {})
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(out)
    console.print(f"{out}: {clock.step} steps, {clock.tokens:,} tokens, {clock.seconds:.0f} s")


if __name__ == "__main__":
    try:
        typer.run(main)
    except DlqcError as error:
        Console(stderr=True).print(f"[red]error[/red] {error}")
        raise SystemExit(1) from None
