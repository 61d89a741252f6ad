"""Type checker of the signatures in tests: beartype with the numeric types of PEP 484.

An int is a valid float, and NumPy numbers are valid Python numbers.
"""

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

NUMBERS = FrozenDict({int: int | np.integer, float: float | int | np.floating | np.integer})

checked = beartype(conf=BeartypeConf(hint_overrides=NUMBERS))
