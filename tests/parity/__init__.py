# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout reproduces the single-process run, on real megatron-core over gloo. NeMo is not imported.

- layouts.py: how ranks are laid out
- runs.py: what is trained (adapter, model, precision, loop, recomputation), and which of it on which layout
- loops.py: training loops, one of our own, and megatron-core's DDP with its optimizers
- context_parallel.py: an attention for the CPU under context parallelism
- training.py: one run on whatever layout the rank is in, and what it records
- comparison.py: a record against the single-process run's; replicas against each other
- suite.py: all runs of all layouts, the ranks started once for each number of them
- cells.py: the support table, what is tested and what is refused
- recording.py: what each test came to
- table.py: docs/parallelism.md, which both releases' results must prove
"""
