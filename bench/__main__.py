"""`python -m bench all`, `OP`, `gpu`, `launch` or `table`; each has --help."""

from __future__ import annotations

import sys

from bench import _launch, table
from bench._run import main as measure
from bench._run import op_modules
from bench.gpu import _command as gpu


def main(argv: list[str]) -> int:
    targets = ["all", *op_modules()]
    if argv and argv[0] == "table":
        return table.main(argv[1:])
    if argv and argv[0] == "gpu":
        return gpu.main(argv[1:])
    if argv and argv[0] == "launch":
        return _launch.main(argv[1:])
    if not argv or argv[0] not in targets:
        names = ",".join([*targets, "gpu", "launch", "table"])
        usage = f"usage: python -m bench {{{names}}} [options]; --help after it shows them"
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return measure(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
