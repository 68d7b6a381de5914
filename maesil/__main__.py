"""``python -m maesil``."""

from maesil.cli import main

if __name__ == "__main__":
    main()
