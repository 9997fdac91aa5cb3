# SPDX-License-Identifier: Apache-2.0
"""Tasks: where their data come from, how prompts and answers are made of them, and how results are measured. Needs no torch."""
