"""Run the command line as `python -m kithara_ray`."""

import sys

from kithara_ray.cli.app import main

sys.exit(main())
