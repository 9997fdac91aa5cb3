# SPDX-License-Identifier: Apache-2.0
"""What a user types becomes one configuration: override lines, YAMLs, and the keys of NeMo's scripts."""
