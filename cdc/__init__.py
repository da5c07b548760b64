"""The change-data-capture sidecar: committed changes in, jobs out, exactly once.

Data flows one way: source → wire → transactions → routing → sink. A module imports only what
comes before it in that order; everything down to `routing` and `progress` is pure.
"""
