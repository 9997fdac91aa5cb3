# SPDX-License-Identifier: Apache-2.0
"""The machines that a run has been given: whether they fit it, hold the same software, and reach each other."""
