"""python -m llmkern: the command line, also from a source tree that is not installed."""

from llmkern.cli import main

if __name__ == "__main__":
    main()
