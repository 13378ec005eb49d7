"""``python -m paft`` and ``accelerate launch -m paft train-sft ...``."""

from paft.cli import main

if __name__ == "__main__":
    main()
