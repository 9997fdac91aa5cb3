# SPDX-License-Identifier: Apache-2.0
"""Helpers that several tests share: ranks, tiny models, adapters on disk, commands, planted faults."""
