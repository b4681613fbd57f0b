"""Where the cells of a study are measured: here, in processes of this machine, or on a Ray cluster.

Each engine is handed the jobs and gives (number, result) as they come in. Results are plain data; the caller writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from dlqc.errors import FeasibilityError

Job = dict[str, Any]
Work = Callable[[Job], dict[str, Any]]


def check_engine(jobs: int, ray: str | None) -> None:
    """Refuse what cannot be had, before any work."""
    if jobs < 1:
        raise FeasibilityError(f"{jobs} processes are none", where="jobs", remedy="Use 1 or more")
    if ray is not None and jobs > 1:
        raise FeasibilityError("Ray and processes of its own do not go together", where="jobs", remedy="Leave one out")
    if ray is not None and find_spec("ray") is None:
        raise FeasibilityError(
            "ray is not installed", where="ray", remedy="Install it with: pip install 'dlqc[ray]', or use --jobs"
        )


def spread(work: Work, todo: Sequence[Job], *, jobs: int = 1, ray: str | None = None) -> Iterator[tuple[int, Any]]:
    """Run `work` on every job.

    Args:
        work: a function of a module, so that other processes find it.
        jobs: processes on this machine; 1 runs here. The machine's cores are shared out among them.
        ray: "local" starts a cluster on this machine; else the address of one, such as "auto" or "ray://head:10001".

    Raises:
        FeasibilityError: a process died, ray is not installed, or its cluster cannot be reached.
    """
    check_engine(jobs, ray)
    if ray is not None:
        yield from _on_ray(work, todo, ray)
    elif jobs == 1:
        for number, job in enumerate(todo):
            yield number, work(job)
    else:
        yield from _in_processes(work, todo, jobs)


def _in_processes(work: Work, todo: Sequence[Job], jobs: int) -> Iterator[tuple[int, Any]]:
    # Read by torch when it is imported, which is when the first job is unpickled.
    settings = ("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=os.putenv, initargs=settings)
    try:
        running = {pool.submit(work, job): number for number, job in enumerate(todo)}
        for done in as_completed(running):
            yield running[done], done.result()
    except BrokenProcessPool as error:
        raise FeasibilityError(
            "a process died, perhaps for lack of memory",
            where="jobs",
            remedy="Run it again with fewer jobs; cells that were finished are kept",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(work: Work, todo: Sequence[Job], address: str) -> Iterator[tuple[int, Any]]:
    import ray

    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FeasibilityError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]})",
            where="ray",
            remedy="Start one with: ray start --head, or use --ray local",
        ) from error
    try:
        remote = ray.remote(work)
        running = {remote.remote(job): number for number, job in enumerate(todo)}
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done[0]), ray.get(done[0])
    finally:
        if ours:
            ray.shutdown()
