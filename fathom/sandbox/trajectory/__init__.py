"""The trajectory of a sandbox: a log that survives preemption, and operations that run once.

Paper: §5.2.5 (the ordered trajectory log of a sandbox).
"""
