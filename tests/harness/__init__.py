# SPDX-License-Identifier: Apache-2.0
"""What several tests share: ranks, tiny models, adapters on disk, commands, faults to plant."""
