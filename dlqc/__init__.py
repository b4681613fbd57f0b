"""dlqc: a compiler that makes diffusion language models small and fast.

model = dlqc.load_model("tiny-llada")
q = dlqc.compile(model, passes="w4a16-gptq", calibration="texts.txt")
print(q.explain())
print(dlqc.generate(q, "Once upon a time"))
q.save("out/"); q = dlqc.load("out/")
dlqc.export(q, "served/", format="compressed-tensors")
"""

__version__ = "0.1.0"

from dlqc.artifact import load
from dlqc.compile import compile, plan
from dlqc.compiled import Compiled
from dlqc.contract import Context, Declined, Pass, PassReport
from dlqc.diffusion.generate import generate, generate_batch, stream
from dlqc.diffusion.spec import DiffusionSpec
from dlqc.errors import DlqcError
from dlqc.export import export
from dlqc.models.load import load_model, load_tokenizer
from dlqc.recommend import recommend

__all__ = [
    "Compiled",
    "Context",
    "Declined",
    "DiffusionSpec",
    "DlqcError",
    "Pass",
    "PassReport",
    "compile",
    "export",
    "generate",
    "generate_batch",
    "load",
    "load_model",
    "load_tokenizer",
    "plan",
    "recommend",
    "stream",
]
