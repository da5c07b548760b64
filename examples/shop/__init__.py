"""A small shop: changes of its tables become jobs, and an oracle checks that none is lost.

`python -m examples.shop.demo` runs all of it on a server of its own.
"""
