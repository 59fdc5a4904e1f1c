"""The type checker behind the import hook of conftest.py: beartype, for which a whole number is a float as well."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
