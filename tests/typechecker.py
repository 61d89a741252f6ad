"""What checks signatures in the tests: beartype, to which an int is a float too, as to every type checker (PEP 484)."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
