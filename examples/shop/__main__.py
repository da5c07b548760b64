"""Creates the shop's tables in a migrated database, unless they are there.

`python -m examples.shop`, for installations that start it again and again. The database is that of
`CONDUCTOR_DSN`.
"""

import os

from psycopg.errors import DuplicateSchema

from examples.shop.oracle import create_shop


def main() -> None:
    """Create what is missing, all of it or nothing."""
    try:
        create_shop(os.environ["CONDUCTOR_DSN"])
    except DuplicateSchema:
        print("the shop is there already")
    else:
        print("the shop's tables are there")


if __name__ == "__main__":
    main()
