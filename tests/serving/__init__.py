# SPDX-License-Identifier: Apache-2.0
"""Exports served by other programs: `make test-serving`. Not collected where SERVING_PYTHON names no interpreter."""
