"""``python -m cae2pipe``, for torchrun, and where the console script is not installed."""

from cae2pipe.cli import main

if __name__ == "__main__":
    main()
