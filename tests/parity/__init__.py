# SPDX-License-Identifier: Apache-2.0
"""Compares every parallel layout with the single-process run, on real megatron-core over gloo. Imports no NeMo.

- layouts.py: the parallel layouts
- runs.py: the runs (adapter, model, precision, loop, recomputation), and which layout has which of them
- loops.py: the training loops: our own, and megatron-core's DDP with its optimizers
- context_parallel.py: an attention for the CPU under context parallelism
- training.py: trains one run on the current layout, and records it
- comparison.py: compares a record with the single-process run's, and replicas with each other
- suite.py: runs everything; starts the ranks once per number of ranks
- cells.py: the support table: what is tested, and what is refused
- recording.py: keeps the outcome of each test
- table.py: writes docs/parallelism.md, if the results of both releases prove it
"""
