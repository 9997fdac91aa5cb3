# SPDX-License-Identifier: Apache-2.0
"""A rank budget on u: AdaLoRA's choice of the entries that stay, for tied and untied adapters."""
