# SPDX-License-Identifier: Apache-2.0
from tests.harness import switched_off as switched_off
