"""The HTTP server: the APIs that existing clients speak, in front of any engine.

Paper: §5.1.1 (reasoning efforts, tool-call schema, interleaved thinking).
"""
