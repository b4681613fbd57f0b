"""Which layer made a number that is not finite: one more run, watched from inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dlqc.execute import placeholder
from dlqc.graph import SDPA, is_call


def first_not_finite(model: object, ids: Tensor) -> str | None:
    """The first layer whose result on ids [B, L] holds NaN or infinity; None where a plain run finds none.

    Args:
        model: what `dlqc.compile` made (its graph is walked), a module (its submodules are watched), or anything else (None).
    """
    graph = getattr(model, "module", None)
    if isinstance(graph, fx.GraphModule):
        return _in_graph(graph, ids)
    return _in_modules(model, ids) if isinstance(model, nn.Module) else None


def _in_graph(module: fx.GraphModule, ids: Tensor) -> str | None:
    class Watch(fx.Interpreter):
        found: str | None = None

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            # Masks hold infinities on purpose.
            ours = n.op == "call_function" and not all(
                is_call(user, SDPA) and user.args[3:4] == (n,) for user in n.users
            )
            if self.found is None and ours and n in tokens and _bad(value):
                stack = n.meta.get("nn_module_stack") or {}
                # The first part is the shell that capture puts around a model.
                self.found = str(list(stack.values())[-1][0]).removeprefix("model.") if stack else n.name
            return value

    from dlqc.cached import reads_tokens

    tokens = reads_tokens(module.graph, placeholder(module.graph))
    watch = Watch(module)
    with torch.no_grad():
        watch.run(ids)
    return watch.found


def _in_modules(model: nn.Module, ids: Tensor) -> str | None:
    found: list[str] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: found.append(name) if _bad(out) else None)
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
