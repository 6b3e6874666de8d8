"""``python -m multikd`` does what the ``multikd`` command does."""

from multikd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
