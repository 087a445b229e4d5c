"""``python -m safeopt.cli``: the ``safeopt`` command of this checkout."""

from safeopt.cli import main

main()
