# SPDX-License-Identifier: Apache-2.0
"""A base whose decoder linears are frozen and hold 4 or 8 bits a weight."""
