"""What an evaluation harness asks of a language model, answered by a masked diffusion model: likelihoods and completions.

    log p(answer | prompt) ≥ -(1/N) Σ_n (T / k_n) Σ_{i masked in draw n} CE_i        N masks of the answer's T tokens, k_n of them

LLaDA, arXiv 2502.09992, Algorithm 3; counts k_n stratified over 1..T, masks fixed by the seed and the lengths alone, so that
two models are compared on the same ones (`dlqc.diffusion.likelihood`). Logits that are shifted by one (Dream) are shifted back.
An answer of one token needs one mask and is exact.

Settings of tasks are those of QDLM (arXiv 2508.14896, its released scripts): shots, masks, and how text is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlqc.diffusion.denoising import Sampler
from dlqc.diffusion.likelihood import log_likelihood
from dlqc.diffusion.masking import LogitsFn, device_of
from dlqc.diffusion.registry import as_sampler
from dlqc.diffusion.sampler_dream import DreamSampler
from dlqc.diffusion.sampler_llada import LLaDASampler
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import FeasibilityError, ModelError
from dlqc.models.describe import spec_of
from dlqc.models.load import load_tokenizer


@dataclass(frozen=True)
class Protocol:
    """Settings of a task.

    Attributes:
        shots: examples in the prompt.
        mc_num: masks an answer.
        gen_length, block_length: tokens to generate, and of a block, one forward for each token; 0: nothing is generated.
    """

    shots: int = 0
    mc_num: int = 128
    gen_length: int = 0
    block_length: int = 0


#: By the beginning of a task's name, the longest that fits.
QDLM = {
    "piqa": Protocol(),
    "winogrande": Protocol(),
    "arc_": Protocol(),
    "hellaswag": Protocol(),
    "mmlu": Protocol(shots=5, mc_num=1),
    "gsm8k": Protocol(shots=4, gen_length=256, block_length=32),
    "minerva_math": Protocol(gen_length=256, block_length=64),
    "humaneval": Protocol(gen_length=512, block_length=32),
    "mbpp": Protocol(shots=3, gen_length=512, block_length=32),
}


def protocol_of(task: str | None) -> Protocol | None:
    """QDLM's settings of a task; None where it has none.

    >>> protocol_of("gsm8k_cot").gen_length, protocol_of("lambada") is None
    (256, True)
    """
    fitting = [name for name in QDLM if (task or "").startswith(name)]
    return QDLM[max(fitting, key=len)] if fitting else None


class Harness:
    """A model as a harness asks it.

    Args:
        model: ids [B, L] → logits [B, L, V]: a module, a compiled model, or with `spec` and `tokenizer` any callable.
        spec, tokenizer: None: the model's own.
        sampler: for all generation, an object or text; None: QDLM's for its tasks (for shifted logits Dream's: 128 tokens,
            temperature 0.08, top_p 0.9), for others the sampler of QDLM at the length that the task asks for.
        mc_num: masks an answer; None: QDLM's, 128 where it has none.
        cfg_scale: guidance of likelihoods.
        check_greedy: also decode each answer greedily, one token a forward, to say whether it is the model's own; without, the
            answer to that is always no (few tasks ask).
        seed: of masks and noise.
        batch_size: masks a forward; changes time, not results.

    Attributes:
        truncated: prompts whose beginning was cut off, since they and what follows are longer than the model allows.

    Raises:
        ModelError: there is no tokenizer.
        FeasibilityError: an option is wrong, or the model denoises block by block, which this likelihood is not made for.
    """

    def __init__(
        self,
        model: LogitsFn,
        *,
        spec: DiffusionSpec | None = None,
        tokenizer: Any = None,
        sampler: str | Sampler | None = None,
        mc_num: int | None = None,
        cfg_scale: float = 0.0,
        check_greedy: bool = False,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.model = model
        held = getattr(model, "spec", None)
        self.spec = spec or (held if isinstance(held, DiffusionSpec) else spec_of(model))  # type: ignore[arg-type]
        own = getattr(model, "tokenizer", None)
        known = own if own is not None else load_tokenizer(model) if isinstance(model, torch.nn.Module) else None
        self.tokenizer: Any = tokenizer if tokenizer is not None else known
        if self.tokenizer is None:
            raise ModelError("the model brings no tokenizer", where="tokenizer", remedy="Give tokenizer=")
        if self.spec.attention == "block-causal":
            what = "the model denoises block by block, and its likelihood is not that of one canvas"
            raise FeasibilityError(what, where="model", remedy="Use a model with full attention")
        if mc_num is not None and mc_num < 1:
            raise FeasibilityError(f"{mc_num} masks an answer", where="mc_num", remedy="Use 1 or more, as 128")
        self._sampler = None if sampler is None else as_sampler(sampler, self.spec)
        self._mc_num, self._cfg, self._check = mc_num, cfg_scale, check_greedy
        self._seed, self._batch = seed, batch_size
        self.truncated = 0

    def score(self, context: str, continuation: str, task: str | None = None) -> tuple[float, bool]:
        """log p(continuation | context) in nats, from below, and whether it is what greedy decoding gives."""
        prompt, answer = self.split(context, continuation)
        if not answer:
            return 0.0, True
        prompt = self._cut(prompt, len(answer), "continuation")
        protocol = protocol_of(task) or Protocol()
        masks = 1 if len(answer) == 1 else self._mc_num or protocol.mc_num
        found = log_likelihood(
            self.model,
            prompt,
            answer,
            self.spec,
            mc_num=masks,
            seed=self._seed,
            batch_size=self._batch,
            cfg_scale=self._cfg,
        )
        return found, self._check and self._greedy(prompt, answer)

    def rolling(self, text: str) -> float:
        """log p(text) in nats, from below: windows of the model's length, each after the first with half of it as context."""
        ids, longest = self._encode(text), self.spec.max_length
        half, total, start = longest // 2, 0.0, 0
        while start < len(ids):
            stop = min(len(ids), longest if start == 0 else start + longest - half)
            total += log_likelihood(
                self.model,
                ids[max(0, start - half) : start],
                ids[start:stop],
                self.spec,
                mc_num=1 if stop - start == 1 else self._mc_num or Protocol().mc_num,
                seed=self._seed,
                batch_size=self._batch,
                cfg_scale=self._cfg,
            )
            start = stop
        return total

    def complete(
        self, context: str, until: Sequence[str] = (), *, max_tokens: int | None = None, task: str | None = None
    ) -> str:
        """Text that follows `context`, up to the first of `until`."""
        sampler = self.sampler_for(task, max_tokens)
        prompt = self._cut(self._encode(context), sampler.gen_length, "text to generate")
        made = sampler.run(self.model, [torch.tensor(prompt).long()], self.spec, seed=self._seed)
        ids = made.generated[0].tolist()
        ids = ids[: ids.index(self.spec.eos_id)] if self.spec.eos_id in ids else ids
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        ends = [place for word in until if word and (place := text.find(word)) >= 0]
        return text[: min(ends, default=len(text))]

    def sampler_for(self, task: str | None = None, max_tokens: int | None = None) -> Sampler:
        """The sampler of a task that asks for at most `max_tokens`."""
        if self._sampler is not None:
            return self._sampler
        protocol = protocol_of(task)
        if self.spec.shift:
            length = max_tokens if max_tokens and not (protocol and protocol.gen_length) else 128
            return DreamSampler(gen_length=length, steps=length, temperature=0.08, top_p=0.9, alg="entropy")
        if protocol and protocol.gen_length:
            length, block = protocol.gen_length, protocol.block_length
        else:
            length = max_tokens or 128
            block = 32 if length % 32 == 0 else length
        return LLaDASampler(gen_length=length, steps=length, block_length=block)

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the ids of the whole text go beyond those of the context; spaces between go to the second."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        whole, prompt = self._encode(context + continuation), self._encode(context)
        return whole[: len(prompt)], whole[len(prompt) :]

    def _greedy(self, prompt: list[int], answer: list[int]) -> bool:
        canvas = torch.tensor([[*prompt, *[self.spec.mask_id] * len(answer)]], device=device_of(self.model))
        filled = LLaDASampler(steps=len(answer)).fill(self.model, canvas, self.spec, seed=self._seed)
        return bool(filled.ids[0, len(prompt) :].tolist() == answer)

    def _cut(self, prompt: list[int], more: int, what: str) -> list[int]:
        room = self.spec.max_length - more
        if room < 0:
            raise FeasibilityError(
                f"a {what} of {more} tokens, the model was made for {self.spec.max_length}",
                where="max_length",
                remedy="Leave the task out, or give sampler= with a smaller gen_length",
            )
        self.truncated += len(prompt) > room
        return prompt[max(0, len(prompt) - room) :]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))
