"""`python -m bench table FILE...`: results files merged, as tables, into the docs, as one file or as a picture."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench import _results
from bench._launch import launch_table
from bench._report import headline, markdown
from bench.gpu._model import model_table

# In a page, what stands between two comments is the tables of the file that the first one names.
# "model" names files by a pattern, of which there may be none.
BLOCK = re.compile(
    r"(<!-- (?P<kind>figures|headline|launch|model): (?P<file>\S+) -->\n).*?(?=<!-- end of figures -->)", re.DOTALL
)
KINDS = {"figures": markdown, "headline": headline, "launch": launch_table}


def fill(page: str, read: Path) -> str:
    """A page with the tables of the files that it names, which are looked for below `read`."""

    def replace(match: re.Match[str]) -> str:
        if match["kind"] == "model":
            tables = model_table([_results.read(file) for file in sorted(read.glob(match["file"]))])
        else:
            tables = KINDS[match["kind"]](_results.read(read / match["file"]))
        return f"{match[1]}\n{tables}\n\n"

    return BLOCK.sub(replace, page)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench table", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="results of --json; of one case the newer counts")
    parser.add_argument("--json", metavar="FILE", help="write the merged results there")
    parser.add_argument("--plot", metavar="FILE", help="draw them there, as PNG")
    parser.add_argument(
        "--page", metavar="FILE", nargs="+", default=[], help="renew the tables in pages, from the files they name"
    )
    arguments = parser.parse_args(argv)
    if not arguments.files and not arguments.page:
        parser.error("nothing to do; give a results FILE, or --page")
    if arguments.files:
        results = _results.merge(_results.read(file) for file in arguments.files)
        if arguments.json is not None:
            _results.write(arguments.json, results)
        if arguments.plot is not None:
            from bench._plot import draw

            draw(results, arguments.plot)
        if arguments.json is None and arguments.plot is None:
            print(markdown(results))
    for page in map(Path, arguments.page):
        page.write_text(fill(page.read_text(encoding="utf-8"), Path(__file__).parents[1]), encoding="utf-8")
    return 0
