"""Compiled programs are kept where the user says, else in the library's cache; each kind of CPU has its own place."""

import json
import os
import subprocess
import sys

import pytest

from kithara_ray.model import runtime

SCRIPT = """
import json, sys
import jax
from kithara_ray.model.runtime import keep_compiled

keep_compiled(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(json.dumps(jax.config.jax_compilation_cache_dir))
"""


KIND = runtime._kind_of_cpu()


@pytest.mark.parametrize(
    ("platform", "variable", "kept"),
    [("cpu", None, f"compiled/cpu-{KIND}"), ("cpu", "own", "own"), ("tpu", None, "compiled")],
)
def test_where_programs_are_kept(platform, variable, kept, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu"} | dict.fromkeys(("KITHARA_RAY_CACHE", "XDG_CACHE_HOME", "HOME"), str(tmp_path))
    if variable:
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / variable)
    done = subprocess.run([sys.executable, "-c", SCRIPT, platform], env=env, capture_output=True, text=True, check=True)
    directory = json.loads(done.stdout.splitlines()[-1])
    assert directory.endswith(kept)
    assert directory.startswith(str(tmp_path))
    assert os.listdir(directory)


def test_a_worker_starts_without_what_keras_does_not_need_and_may_import_it_later():
    script = """
import sys
from kithara_ray.model import runtime

runtime.prepare()
print([name for name in ("tensorflow", "matplotlib") if sys.modules.get(name)], "matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] False"


def test_a_cpu_of_other_instructions_has_a_place_of_its_own(monkeypatch):
    told = "processor : 0\nmodel name : A\ncpu MHz : {}\nflags : sse2 {}\n"
    kinds = []
    for text in (told.format(1000, "avx2"), told.format(2000, "avx2"), told.format(1000, "avx512f"), "vendor : none\n"):
        monkeypatch.setattr(runtime.Path, "read_text", lambda self, text=text: text)
        kinds.append(runtime._kind_of_cpu())
    assert kinds[0] == kinds[1] != kinds[2]
    assert kinds[3] is None
