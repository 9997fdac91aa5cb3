# SPDX-License-Identifier: Apache-2.0
"""Adapters merged into the base's own file: the file is copied, and each weight's bytes are replaced in their place."""
