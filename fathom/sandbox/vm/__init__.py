"""Virtual machines as sandboxes: QEMU's small machine and its full one, one agent, one surface.

Paper: §5.2.5 (microVM and full VM substrates).
"""
