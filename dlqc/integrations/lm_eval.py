"""Models of dlqc in EleutherAI's lm-evaluation-harness. Needs lm_eval: `pip install 'dlqc[lm-eval]'`.

    from dlqc.integrations.lm_eval import DiffusionLM, evaluate

    results = evaluate(dlqc.load("out/"), ["arc_challenge", "gsm8k"])          QDLM's shots, masks and lengths
    results = lm_eval.simple_evaluate(DiffusionLM(model), tasks=["piqa"])      one's own

`DiffusionLM(model, **options)` is a `lm_eval.api.model.LM`; its options are those of `dlqc.integrations.harness.Harness`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from dlqc.diffusion.masking import LogitsFn
from dlqc.errors import FeasibilityError
from dlqc.integrations.harness import Harness, protocol_of

__all__ = ["DiffusionLM", "evaluate"]  # noqa: F822  the first is made when it is asked for


def evaluate(
    model: LogitsFn,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    task_manager: Any = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness, each with QDLM's settings where it has some.

    Args:
        model: as for `Harness`.
        tasks: names.
        shots: examples in the prompts; None: QDLM's, the task's own where it has none.
        limit: documents of each task at most.
        task_manager: of lm_eval, for tasks of one's own.
        **options: of `Harness`.

    Returns:
        by task, the metrics of the harness.

    Raises:
        FeasibilityError: lm_eval is not installed.
    """
    need_lm_eval()
    from lm_eval import simple_evaluate

    lm = _lm_class()(model, **options)
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        protocol = protocol_of(task)
        wanted = shots if shots is not None else protocol.shots if protocol else None
        made = simple_evaluate(
            lm, tasks=[task], num_fewshot=wanted, limit=limit, task_manager=task_manager, bootstrap_iters=0
        )
        found |= {name: dict(metrics) for name, metrics in made["results"].items()}
    return found


def need_lm_eval() -> None:
    """Refuse before any work where the harness is missing."""
    if find_spec("lm_eval") is None:
        raise FeasibilityError(
            "lm_eval is not installed", where="lm_eval", remedy="Install it with: pip install 'dlqc[lm-eval]'"
        )


def __getattr__(name: str) -> Any:
    if name == "DiffusionLM":
        return _lm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _lm_class() -> Callable[..., Any]:
    need_lm_eval()
    from lm_eval.api.model import LM

    class DiffusionLM(LM):  # type: ignore[misc]
        """A masked diffusion model for the harness; arguments as of `Harness`."""

        def __init__(self, model: LogitsFn, **options: Any) -> None:
            super().__init__()
            self.harness = Harness(model, **options)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [self.harness.score(r.args[0], r.args[1], r.task_name) for r in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [self.harness.rolling(*request.args) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [self._complete(r.args[0], r.args[1], r.task_name) for r in requests]

        def _complete(self, context: str, wanted: dict[str, Any], task: str | None) -> str:
            until = wanted.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            return self.harness.complete(context, stops, max_tokens=wanted.get("max_gen_toks"), task=task)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text: str = self.harness.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return text

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(self.harness.tokenizer, "name_or_path", "")).replace("/", "__")

    return DiffusionLM
