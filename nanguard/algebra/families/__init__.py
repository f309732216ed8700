"""The families: one short file each, with its laws (what is known), queries (what asks) and rules (what is replaced).

Every module in this package is loaded by the registry; a new family is a new file, and nothing else.
"""
