"""A worker imports its loop beside Ray's start: before jax.distributed starts, so no backend may start either."""

import json
import os
import subprocess
import sys

from kithara_ray.orchestration.cluster import process_setup

SCRIPT = """
import json, sys
from kithara_ray.orchestration.trainer import TRAIN_LOOP
from kithara_ray.orchestration.worker import entry

before = entry.times_beside(0.0)
entry.Entry(TRAIN_LOOP).prepare()
from jax._src.xla_bridge import backends_are_initialized

[(begins, ends)] = entry.times_beside(0.0).values()
loaded = [name in sys.modules for name in ("kithara_ray.orchestration.worker.run", "keras_hub")]
print(json.dumps([before, loaded, begins < ends, backends_are_initialized()]))
"""


def test_what_is_imported_beside_the_start_starts_no_backend():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [{}, [True, True], True, False]


def test_an_error_beside_the_start_is_left_to_the_loop():
    def prepare():
        raise ImportError("no keras")

    process_setup._prepared(prepare)
