# SPDX-License-Identifier: Apache-2.0
"""Programs that make the records of sets whose licences keep them out of this package."""
