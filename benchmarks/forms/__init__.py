# SPDX-License-Identifier: Apache-2.0
"""Which form of tied adapter is best, and with which learning rates: small runs on SmolLM2-135M, outside the package.

    python -m benchmarks.forms base                 # once: the base's folder
    python -m benchmarks.forms run --minutes 120

Forms are prototyped here: Delta W_l = s diag(v_l) B_g R_l A_g, on torch alone. What wins enters the package.
"""

__all__: list[str] = []
