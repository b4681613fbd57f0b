"""What the commands share: options, the screen, loading, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

screen = Console(soft_wrap=True)

Original = Annotated[str, typer.Argument(help="a model folder, a Hub id, or tiny-llada")]
Source = Annotated[str, typer.Argument(help="a model folder, a Hub id, tiny-llada, or an artifact that dlqc saved")]
Folder = Annotated[Path, typer.Argument(help="an artifact folder that dlqc saved")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Backend = Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda")]
MaskId = Annotated[int | None, typer.Option(help="token id of [MASK], where the model does not tell")]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="a preset, a recipe file, or one line of passes")]
Trust = Annotated[bool, typer.Option(help="run the checkpoint's own Python code")]
Bidirectional = Annotated[bool, typer.Option(help="make a causal decoder see every position")]

SamplerText = Annotated[
    str | None,
    typer.Option("--sampler", "-s", help="such as llada(steps=32) or fast_dllm(cache='dual', threshold=0.8)"),
]


def load_original(source: str, trust_remote_code: bool, bidirectional: bool, meta: bool = False) -> nn.Module:
    from dlqc.models.load import load_model

    both = True if bidirectional else None
    return load_model(source, trust_remote_code=trust_remote_code, bidirectional=both, meta=meta)


def load_any(source: str, backend: str, trust_remote_code: bool = False, bidirectional: bool = False) -> nn.Module:
    """An artifact if the folder holds one, else a model."""
    if (Path(source) / "manifest.json").is_file():
        from dlqc.artifact import load

        return load(source, backend=backend)
    return load_original(source, trust_remote_code, bidirectional)


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, default=str))
