"""The daemon of one machine: sandboxes that outlive the programs that made them, and itself.

    parent     privileged: makes, keeps and ends sandboxes, on requests that it takes for hostile
      node     privileged: mounts, groups, namespaces; asked by the parent alone
      api      no rights at all: reads what clients send, asks the parent

The API process is a user that owns nothing, sees no file, may open no socket and start no program.
It gets its listening sockets from the parent, and for every command a socket that leads to the
sandbox's agent; a client of this machine gets that socket itself, so the bytes of commands are
copied by nobody. Where the daemon is not root's all three are the same user, and the API process
still sees no file. Any of them may be killed: the parent starts another API process or node, and
another parent adopts every sandbox that still answers.

Paper: §5.2.5 (one node: admission, launch, expiry).
"""

from __future__ import annotations

SOCKET = "edge.sock"
# One message between the parent and its API process.
MESSAGE_LIMIT = 120_000
# Operations of clients by what a token must be good for.
LOOKING = frozenset({"list", "metrics", "stats", "netlog"})
