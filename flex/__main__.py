"""`python -m flex`: see flex/commands.py."""

import sys

from flex.commands import main

if __name__ == "__main__":
    sys.exit(main())
