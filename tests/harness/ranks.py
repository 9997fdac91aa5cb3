# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks inside pytest: forked processes, gloo, a rendezvous through a file, a time limit."""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.harness.forks import FORK_SERVER
from tests.harness.switched_off import leave_switched_off

__all__ = ["run_ranks", "single_process"]


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int,
    tp: int = 1,
    pp: int = 1,
    vp: int | None = None,
    cp: int = 1,
    timeout: float = 300.0,
) -> list[Any]:
    """Calls `function(*args)` on every rank, after setting up Megatron's groups.

    Args:
        function: it and its results must be picklable.
        timeout: seconds.

    Returns:
        Each rank's result, in rank order.

    Raises:
        AssertionError: a rank raised (the message has its traceback), died, or did not answer in time.
    """
    results: mp.Queue = FORK_SERVER.Queue()
    sizes = {"tp": tp, "pp": pp, "vp": vp, "cp": cp}
    with tempfile.TemporaryDirectory() as folder:
        rendezvous, environment = str(Path(folder) / "rendezvous"), dict(os.environ)
        children = [
            FORK_SERVER.Process(
                target=_rank_main,
                args=(rank, world_size, rendezvous, environment, sizes, function, args, results, timeout),
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        try:
            answers = _collect(results, children, timeout)
            for child in children:  # by itself, so that it ends its own processes: dist_checkpointing starts one
                child.join(timeout=30)
            return answers
        finally:
            deadline = time.monotonic() + 5  # as above, for a rank that has failed
            for child in children:
                child.join(timeout=max(0.0, deadline - time.monotonic()))
                if child.is_alive():
                    child.terminate()
                child.join()


def single_process(tp: int = 1, pp: int = 1) -> None:
    """Sets up Megatron in this process, as its only rank. A second call does nothing."""
    from megatron.core import parallel_state

    from nemo_tied_lora.platform import prepare

    assert tp == pp == 1
    prepare()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        _initialize({"tp": 1, "pp": 1, "vp": None, "cp": 1})


def _collect(results: mp.Queue, children: list, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    waited = 0.0
    while len(answers) < len(children):
        try:
            rank, failure, result = results.get(timeout=1.0)
        except queue.Empty:
            waited += 1.0
            dead = [r for r, c in enumerate(children) if r not in answers and c.exitcode not in (None, 0)]
            if dead:
                raise AssertionError(f"rank {dead[0]} died with exit code {children[dead[0]].exitcode}") from None
            if waited > timeout:
                missing = sorted(set(range(len(children))) - answers.keys())
                raise AssertionError(f"ranks {missing} did not answer within {timeout} s") from None
            continue
        if failure is not None:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        answers[rank] = pickle.loads(result)
    return [answers[rank] for rank in range(len(children))]


def _rank_main(
    rank: int,
    world_size: int,
    rendezvous: str,
    environment: dict[str, str],
    sizes: dict[str, int | None],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    results: mp.Queue,
    timeout: float,
) -> None:
    os.environ.clear()  # these are the fork server's, from its start
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        from nemo_tied_lora.platform import prepare

        prepare()
        leave_switched_off()
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=min(timeout, 120)),
        )
        _initialize(sizes)
        # Pickled here: a queue would send a tensor as a handle that is lost when this process ends.
        results.put((rank, None, pickle.dumps(function(*args))))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def _initialize(sizes: dict[str, int | None]) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        virtual_pipeline_model_parallel_size=sizes["vp"],
        context_parallel_size=sizes["cp"],
    )
    # Each rank has another seed: nothing may depend on ranks drawing the same numbers.
    tensor_parallel.model_parallel_cuda_manual_seed(100 + 17 * torch.distributed.get_rank())
