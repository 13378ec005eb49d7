"""``python -m paft.launch ddp|fsdp2``: where the accelerate config lies."""

import sys

from paft.launch import config

if __name__ == "__main__":
    print(config(*sys.argv[1:2] or ["ddp"]))
