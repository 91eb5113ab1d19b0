"""``python -m mxfp4np``."""

import sys

from .cli import main

sys.exit(main())
