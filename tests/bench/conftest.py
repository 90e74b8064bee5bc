"""The benchmarks are no part of the installed package: they are imported from the checkout."""

import sys
from pathlib import Path

# At the end, so that `irlfast` is still the installed one.
sys.path.append(str(Path(__file__).parents[2]))
