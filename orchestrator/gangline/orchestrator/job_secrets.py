"""Tell a secret from other text, so that none is written down in a job file by mistake.

A job file is copied into the run folder, to MLflow and to the cluster. This cannot find every
secret; it finds variables that are named like one and the fixed shapes of well-known tokens.
"""

import re

_NAMED_SECRET = re.compile(
    r"(?:\A|_)(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY"
    r"|AUTH_TOKEN|TOKEN)\Z|(?:\A|_)SECRET(?:_|\Z)"
)
# Tokens of a vocabulary, not of a service.
_NAMED_VOCABULARY = re.compile(r"(?:\A|_)(?:BOS|EOS|PAD|UNK|MASK|SEP|CLS|STOP|PER|SPECIAL)_TOKEN\Z")
_NAMED_PLACE = re.compile(r"_(?:FILE|PATH|DIR|URL|NAME)\Z")

_SHAPES = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40})"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an API key (sk-...)": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    "a URL with a password": re.compile(r"://[^/@\s:]{1,256}:[^/@\s]{1,256}@"),
}


def secret_in_text(text: str) -> str | None:
    """Name the kind of secret that a text holds by its shape, or return None."""
    for kind, shape in _SHAPES.items():
        if shape.search(text):
            return kind
    return None


def is_secret_name(name: str) -> bool:
    """Tell whether a variable is named like a secret."""
    upper = name.upper()
    if _NAMED_VOCABULARY.search(upper) or _NAMED_PLACE.search(upper):
        return False
    return _NAMED_SECRET.search(upper) is not None
