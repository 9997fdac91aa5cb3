# SPDX-License-Identifier: Apache-2.0
"""Files: the adapter's `.nemo`, training checkpoints, and the identity of the base."""
