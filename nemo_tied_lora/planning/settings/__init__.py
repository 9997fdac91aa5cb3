# SPDX-License-Identifier: Apache-2.0
"""Checks the settings of a run against each other, or gives them the meaning that was intended. Imports no torch."""
