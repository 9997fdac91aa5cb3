# SPDX-License-Identifier: Apache-2.0
"""A study: methods x tasks x seeds from one YAML, each run once, and a page from the results. Behind `tied-lora compare`."""

__all__: list[str] = []
