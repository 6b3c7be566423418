"""The process that builds a step and compiles it for a slice; its environment names the slice.

    python -m kithara_ray.plan.program REQUEST.json RESULT.json

`planner` writes the request and starts this process. The result holds the `facts` about the program; `planner` turns
them into answers for a user.
"""

import json
import sys
from pathlib import Path

from kithara_ray.errors import ConfigError
from kithara_ray.model import runtime


def main(request_path: str, result_path: str) -> None:
    runtime.prepare()
    from kithara_ray.plan.facts import facts  # imports Keras, whose backend is chosen above

    request = json.loads(Path(request_path).read_text())
    try:
        result = facts(request)
    except ConfigError as error:
        result = {"config_error": [type(error).__name__, str(error)]}
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
