# SPDX-License-Identifier: Apache-2.0
"""What a training run needs to go on: the adapter, the optimizer's tensors, random states, counters; for any layout."""
