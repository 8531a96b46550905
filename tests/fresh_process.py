"""Reload checkpoints, each in a process forked from one that has torch and transformers alone.

`python -P fresh_process.py <reload script>` reads lines `<checkpoint> <exchange>` and answers each
with its exit status. A process of its own for each checkpoint would import for seconds.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

from transformers import AutoModelForCausalLM  # noqa: F401  (imported once, before the forks)

for line in sys.stdin:
    checkpoint, exchange = line.split()
    child = os.fork()
    if not child:
        sys.argv = [sys.argv[1], checkpoint, exchange]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            (Path(exchange) / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            os._exit(1)
        os._exit(0)
    sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
    sys.stdout.flush()
