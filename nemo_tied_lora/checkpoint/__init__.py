# SPDX-License-Identifier: Apache-2.0
"""Files that an adapter is written to and read from."""
