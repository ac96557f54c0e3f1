"""``python -m saga_store``, for where no scripts are installed."""

import sys

from saga_store.cli import main

if __name__ == "__main__":
    sys.exit(main())
