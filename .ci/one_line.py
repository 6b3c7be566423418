"""Show a long command's output as one line of progress, and all of it only where the command fails.

    python .ci/one_line.py LABEL COMMAND [ARGUMENT ...]

On a terminal the line is rewritten in place; elsewhere a line is printed every 20 seconds.
"""

import collections
import subprocess
import sys
import time

_EVERY_S = 20.0
_SHOWN_ON_FAILURE = 60
_WIDTH = 100


def main() -> int:
    label, command = sys.argv[1], sys.argv[2:]
    is_terminal, started, told = sys.stdout.isatty(), time.monotonic(), 0.0
    tail: collections.deque[str] = collections.deque(maxlen=_SHOWN_ON_FAILURE)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line)
        seconds = time.monotonic() - started
        text = f"{label} ({seconds:.0f} s): {' '.join(line.split())}"[:_WIDTH]
        if is_terminal:
            print(f"\r{text:<{_WIDTH}}", end="", flush=True)
        elif seconds - told >= _EVERY_S:
            told = seconds
            print(text, flush=True)
    code = process.wait()
    end = f"{label}: {'done' if code == 0 else 'failed'} in {time.monotonic() - started:.0f} s"
    print(f"\r{end:<{_WIDTH}}" if is_terminal else end, flush=True)
    if code:
        sys.stdout.writelines(tail)
    return code


if __name__ == "__main__":
    sys.exit(main())
