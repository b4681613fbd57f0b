"""One tree of errors. Every message says what, where, why, and what to do.

`DlqcError(what, where=..., why=..., remedy=...)` prints as

    blocks.3.ff_out: 11008 input features do not divide by group 96. Use 32, 64 or 128, or exclude it with skip=.

The parts stay readable as attributes, so that tools (and `--json`) need not parse the sentence.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DlqcError(Exception):
    """Base of all errors that dlqc raises on purpose.

    Args:
        what: the fact, one sentence without a full stop.
        where: the parameter, node, file or option it concerns (a fully qualified name where there is one).
        remedy: what the reader can do about it, one sentence.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        head = f"{where}: {what}" if where else what
        super().__init__(f"{head}. {remedy}" if remedy else head)


class CaptureError(DlqcError):
    """The model could not be turned into a graph, or the graph does not compute what the model computes."""


class ContractError(DlqcError):
    """A pass or a graph broke the law: order of facts, ill-formed graph, a claim that does not hold."""


class FeasibilityError(DlqcError):
    """Something asked for cannot be done on this model; found before any work."""


class CalibrationError(DlqcError):
    """Calibration data or statistics are unusable."""


class LoweringError(DlqcError):
    """The backend that was named cannot run a site."""


class ExportError(DlqcError):
    """The target format cannot hold the model."""


class ArtifactError(DlqcError):
    """A file or folder is missing, corrupt, foreign, newer than this version, or cannot be written."""


class ModelError(DlqcError):
    """The model or its checkpoint cannot be loaded or used: missing tensors, no mask token, wrong sizes."""


class RecipeError(DlqcError):
    """A recipe, a pass name or an option is unknown or malformed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy sentence that names the closest known spelling, or lists what is known.

    >>> nearest("quantise_weights", ["quantize_weights", "pack"])
    "Did you mean 'quantize_weights'?"
    >>> nearest("zzz", ["b", "a"])
    'Known: a, b'
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(options)}"
