# SPDX-License-Identifier: Apache-2.0
from tests import switched_off as switched_off
