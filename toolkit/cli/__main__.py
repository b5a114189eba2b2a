"""``python -m toolkit.cli``: the command line where no console script is installed."""

from toolkit.cli.main import main

main()
