# SPDX-License-Identifier: Apache-2.0
"""The package on Megatron-Bridge: `make test-bridge`. Not collected where Bridge is not installed."""
