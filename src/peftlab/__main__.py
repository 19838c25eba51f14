"""`python -m peftlab` is `peftlab`."""

import sys

from peftlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
