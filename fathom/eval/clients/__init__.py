"""Real coding agents, driven against the server: plans, a sealed-off place to run, and checks.

Paper: none (a test).
"""
