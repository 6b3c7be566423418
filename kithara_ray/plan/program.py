"""The process that builds a step and compiles it for a slice; its environment names the slice.

    python -m kithara_ray.plan.program REQUESTS.json RESULTS.json

`planner` writes the requests and starts this process. Each result holds the `facts` about a program; `planner` turns
them into answers for a user.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kithara_ray.errors import ConfigError
from kithara_ray.model import runtime


def main(requests_path: str, results_path: str) -> None:
    runtime.prepare()
    from kithara_ray.plan.facts import facts  # imports Keras, whose backend is chosen above

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        try:
            return facts(request)
        except ConfigError as error:
            return {"config_error": [type(error).__name__, str(error)]}

    requests = json.loads(Path(requests_path).read_text())
    Path(results_path).write_text(json.dumps([answer(request) for request in requests]))


if __name__ == "__main__":
    main(*sys.argv[1:])
