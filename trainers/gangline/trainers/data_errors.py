"""Errors of the data part.

ValueError
└── DataError           sources, tokenizer or sizes cannot be used; the message names the field
    └── TokenFileError  a prepared token file is missing, cut short or altered
"""


class DataError(ValueError):
    """Refuse what the job file asks of the data, in one message: what, got, wanted, mend."""


class TokenFileError(DataError):
    """Refuse a prepared token file, by name."""
