"""A model becomes a graph: `torch.export` on fake tensors, so that no weight is read.

    nn.Module  →  (fx.Graph, Weights)  with one placeholder (token ids [B, L]) and one output (logits [B, L, V])

The module's structure is copied with every parameter replaced by a fake tensor, then exported (non-strict) with batch
and length dynamic. Parameters become `get_attr` nodes that carry the checkpoint's own names; `dlqc.canonical` brings
the graph to the normal form; `verify` compares it with the eager model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dlqc.canonical import canonicalize
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import CaptureError
from dlqc.execute import forward
from dlqc.weights import Constant, Weights

#: Above this many bytes in float32 the eager check runs in the model's own dtype instead.
_CHECK_IN_FLOAT32_BELOW = 2 << 30


@dataclass
class Captured:
    """A captured model: the graph in normal form, its constants, and what canonicalization did."""

    graph: fx.Graph
    weights: Weights
    rewrites: dict[str, int]


class _LogitsOnly(nn.Module):
    """Calls the model with token ids and returns the logits, whatever the model wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return logits_of_output(self.model(input_ids, **call_options(self.model)))


def call_options(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep a Hugging Face forward free of caches, where it takes them."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {"use_cache": False} if "use_cache" in parameters else {}


def logits_of_output(out: Any) -> torch.Tensor:
    """The logits of a model's output: a tensor, an object with `.logits`, or a tuple that begins with them."""
    found = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if found is None and isinstance(out, tuple) and out and isinstance(out[0], torch.Tensor):
        found = out[0]
    if not isinstance(found, torch.Tensor):
        raise CaptureError(
            f"the model returns {type(out).__name__}, which holds no logits",
            where="forward",
            remedy="Return the logits [batch, length, vocabulary] as a tensor or as .logits",
        )
    return found


def capture(model: nn.Module, spec: DiffusionSpec, *, dtype: torch.dtype = torch.float32) -> Captured:
    """Capture a model as a graph in normal form. Reads no weight; works on meta and fake parameters too.

    Args:
        model: takes token ids [B, L], returns logits [B, L, V] (or an object with `.logits`).
        spec: facts of the model; `max_length` bounds the dynamic length.
        dtype: arithmetic of the graph. Weights stay in the checkpoint's dtype and are cast where they are read.

    Raises:
        CaptureError: the model cannot be traced (names the model's source line) or has no token-id input.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    leaves, fakes = _fake_copies(model, mode, dtype)
    shell = _LogitsOnly(_copy(model, fakes))
    with mode:
        ids = torch.zeros(2, min(16, spec.max_length), dtype=torch.int64)
    dims = {0: torch.export.Dim("batch", min=1, max=1 << 16), 1: torch.export.Dim("length", min=2, max=spec.max_length)}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(shell, (ids,), dynamic_shapes=(dims,), strict=False)
            if _changes_in_place(program.graph_module):
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as error:
        raise _explain(error, model) from error
    graph, weights = _lift(program, leaves)
    rewrites = canonicalize(graph, weights)
    return Captured(graph, weights, rewrites)


def _copy(model: nn.Module, fakes: dict[int, torch.Tensor]) -> nn.Module:
    """The model's structure in evaluation mode, with `fakes` in place of its tensors."""
    try:
        with _evaluation_mode(model):
            return copy.deepcopy(model, memo=dict(fakes))
    except Exception as error:  # an attribute's own __deepcopy__ or __reduce__ raises anything
        raise CaptureError(
            f"the model cannot be copied ({type(error).__name__}: {error})",
            where=type(model).__name__,
            remedy="Keep open files, locks and generators out of the module's attributes",
        ) from error


def _changes_in_place(owner: fx.GraphModule) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for module in owner.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if not str(node.target).startswith(("aten.dropout_", "aten.detach_"))
    )


def _fake_copies(
    model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype
) -> tuple[dict[str, Constant], dict[int, torch.Tensor]]:
    """Constants by name (ties joined), and for every tensor of the model a fake one on the CPU in `dtype`."""
    fakes: dict[int, torch.Tensor] = {}
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
        if id(tensor) in fakes:
            continue
        with mode:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            fake: torch.Tensor = torch.empty(tuple(tensor.shape), dtype=kind)
            fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    leaves: dict[str, Constant] = {}
    for key, aliases in names.items():
        constant = Constant(tensors[key].detach(), (), tuple(aliases) if len(aliases) > 1 else ())
        leaves.update(dict.fromkeys(aliases, constant))
    return leaves, fakes


def _lift(program: torch.export.ExportedProgram, leaves: dict[str, Constant]) -> tuple[fx.Graph, Weights]:
    """The exported graph with parameters and constants read by `get_attr` under their checkpoint names."""
    kinds = torch.export.graph_signature.InputKind
    graph = fx.Graph()
    constants: dict[str, Constant] = {}
    env: dict[fx.Node, Any] = {}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for item in program.graph_signature.input_specs:
        node = placeholders[item.arg.name]
        if item.kind is kinds.USER_INPUT or item.target is None:
            env[node] = graph.placeholder("input_ids")
            env[node].meta = {"val": node.meta["val"]}
            continue
        name = item.target.removeprefix("model.")
        constants[name] = leaves[name] if name in leaves else Constant(torch.as_tensor(program.constants[item.target]))
        env[node] = graph.create_node("get_attr", name, name=node.name)
        env[node].meta = {"val": node.meta["val"]}
    # The placeholder comes first: everything else may be read late.
    results = _copy_calls(program.graph_module, graph, env)
    user = torch.export.graph_signature.OutputKind.USER_OUTPUT
    logits = next(r for r, s in zip(results, program.graph_signature.output_specs, strict=True) if s.kind is user)
    _check_logits(logits, next(node for node in graph.nodes if node.op == "placeholder"))
    graph.output(logits)
    return graph, Weights(constants)


def _check_logits(logits: fx.Node, ids: fx.Node) -> None:
    shape, wanted = logits.meta["val"].shape, ids.meta["val"].shape
    if len(shape) != 3 or any(str(a) != str(b) for a, b in zip(shape, wanted, strict=False)):
        names = {str(s): name for s, name in zip(wanted, ("batch", "length"), strict=True)}
        raise CaptureError(
            f"the model returns [{', '.join(names.get(str(s), str(s)) for s in shape)}], which are no logits",
            where="forward",
            remedy="Return the logits [batch, length, vocabulary]",
        )


def _copy_calls(owner: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, Any]) -> Any:
    """Copy calls into `graph`, inlining the sub-graphs that autocast and no_grad regions make; gives the outputs."""
    for node in owner.graph.nodes:
        if node in env:
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], lambda n: env[n])
        if node.op == "get_attr":
            env[node] = getattr(owner, str(node.target))
        elif str(node.target).startswith("wrap_with"):
            at = next(i for i, a in enumerate(node.args) if isinstance(env.get(a), fx.GraphModule))
            inner = env[node.args[at]]
            operands = fx.map_arg(list(node.args[at + 1 :]), lambda n: env[n])
            formals = [n for n in inner.graph.nodes if n.op == "placeholder"]
            env[node] = _copy_calls(inner, graph, dict(zip(formals, operands, strict=True)))
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple | list):
            env[node] = env[node.args[0]][node.args[1]]
        elif any(isinstance(env[a], fx.GraphModule) for a in node.all_input_nodes):
            raise CaptureError(
                f"{node.target} branches or loops over tensors, which a dlqc graph cannot do",
                where=node.name,
                remedy="Replace it by torch.where, or decide it from the configuration",
            )
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])
    return None


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model as it is used: dropout off. Its own flags come back on exit."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's own notes about fake tensors off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(error: Exception, model: nn.Module) -> CaptureError:
    """Name the line of the model's own source at which tracing stopped."""
    library = (str(Path(torch.__file__).parent), __file__, "<", contextlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(library)]
    own = [f for f in frames if f"{os.sep}transformers{os.sep}" not in f.filename] or frames
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else type(model).__name__
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__:
        return CaptureError(
            f"the model branches on the values of a tensor, which a graph cannot do ({first})",
            where=where,
            remedy="Replace the branch by torch.where, or decide it from the configuration",
        )
    limit = _limit(str(error))
    if limit is not None:
        return CaptureError(
            f"the model {limit}, a graph must work at every batch and length up to max_length",
            where=type(model).__name__,
            remedy="Take the sizes from input_ids.shape, or say a smaller max_length in the model's .spec",
        )
    return CaptureError(
        f"torch.export could not trace the model ({type(error).__name__}: {first})",
        where=where,
        remedy="Change that line so that it works on tensors of any batch and length, or load the native class",
    )


def _limit(message: str) -> str | None:
    """What torch.export says about the sizes at which the model works, in few words."""
    fixed = re.search(r"You marked (\w+) as dynamic but your code specialized it", message)
    if fixed:
        return f"works at one {fixed[1]} only"
    guard = re.search(r"satisfy the generated guard (.*)", message)
    if guard is None:
        return None
    sizes = (
        guard[1].rstrip(". ").replace("L['input_ids'].size()[0]", "batch").replace("L['input_ids'].size()[1]", "length")
    )
    return f"works only where {sizes}"


@dataclass(frozen=True)
class CaptureCheck:
    """What the comparison with the eager model saw: shapes and mask ratios tried, worst deviation, its bound."""

    cases: int
    worst: float
    tolerance: float
    dtype: str


def verify(
    model: nn.Module, captured: Captured, spec: DiffusionSpec, *, seed: int = 0, ids: torch.Tensor | None = None
) -> CaptureCheck:
    """Compare the graph with the eager model at several batch sizes, lengths and mask ratios.

    The deviation is max |graph - eager| / max |eager| over all logits. The graph computes as captured. Small models do
    so in float32, where the bound is 1e-4; models too large for a float32 copy in their own dtype, with the bound 3e-2.

    Args:
        ids: token rows [R, L] to take the inputs from; random tokens where None.

    Raises:
        CaptureError: with the case that differs.
    """
    size = sum(p.numel() for p in model.parameters())
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtype = torch.float32 if 4 * size < _CHECK_IN_FLOAT32_BELOW else own
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    cases = _cases(spec, generator, ids)
    eager = _eager(model, dtype)
    for batch in cases:
        expected = eager(batch).float()
        found = forward(captured.graph, captured.weights, batch).float()
        if expected.shape != found.shape:
            raise CaptureError(
                f"the graph returns {list(found.shape)} where the model returns {list(expected.shape)}",
                where=f"input {list(batch.shape)}",
                remedy="Report this model: its capture is wrong",
            )
        if not torch.isfinite(expected).all():
            raise CaptureError(
                "the model itself returns NaN or Inf",
                where=f"input {list(batch.shape)}",
                remedy="Check the weights with dlqc.models.load.check_finite",
            )
        deviation = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        worst = max(worst, deviation)
        if not deviation <= tolerance:
            raise CaptureError(
                f"the graph differs from the eager model by {deviation:.3g} relative, bound {tolerance:g}",
                where=f"input {list(batch.shape)}",
                remedy="The model reads state or shapes that a graph cannot see; report it with its source",
            )
    return CaptureCheck(len(cases), worst, tolerance, str(dtype).removeprefix("torch."))


def _cases(spec: DiffusionSpec, generator: torch.Generator, ids: torch.Tensor | None) -> list[torch.Tensor]:
    shapes: Sequence[tuple[int, int]] = [(1, 2), (1, 7), (2, 33), (3, 64)]
    ratios = (1.0, 0.0, 0.25, 0.75)
    cases = []
    for (batch, length), ratio in zip(shapes, ratios, strict=True):
        length = min(length, spec.max_length)
        rows = _rows(spec, generator, ids, batch, length)
        hidden = torch.rand(rows.shape, generator=generator) < ratio
        cases.append(torch.where(hidden, spec.mask_id, rows))
    return cases


def _rows(
    spec: DiffusionSpec, generator: torch.Generator, ids: torch.Tensor | None, batch: int, length: int
) -> torch.Tensor:
    if ids is not None and ids.shape[0] >= batch and ids.shape[1] >= length:
        return ids[:batch, :length]
    return torch.randint(0, spec.vocab_size, (batch, length), generator=generator)


def _eager(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model as a function of ids, with weights cast to `dtype` for the call and left unchanged."""
    # Buffers are copied: a model may count its calls in one.
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors |= {name: b.detach().clone() for name, b in model.named_buffers()}
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    options = call_options(model)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), _evaluation_mode(model):
            return logits_of_output(torch.func.functional_call(model, cast, (ids,), options))

    return run
