"""An order's way from a row to a parcel: a workflow that starts from a row change.

`python -m examples.fulfilment DSN` runs a worker of it; `cdc run` beside it brings the changes.
"""
