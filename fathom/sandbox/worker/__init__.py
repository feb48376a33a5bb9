"""A loop in a sandbox of its own beside the one it works in, which outlives whoever started it.

    client  ->  attendant  ->  daemon  ->  target     commands and files, each once, in the log
                    |             `----->  worker     runs the loop
                    `---- door -----------'           two sockets: the target, the model

The worker has no network. Its door (`door.py`) lets it ask for operations in one sandbox and talk
to one server; the attendant (`attendant.py`) answers there and writes the log. It can be killed and
started again like the daemon: the loop waits, and asks again under the same keys.

Paper: §5.2.5 (the loop outside of the preemptible process; V4.1: reconnect instead of replay).
"""
