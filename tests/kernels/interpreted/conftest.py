"""Tests of Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported.

`test_triton.py`, one folder up, runs this folder in a process of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
