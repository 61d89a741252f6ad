"""What checks signatures in the tests: beartype, to which numbers are what Python takes them for.

An int is a float too (PEP 484), and an integer that comes out of an array is an int.
"""

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

NUMBERS = BeartypeHintOverrides({int: int | np.integer, float: float | int | np.floating | np.integer})

checked = beartype(conf=BeartypeConf(hint_overrides=NUMBERS))
