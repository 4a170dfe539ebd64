"""Name the kinds of token exchange and choose one for a layout; torch-free."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["auto", "local", "all_gather", "all_to_all", "hierarchical", "chunked"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Choice:
    """A kind, with what it is to do, and why this one."""

    kind: Kind
    reason: str
    deduplicate: bool = False


def resolve(kind: Kind, hosts: Sequence[int], *, top_k: int = 1) -> Choice:
    """Choose the kind for an axis "ep" whose ranks are on these hosts, one entry per rank.

    `top_k` are the experts of a token.

    Raises: ValueError for "local" on several ranks.
    """
    if len(hosts) == 1:
        return Choice("local", "one rank holds all experts")
    if kind == "local":
        raise ValueError(
            f"mesh.token_exchange.kind is local, but the experts are divided over {len(hosts)} "
            "ranks; set it to auto, or mesh.expert_parallel to 1"
        )
    if kind != "auto":
        return Choice(kind, "set by mesh.token_exchange.kind")
    ranks_of_host = Counter(hosts)
    layout = f"{len(hosts)} ranks on {len(ranks_of_host)} hosts"
    if len(ranks_of_host) == 1:
        return Choice("all_to_all", f"{layout}: all links are alike")
    if top_k > 1:
        reason = f"{layout}: a token goes to a host once, not once for each of {top_k} experts"
        return Choice("hierarchical", reason, deduplicate=True)
    if max(ranks_of_host.values()) > 1:
        return Choice("hierarchical", f"{layout}: fewer messages between hosts")
    return Choice("all_to_all", f"{layout}: with one rank each and one expert a token")
