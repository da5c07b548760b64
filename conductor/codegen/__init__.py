"""Row models from a database: `reader` reads its catalog, `rendering` writes the module.

What is written depends on the catalog alone: the same database gives the same bytes.
"""
