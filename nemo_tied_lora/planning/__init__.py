# SPDX-License-Identifier: Apache-2.0
"""What is known before a run: layouts, costs, memory, and the checks. Torch is not imported."""
