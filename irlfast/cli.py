"""The ``irlfast`` command: `irlfast --help` lists its subcommands.

Each subcommand is one configuration class and one function.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors a person can mend are printed without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["doctor"] and not {"-h", "--help"} & set(arguments):
        # Looks for what is missing, so it must not need anything beyond the core.
        from irlfast.doctor import main as doctor

        return doctor()
    try:
        import tyro
    except ImportError:
        print('irlfast: the command line needs tyro: pip install "irlfast[train]"', file=sys.stderr)
        return 2

    from irlfast.commands import SUBCOMMANDS, Subcommand
    from irlfast.data import DataError

    try:
        # Configurations check their values when they are made, which is while the arguments are read.
        command: Subcommand = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS, args=arguments, prog="irlfast", description="Learn rewards and policies from demonstrations."
        )
        return command()
    except (DataError, OSError, ValueError) as error:
        print(f"irlfast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("irlfast: stopped; `--resume` goes on from the newest checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
