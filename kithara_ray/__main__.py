"""`python -m kithara_ray`."""

import sys

from kithara_ray.cli import main

sys.exit(main())
