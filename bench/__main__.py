"""`python -m bench OP [options]`; `python -m bench OP --help` shows an op's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> int:
    ops = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    if len(sys.argv) < 2 or sys.argv[1] not in ops:
        print(f"usage: python -m bench OP [options], where OP is one of: {', '.join(ops)}", file=sys.stderr)
        return 2
    result: int = importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    return result


if __name__ == "__main__":
    sys.exit(main())
