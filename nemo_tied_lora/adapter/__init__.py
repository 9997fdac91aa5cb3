# SPDX-License-Identifier: Apache-2.0
"""The adapter on plain megatron-core: shapes, sharding, the adapted linear, gradient sums, injection."""
