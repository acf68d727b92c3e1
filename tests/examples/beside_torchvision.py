"""`python beside_torchvision.py PROGRAM`: the program, also beside a torchvision of another build than torch's."""

from __future__ import annotations

import runpy
import sys

from vision import make_importable

if __name__ == "__main__":
    make_importable()
    runpy.run_path(sys.argv[1], run_name="__main__")
