"""A loop in a sandbox of its own beside the one it works in, which outlives whoever started it.

    client  ->  keeper  ->  daemon  ->  target        commands and files, each once, in the log
                  |           `------>  worker        runs the loop
                  `--- door ----------'               two sockets: the target, the model

The worker has no network and no secret. Its door (`door.py`) lets it ask for operations in one
sandbox and talk to one server; the keeper (`keeper.py`) answers there, writes the log, and can be
killed and started again like the daemon: the loop waits and asks again under the same keys.

Paper: §5.2.5 (the loop outside of the preemptible process; V4.1: reconnect instead of replay).
"""
