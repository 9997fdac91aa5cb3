# SPDX-License-Identifier: Apache-2.0
"""Merges adapters into a base: copies the base's file and replaces the bytes of each adapted weight."""
