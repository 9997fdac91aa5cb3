# SPDX-License-Identifier: Apache-2.0
"""Runs one rank: rendezvous, checks of the machines, watchdog, stop signals, restarts and the status file."""
