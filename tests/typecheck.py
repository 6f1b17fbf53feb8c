"""The checker behind jaxtyping's hook: an int may stand where a float is declared (PEP 484's numeric tower)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
