# SPDX-License-Identifier: Apache-2.0
"""Checks every line of data and prompts before a run. Imports no torch."""
