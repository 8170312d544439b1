"""``python -m cae2pipe``, for torchrun and for places without the console script."""

from cae2pipe.cli import main

if __name__ == "__main__":
    main()
