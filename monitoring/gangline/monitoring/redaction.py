"""Keep the credentials of a tracking URI out of logs, files and messages."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, unquote, urlsplit

MASK = "***"


def redact_uri(uri: str) -> str:
    """Return the URI with user name, password and query values masked."""
    parts = _split(uri)
    if parts is None:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{MASK}@{host}" if "@" in parts.netloc else host
    query = "&".join(f"{item.partition('=')[0]}={MASK}" for item in parts.query.split("&") if item)
    # Not urlunsplit: it drops the empty host of sqlite:////path.
    return f"{parts.scheme}://{netloc}{parts.path}" + (f"?{query}" if query else "")


def secrets_of(uri: str) -> list[str]:
    """Return the parts of the URI that must not be printed, longest first."""
    parts = _split(uri)
    if parts is None:
        return [uri]
    found = [uri] if redact_uri(uri) != uri else []
    userinfo = parts.netloc.rpartition("@")[0]
    # The user name alone is no secret; without a password it may be a token.
    found += [userinfo, userinfo.partition(":")[2]]
    found += [item.partition("=")[2] for item in parts.query.split("&")]
    found += [unquote(secret) for secret in found]
    return sorted({secret for secret in found if secret}, key=len, reverse=True)


def redact_text(text: str, secrets: list[str]) -> str:
    """Return the text with every secret masked."""
    for secret in secrets:
        text = text.replace(secret, MASK)
    return text


def redact_userinfo(text: str) -> str:
    """Return the text with user name and password of every URI in it masked."""
    return re.sub(r"(?<=://)[^/\s@]+(?=@)", MASK, text)


def _split(uri: str) -> SplitResult | None:
    try:
        return urlsplit(uri)
    except ValueError:
        return None
